"""IntegerDynamicLinear: a linear layer whose activations get a scale and zero point per row on each call."""

from typing import Any

import fastforward_kernels as kernels
import torch
from fastforward_kernels import memory
from fastforward_kernels.int_mm import int_mm
from fastforward_kernels.ops_chain import LINEAR_TO_FLOATS

from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer import onednn
from fastforward.integer.grid import in_blocks
from fastforward.integer.layer import become, output_from_json, output_to_json, require_shape, successor
from fastforward.integer.measured_rows import FLOAT, MeasuredRows
from fastforward.integer.row_codes import RowCodes, RowRounding, row_rounding
from fastforward.integer.shared import shared
from fastforward.integer.tracing import fuses
from fastforward.integer.weights import channel_sums, integer_weight, keeping_scales, require_integer, tensors_of
from fastforward.nn.dynamic_quantizer import DynamicLinearQuantizer
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.operands import quantize_parameter
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.granularity import PerTensor, PerToken

_GRANULARITIES = {"PerTensor": PerTensor, "PerToken": PerToken}


class IntegerDynamicLinear(MeasuredRows):
    """``y = x W^T + b`` with an int8 weight and activations quantized by their own range, per token or per tensor.

    Buffers ``weight_int8`` (``[out_features, in_features]``) and ``weight_scale`` (``[out_features]``, float32) replace
    the float weight.
    """

    holds_integers = True
    inverse_smoothing: torch.Tensor | None
    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    quantizer: DynamicLinearQuantizer
    _rounding: RowRounding
    _sums: torch.Tensor
    _real_sums: torch.Tensor

    @classmethod
    def swap(cls, layer: QuantizedLinear, *, keep_float: bool = False) -> "IntegerDynamicLinear":
        """Turn a layer with a dynamic input quantizer into an integer one, in place."""
        quantizer, smoothing = layer.input_quantizer, layer.smoothing
        assert isinstance(quantizer, DynamicLinearQuantizer)
        weight = layer.weight if smoothing is None else layer.weight * smoothing
        integers, scale = integer_weight(layer.weight_quantizer, weight)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        output_quantizer = None if layer.output_quantizer.is_stub() else layer.output_quantizer
        become(layer, cls, keep_float)
        self: IntegerDynamicLinear = layer  # type: ignore[assignment]
        inverse = None if smoothing is None else smoothing.detach().reciprocal()
        self.install(integers, scale, bias, inverse, quantizer, output_quantizer)
        return self

    def install(
        self,
        integers: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        inverse_smoothing: torch.Tensor | None,
        quantizer: DynamicLinearQuantizer,
        output_quantizer: Quantizer | None,
    ) -> None:
        """Take the integer form of a layer whose float weight has been removed."""
        self.register_buffer("weight_int8", integers)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        if bias is not self.bias:
            self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        # Beside the modules: it has no tensors, and code that walks the model should see a layer.
        object.__setattr__(self, "quantizer", quantizer)
        object.__setattr__(self, "output_quantizer", output_quantizer)
        self._prepare()
        self.start()

    def _prepare(self) -> None:
        """Compute what is derived from the weight; compilers find it there."""
        self._rounding = row_rounding(self.quantizer.grid, self.quantizer.granularity)
        sums = channel_sums(self.weight_int8)
        self.forget_copies()
        self._sums = sums.to(torch.int32)
        self._real_sums = (sums * self.weight_scale.double()).float()

    def default_kernel(self, rows: int) -> str:
        return "int_mm" if self.backend == "auto" and rows <= onednn.SMALL_ROWS else super().default_kernel(rows)

    def by_kernel(self, input: torch.Tensor, kernel: str) -> torch.Tensor:
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features)
        smoothing = self.inverse_smoothing
        if input.device.type != "cpu":
            return self._by_kernels(input.detach() if smoothing is None else input.detach() * smoothing, input.dtype)
        rounding = self._rounding
        rows = shared(input, rounding) if smoothing is None else rounding(input.detach() * smoothing)
        y = self._traced(rows) if torch.compiler.is_compiling() else self._product(rows, kernel)
        return y.view(*input.shape[:-1], self.out_features).to(input.dtype)

    def _by_kernels(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The whole layer in one operator, which quantizes the input on its way."""
        scale, zero_point = self.quantizer.parameters_for(x)
        packed = kernels.PackedWeight(self.weight_int8, self.weight_scale, None, self._sums)
        grid = (self.quantizer.quant_min, self.quantizer.quant_max)
        bias = None if self.bias is None else self.bias.detach().float()
        parameters = scale.float(), zero_point.to(torch.int32)
        return kernels.int8_linear(x, *parameters, packed, x_range=grid, bias=bias, out_dtype=dtype)

    def _traced(self, rows: RowCodes) -> torch.Tensor:
        """The product in operators that compilers and exporters understand; an exported program runs without ours."""
        codes, scale, zero_point = rows
        if fuses("cpu"):
            nothing = torch.zeros_like(self.weight_scale)
            product = LINEAR_TO_FLOATS(codes, self.weight_int8, self.weight_scale, nothing, "none")
        else:
            product = int_mm(codes, self.weight_int8.t()) * self.weight_scale
        y = (product - zero_point * self._real_sums) * scale
        return y if self.bias is None else y + self.bias.detach()

    def _product(self, rows: RowCodes, kernel: str) -> torch.Tensor:
        """Multiply by blocks of rows that stay in the cache; each operator has one parameter, as ATen likes."""
        y = memory.mapped(torch.empty(rows.codes.shape[0], self.out_features))
        offsets = (-rows.zero_point * rows.scale).flatten()
        parts = (in_blocks(t, self.out_features) for t in (rows.codes, rows.scale, offsets, y))
        for codes, scale, offset, target in zip(*parts, strict=True):
            torch.mul(self._multiplied(codes, kernel), scale, out=target).addr_(offset, self._real_sums)
            if self.bias is not None:
                target.add_(self.bias.detach())
        return y

    def _multiplied(self, codes: torch.Tensor, kernel: str) -> torch.Tensor:
        """Codes times the weight in real units, float32."""
        if kernel == "int_mm":
            return int_mm(codes, self.weight_int8.t()) * self.weight_scale
        zeros = onednn._zeros(self.out_features)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self.packed(), self.weight_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float weight that the integers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        return self.weight_int8 * self.weight_scale[:, None] if kept is None else kept

    def float_weight(self) -> torch.Tensor:
        weight = self.weight_int8 * self.weight_scale[:, None]
        return weight if self.inverse_smoothing is None else weight * self.inverse_smoothing

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerDynamicLinear":
        """Move with the model; scales stay float32."""
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        if self.kernel_names() == FLOAT:
            return "linear", "float32", "float32", FLOAT
        per = "token" if isinstance(self.quantizer.granularity, PerToken) else "tensor"
        return "linear", "float32", "float32", f"uint8 x int8, input scale per {per}"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        quantizer = self.quantizer
        data = {
            "num_bits": quantizer.num_bits,
            "symmetric": quantizer.symmetric,
            "one_sided": quantizer.allow_one_sided,
            "restricted": quantizer.restricted,
            "granularity": type(quantizer.granularity).__name__,
            "output": output_to_json(self.output_quantizer),
            **self.kernel_state(),
        }
        return tensors_of(self), data

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: IntegerDynamicLinear = successor(module, cls)
        require_shape(tensors["weight_int8"], (new.out_features, new.in_features), "weight")
        if data["granularity"] not in _GRANULARITIES:
            msg = f"the state names granularity {data['granularity']!r}; known are {', '.join(_GRANULARITIES)}"
            raise StateError(msg)
        quantizer = DynamicLinearQuantizer(
            int(data["num_bits"]),
            symmetric=bool(data["symmetric"]),
            allow_one_sided=bool(data["one_sided"]),
            granularity=_GRANULARITIES[data["granularity"]](),
            restricted=bool(data["restricted"]),
        )
        new._parameters["bias"] = None
        integers, scale, output = tensors["weight_int8"], tensors["weight_scale"], output_from_json(data["output"])
        new.install(integers, scale, tensors.get("bias"), tensors.get("inverse_smoothing"), quantizer, output)
        new.take_kernels(data)
        layer: torch.nn.Module = new
        return layer


def require_dynamic(layer: QuantizedLinear) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a layer whose dynamic input has no integer form."""
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, DynamicLinearQuantizer)
    if quantizer.num_bits > 8:
        msg = f"its input has {quantizer.num_bits} bits, integer kernels take 8 at most"
        raise UnsupportedOperatorError(msg)
    if type(quantizer) is not DynamicLinearQuantizer or quantizer.parameter_inference_fn is not None:
        msg = "its input's scale comes from a function of its own"
        raise UnsupportedOperatorError(msg)
    if not isinstance(quantizer.granularity, PerTensor | PerToken):
        msg = f"its input has scales by {quantizer.granularity}, integer kernels take one per token or tensor"
        raise UnsupportedOperatorError(msg)
    require_integer(layer.weight_quantizer, layer.weight.shape)
