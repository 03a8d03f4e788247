"""Number formats: the affine formula, granularity, quantized tensors."""

# The two modules register what operators do to quantized tensors.
from fastforward.quantization import tensor_matmul as _tensor_matmul  # noqa: F401
from fastforward.quantization import tensor_shapes as _tensor_shapes  # noqa: F401
from fastforward.quantization.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerChannel,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PerToken,
)
from fastforward.quantization.mapping import MappingType, ZeroPointDomain, choose_qparams
from fastforward.quantization.static import (
    LinearActivationQuantizedTensor,
    to_affine_quantized_floatx_static,
    to_affine_quantized_intx_static,
    to_linear_activation_quantized,
)
from fastforward.quantization.tensor import PlainLayout, PlainTensorImpl, QuantizedTensor

__all__ = [
    "Granularity",
    "LinearActivationQuantizedTensor",
    "MappingType",
    "PerAxis",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerTile",
    "PerToken",
    "PlainLayout",
    "PlainTensorImpl",
    "QuantizedTensor",
    "ZeroPointDomain",
    "choose_qparams",
    "to_affine_quantized_floatx_static",
    "to_affine_quantized_intx_static",
    "to_linear_activation_quantized",
]
