"""The affine quantizer that computes its range from each tensor."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastforward.nn.linear_quantizer import is_signed, storage_dtype
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.quantization import affine
from fastforward.quantization.granularity import Granularity, PerTensor, min_max
from fastforward.quantization.tensor import QuantizedTensor

ParameterInference = Callable[["DynamicLinearQuantizer", Tensor], tuple[Tensor, Tensor | None]]


class DynamicLinearQuantizer(Quantizer):
    """Rounds to ``num_bits`` integers with a scale and zero point from each tensor's own range.

    Args:
        num_bits: 1 to 16.
        symmetric: real zero lies on the middle integer.
        allow_one_sided: a symmetric quantizer uses the whole grid for tensors without negative values.
        granularity: which elements share a scale; per token is the usual choice.
        quantized_dtype: integer type of stored values; an unsigned one makes the grid unsigned.
        parameter_inference_fn: ``(quantizer, x) -> (scale, zero point or None)`` instead of min-max.
        restricted: leave out the most negative integer.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        symmetric: bool = False,
        allow_one_sided: bool = True,
        granularity: Granularity | None = None,
        quantized_dtype: torch.dtype | None = None,
        parameter_inference_fn: ParameterInference | None = None,
        restricted: bool = False,
        metadata: QuantizerMetadata | None = None,
    ) -> None:
        super().__init__(metadata)
        signed = quantized_dtype is None or is_signed(quantized_dtype)
        self.quant_min, self.quant_max = affine.integer_range(num_bits, signed=signed, restricted=restricted)
        self.num_bits = num_bits
        self.symmetric = symmetric
        self.allow_one_sided = allow_one_sided
        self.restricted = restricted
        self.granularity = PerTensor() if granularity is None else granularity
        self.quantized_dtype = storage_dtype(num_bits, quantized_dtype)
        self.parameter_inference_fn = parameter_inference_fn

    @property
    def grid(self) -> affine.AffineGrid:
        """The integers, and how ranges are laid over them."""
        return affine.AffineGrid(self.quant_min, self.quant_max, self.symmetric, self.allow_one_sided)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each block of ``x``."""
        data = x.detach()
        if self.parameter_inference_fn is None:
            return self.grid.parameters_for_range(*min_max(data, self.granularity))
        scale, zero_point = self.parameter_inference_fn(self, data)
        middle = torch.full_like(scale, self.grid.middle, dtype=torch.int32)
        return scale, middle if zero_point is None else zero_point

    def simulate(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        scale, zero_point = self.parameters_for(x)
        return affine.fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max, self.granularity)

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return ``x`` as stored integers; NaN is refused with ValueError."""
        scale, zero_point = self.parameters_for(x)
        low, high = self.quant_min, self.quant_max
        values = affine.quantize(x.detach(), scale, zero_point, low, high, self.quantized_dtype, self.granularity)
        return QuantizedTensor(values, scale, zero_point, self.granularity.block_size(x.shape), x.dtype, low, high)

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, symmetric={self.symmetric}, granularity={self.granularity}"
