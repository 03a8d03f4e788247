"""Float8Linear: a linear layer whose activations and weight are float8 numbers, multiplied as such."""

from typing import Any

import fastforward_kernels as kernels
import torch

from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer.layer import become, successor
from fastforward.integer.weights import keeping_scales, tensors_of
from fastforward.nn.float8_quantizer import DynamicFloat8Quantizer, Float8Quantizer
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.operands import quantize_parameter
from fastforward.quantization.float8 import Float8Grid, quantize_float8
from fastforward.quantization.granularity import PerTensor, PerToken, min_max
from fastforward.quantization.mapping import FLOAT8_DTYPES

_GRANULARITIES = {"PerTensor": PerTensor, "PerToken": PerToken}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT8_DTYPES}


class Float8Linear(torch.nn.Linear):
    """``y = x W^T + b`` with float8 operands: scales of the input are fixed, or taken from each tensor or token.

    Buffers: ``weight_bytes`` (uint8 ``[out_features, in_features]``, the bits of float8 numbers), ``weight_scale``
    (float32, one or ``[out_features]``), and for a fixed scale ``input_scale`` (float32 scalar). Sums are float32; on
    Hopper GPUs they have the 14 bits that matrix units keep between additions to a float32 sum.
    """

    holds_integers = True
    weight_bytes: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    inverse_smoothing: torch.Tensor | None
    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    float8: torch.dtype
    per: str

    @classmethod
    def swap(cls, layer: QuantizedLinear, *, keep_float: bool = False) -> "Float8Linear":
        """Turn a calibrated layer with float8 quantizers into one that multiplies float8 numbers, in place."""
        quantizer, weight_quantizer, smoothing = layer.input_quantizer, layer.weight_quantizer, layer.smoothing
        assert isinstance(quantizer, Float8Quantizer | DynamicFloat8Quantizer)
        assert isinstance(weight_quantizer, Float8Quantizer)
        weight = layer.weight.detach() if smoothing is None else layer.weight.detach() * smoothing
        block = weight_quantizer.granularity.block_size(weight.shape)
        weight_scale = weight_quantizer.scale.detach().float().reshape(-1)
        tensors = {
            "weight_bytes": quantize_float8(weight, weight_scale, quantizer.quantized_dtype, block).view(torch.uint8),
            "weight_scale": weight_scale,
            "input_scale": quantizer.scale.detach().float().reshape(())
            if isinstance(quantizer, Float8Quantizer)
            else None,
            "inverse_smoothing": None if smoothing is None else smoothing.detach().reciprocal(),
        }
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        become(layer, cls, keep_float)
        self: Float8Linear = layer  # type: ignore[assignment]
        self.install(tensors, bias, quantizer.quantized_dtype, type(quantizer.granularity).__name__)
        return self

    def install(
        self, tensors: dict[str, torch.Tensor | None], bias: torch.Tensor | None, dtype: torch.dtype, per: str
    ) -> None:
        """Take the float8 form of a layer whose float weight has been removed."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is not self.bias:
            self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.float8, self.per = dtype, per

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``input``."""
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features)
        x = input.detach()
        x = x if self.inverse_smoothing is None else x * self.inverse_smoothing.to(x.dtype)
        granularity = _GRANULARITIES[self.per]()
        scale = self.input_scale
        if scale is None:
            scale = Float8Grid(self.float8).parameters_for_range(*min_max(x, granularity))[0]
        codes = quantize_float8(x, scale, self.float8, granularity.block_size(x.shape))
        return kernels.float8_linear(codes, scale, self._weight(), self.weight_scale, self.bias, input.dtype)

    def _weight(self) -> torch.Tensor:
        return self.weight_bytes.view(self.float8)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float weight that the float8 numbers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        return self._weight().float() * self.weight_scale[:, None] if kept is None else kept

    def _apply(self, fn: Any, recurse: bool = True) -> "Float8Linear":
        """Move with the model; scales stay float32."""
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        name = str(self.float8).removeprefix("torch.")
        scale = "fixed" if self.input_scale is not None else "per token" if self.per == "PerToken" else "per tensor"
        return "linear", "float", "float", f"{name} x {name}, input scale {scale}"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        return tensors_of(self), {"dtype": str(self.float8).removeprefix("torch."), "per": self.per}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: Float8Linear = successor(module, cls)
        weight = tensors["weight_bytes"]
        if tuple(weight.shape) != (new.out_features, new.in_features) or weight.dtype != torch.uint8:
            msg = f"it has a weight of shape {tuple(weight.shape)}, the model {(new.out_features, new.in_features)}"
            raise StateError(msg)
        if data["dtype"] not in _DTYPES or data["per"] not in _GRANULARITIES:
            msg = f"the state names {data['dtype']!r} {data['per']!r}; known are {[*_DTYPES, *_GRANULARITIES]}"
            raise StateError(msg)
        new._parameters["bias"] = None
        named = {
            name: tensors.get(name) for name in ("weight_bytes", "weight_scale", "input_scale", "inverse_smoothing")
        }
        new.install(named, tensors.get("bias"), _DTYPES[data["dtype"]], data["per"])
        layer: torch.nn.Module = new
        return layer


def require_float8(layer: QuantizedLinear) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a layer whose float8 numbers cannot be multiplied here."""
    quantizer, weight = layer.input_quantizer, layer.weight_quantizer
    assert isinstance(quantizer, Float8Quantizer | DynamicFloat8Quantizer)
    dtype = quantizer.quantized_dtype
    if not isinstance(weight, Float8Quantizer) or weight.quantized_dtype != dtype:
        msg = f"its input is {dtype} and its weight is not"
        raise UnsupportedOperatorError(msg)
    if not layer.output_quantizer.is_stub():
        msg = "its output is quantized too, which needs the simulation"
        raise UnsupportedOperatorError(msg)
    if not isinstance(quantizer.granularity, PerTensor | PerToken) or (
        isinstance(quantizer, Float8Quantizer) and quantizer.scale.numel() != 1
    ):
        msg = f"its input has scales by {quantizer.granularity}; float8 products take one, or one per token at run time"
        raise UnsupportedOperatorError(msg)
    rows, columns = weight.granularity.block_size(layer.weight.shape)
    if columns != layer.in_features or rows not in (1, layer.out_features):
        msg = f"its weight has scales by {weight.granularity}; float8 products take one, or one per output channel"
        raise UnsupportedOperatorError(msg)
    if not kernels.multiplies_float8(layer.weight.device, dtype):
        msg = f"{layer.weight.device} does not multiply {dtype}: it needs a GPU with float8 matrix units, and Triton"
        raise UnsupportedOperatorError(msg)
