"""PackedLinear: integer weights and floating activations by the operators of ``fastforward_kernels``, for GPUs."""

from typing import Any

import fastforward_kernels as kernels
import torch

from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer.layer import become, successor
from fastforward.integer.weights import keeping_scales, per_group, tensors_of
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.operands import quantize_parameter
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization import affine

GROUPS = (128, 64, 32)
_RANGES = {4: (-8, 7), 8: (-128, 127)}


class PackedLinear(torch.nn.Linear):
    """``y = x W^T + b`` with a weight of 4 or 8 bits that is dequantized while it is multiplied.

    Buffers: ``weight_packed`` (int8 ``[out_features, in_features]``, or uint8 ``[out_features, in_features / 2]`` with
    two neighbours in a byte), ``weight_scale`` (float32 ``[out_features, in_features / group]``) and
    ``weight_zero_point`` (int32, likewise, or ``None``). Runs on every device; CPUs have the faster
    ``WeightOnlyLinear``.
    """

    holds_integers = True
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    group: int

    @classmethod
    def swap(cls, layer: QuantizedLinear, *, keep_float: bool = False) -> "PackedLinear":
        """Turn a layer whose weight alone is quantized into an integer one, in place."""
        packed = _packed(layer.weight_quantizer, layer.weight)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        become(layer, cls, keep_float)
        self: PackedLinear = layer  # type: ignore[assignment]
        self.install(packed, bias)
        return self

    def install(self, packed: kernels.PackedWeightOnly, bias: torch.Tensor | None) -> None:
        """Take the integer form of a layer whose float weight has been removed."""
        weight, scale, zero_point, self.group = packed
        self.register_buffer("weight_packed", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        if bias is not self.bias:
            self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``input``."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return kernels.weight_only_linear(input, self._operands(), bias)

    def _operands(self) -> kernels.PackedWeightOnly:
        return kernels.PackedWeightOnly(self.weight_packed, self.weight_scale, self.weight_zero_point, self.group)

    @property
    def bits(self) -> int:
        """Bits of a weight: 4 or 8."""
        return 8 if self.weight_packed.dtype == torch.int8 else 4

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float weight that the integers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        if kept is not None:
            return kept
        eye = torch.eye(self.in_features, device=self.weight_packed.device)
        return kernels.weight_only_linear(eye, self._operands()).t()

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Move with the model; scales stay float32."""
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        return "linear", "float", "float", f"int{self.bits} weight only, groups of {self.group}"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        return tensors_of(self), {"group": self.group}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: PackedLinear = successor(module, cls)
        group, weight, scale = int(data["group"]), tensors["weight_packed"], tensors["weight_scale"]
        zero_point = tensors.get("weight_zero_point")
        width = {torch.int8: new.in_features, torch.uint8: new.in_features // 2}.get(weight.dtype)
        groups = (new.out_features, new.in_features // group) if group > 0 else ()
        parameters = [scale] if zero_point is None else [scale, zero_point]
        if tuple(weight.shape) != (new.out_features, width) or any(tuple(p.shape) != groups for p in parameters):
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            msg = f"it has {found}, the model a linear layer of {new.in_features} to {new.out_features} features"
            raise StateError(msg)
        new._parameters["bias"] = None
        new.install(kernels.PackedWeightOnly(weight, scale, zero_point, group), tensors.get("bias"))
        layer: torch.nn.Module = new
        return layer


def require_packed(layer: QuantizedLinear) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a layer that cannot be packed."""
    if layer.smoothing is not None or not layer.output_quantizer.is_stub():
        msg = "only its weight is integer; smoothing or an output quantizer then need the simulation"
        raise UnsupportedOperatorError(msg)
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, LinearQuantizer):
        msg = f"its weight quantizer is a {type(quantizer).__name__}, not a LinearQuantizer"
        raise UnsupportedOperatorError(msg)
    _bits(quantizer)
    _group(quantizer, layer.weight.shape)


def _bits(quantizer: LinearQuantizer) -> int:
    """Bits to store a weight in."""
    for bits, (low, high) in _RANGES.items():
        if low <= quantizer.quant_min and quantizer.quant_max <= high:
            return bits
    msg = f"its weight has {quantizer.num_bits} bits, weight-only kernels take signed 8 at most"
    raise UnsupportedOperatorError(msg)


def _group(quantizer: LinearQuantizer, shape: torch.Size) -> int:
    """Columns that share a scale for the kernel: a size that divides those of the quantizer."""
    block = quantizer.granularity.block_size(shape)
    group = next((size for size in GROUPS if block[1] % size == 0), 0)
    if not group or block[0] not in (1, shape[0]):
        msg = f"weight-only kernels need groups of 32, 64 or 128 columns in a row, its weight has blocks of {block}"
        raise UnsupportedOperatorError(msg)
    return group


def _packed(quantizer: Quantizer, weight: torch.Tensor) -> kernels.PackedWeightOnly:
    assert isinstance(quantizer, LinearQuantizer)
    group, shape = _group(quantizer, weight.shape), tuple(weight.shape)
    grid = quantizer.scale.detach().float(), quantizer.rounded_zero_point()
    low, high, granularity = quantizer.quant_min, quantizer.quant_max, quantizer.granularity
    integers = affine.quantize(weight.detach(), *grid, low, high, torch.int8, granularity)
    scale, zero_point = (per_group(parameter, shape[0], shape[1] // group) for parameter in grid)
    centred = not bool(zero_point.any())
    return kernels.pack_weight_only(
        integers, scale, None if centred else zero_point, bits=_bits(quantizer), group_size=group
    )
