"""WeightOnlyLinear: integer weights and floating activations, for decoding one token at a time.

There the time goes into reading the weight, so fewer bytes per weight are what counts. An int8 weight is multiplied by
the activation split into three 8-bit digits, which together hold every float32 value to its own rounding: by oneDNN as
three rows, or for one row by torch's plain product as columns, which takes the weight as it is, without a packed copy.
An int4 weight goes to torch's grouped int4 kernel, which is fast in bfloat16 only: activations, scales and results are
rounded to it, a hundredth of what four bits cost. For many rows it is unpacked first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from fastforward_kernels import memory
from fastforward_kernels.cpu_int4 import reads_packed
from fastforward_kernels.int_mm import int_mm
from fastforward_kernels.ops_chain import LINEAR_TO_FLOATS
from fastforward_kernels.ops_matmul import INT4_LINEAR
from fastforward_kernels.packing import INT4_BLOCK

from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer import digits, onednn
from fastforward.integer.layer import become, successor
from fastforward.integer.measured_rows import FLOAT, MeasuredRows
from fastforward.integer.shared import shared
from fastforward.integer.tracing import fuses, is_exporting
from fastforward.integer.weights import (
    channel_sums,
    integer_weight,
    keeping_scales,
    per_group,
    require_integer,
    tensors_of,
)
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.operands import quantize_parameter
from fastforward.quantization import affine

_PACKED_AT_ONCE = 512
"""Channels; a multiple of the 64 that the packed format keeps together."""
GROUPS = (256, 128, 64, 32)
_MANY_ROWS = 64
"""For so many an int4 weight is unpacked first, unless something else was measured."""


class WeightOnlyLinear(MeasuredRows):
    """``y = x W^T + b`` with an int8 or int4 weight.

    Buffers: for 8 bits ``weight_int8`` (``[out_features, in_features]``) and ``weight_scale`` (``[out_features]``,
    float32); for 4 bits ``weight_int4`` (``[out_features, in_features / 2]``, in the order of torch's kernel) and
    ``weight_scale`` (``[in_features / group, out_features, 2]``, bfloat16: scale, and the real value of integer zero).
    """

    holds_integers = True
    weight_int4: torch.Tensor
    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    group: int
    _offset: torch.Tensor
    _unpacks: bool

    @classmethod
    def swap(cls, layer: QuantizedLinear, *, keep_float: bool = False) -> "WeightOnlyLinear":
        """Turn a layer whose weight alone is quantized into an integer one, in place."""
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, LinearQuantizer)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        if _is_int4(quantizer):
            tensors, group = _int4(quantizer, layer.weight), _group(quantizer, layer.weight.shape)
        else:
            integers, scale = integer_weight(quantizer, layer.weight)
            tensors, group = {"weight_int8": integers, "weight_scale": scale}, 0
        become(layer, cls, keep_float)
        self: WeightOnlyLinear = layer  # type: ignore[assignment]
        self.install(tensors, bias, group)
        return self

    def install(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, group: int) -> None:
        """Take the integer form of a layer whose float weight has been removed; ``group`` is 0 for 8 bits."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is not self.bias:
            self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.group = group
        self._unpacks = bool(group) and self.out_features % INT4_BLOCK == 0 and reads_packed()
        self._prepare()
        self.start()
        if group:
            memory.use_huge_pages(self.weight_int4.data_ptr(), self.weight_int4.nbytes)

    def kernels(self) -> tuple[str, ...]:
        if not self.group:
            return super().kernels()
        return ("int4", "unpacked") if self._unpacks else ("int4",)

    def default_kernel(self, rows: int) -> str:
        unpacks = self._unpacks and rows >= _MANY_ROWS and self.backend not in self.kernels()
        return "unpacked" if unpacks else super().default_kernel(rows)

    def by_kernel(self, input: torch.Tensor, kernel: str) -> torch.Tensor:
        """As :meth:`MeasuredRows.by_kernel`.

        Raises:
            UnsupportedOperatorError: ``input`` is not on a CPU.
        """
        if input.device.type != "cpu":
            msg = (
                f"a weight-only layer that was converted on a CPU cannot compute on {input.device}: "
                "move the model there first, then quantize and convert it"
            )
            raise UnsupportedOperatorError(msg)
        y = self._int4(input, kernel) if self.group else self._int8(input, kernel)
        if self.bias is not None:
            y = y.add_(self.bias.detach())
        if input.dim() != 2:
            y = y.view(*input.shape[:-1], self.out_features)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def _int4(self, input: torch.Tensor, kernel: str) -> torch.Tensor:
        rows = shared(input, _bfloat16_rows)
        if not kernel and not is_exporting():  # an exported program runs without ours
            kernel = self.default_kernel(rows.shape[0])
        if kernel == "unpacked":
            return INT4_LINEAR(rows, self.weight_int4, self.group, self.weight_scale)
        return torch._weight_int4pack_mm_for_cpu(rows, self.weight_int4, self.group, self.weight_scale).float()

    def _int8(self, input: torch.Tensor, kernel: str) -> torch.Tensor:
        if kernel == "int_mm" and input.numel() == self.in_features:
            return self._one_row(input)
        split, values = shared(input, digits.digits_of_rows)
        return digits.multiply(split, values, self._onednn if kernel == "onednn" else self._traced)

    def _one_row(self, input: torch.Tensor) -> torch.Tensor:
        """The product with the weight as the left matrix, of which every byte is read once, where it lies."""
        columns, values = shared(input, digits.signed_digits)
        product = int_mm(self.weight_int8, columns)
        return torch.mv(product.float(), values).mul_(self.weight_scale).unsqueeze(0)

    def _traced(self, codes: torch.Tensor) -> torch.Tensor:
        """The product in operators that compilers and exporters understand; an exported program runs without ours."""
        if fuses("cpu"):
            return LINEAR_TO_FLOATS(codes, self.weight_int8, self.weight_scale, self._offset, "none")
        product = int_mm(codes.flatten(0, -2), self.weight_int8.t())
        return torch.addcmul(self._offset, product, self.weight_scale).view(*codes.shape[:-1], -1)

    def _onednn(self, codes: torch.Tensor) -> torch.Tensor:
        zeros = onednn._zeros(self.out_features)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            codes, 1.0, 0, self.packed(), self.weight_scale, zeros, self._offset, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    def _prepare(self) -> None:
        """Compute what is derived from the weight; compilers find it there."""
        self.forget_copies()
        if not self.group:
            # What the digits of real zero add to a product, and is to be taken off again.
            self._offset = (channel_sums(self.weight_int8) * self.weight_scale.double() * -digits.CENTER).float()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float weight that the integers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        return self.float_weight() if kept is None else kept

    def float_weight(self) -> torch.Tensor:
        if self.group:
            return self._int4(torch.eye(self.in_features), self.default_kernel(self.in_features)).t()
        return self.weight_int8 * self.weight_scale[:, None]

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightOnlyLinear":
        """Move with the model; scales keep their type."""
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        chosen = self.kernel_names()
        if chosen == FLOAT:
            return "linear", "float32", "float32", FLOAT
        how = f": {chosen}" if chosen not in ("", "int4") else ""
        return "linear", "float32", "float32", f"int{4 if self.group else 8} weight only{how}"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        return tensors_of(self), {"group": self.group, **self.kernel_state()}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: WeightOnlyLinear = successor(module, cls)
        group = int(data["group"])
        name = "weight_int4" if group else "weight_int8"
        expected = (new.out_features, new.in_features // 2 if group else new.in_features)
        if name not in tensors or tuple(tensors[name].shape) != expected:
            found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            msg = f"it has {found}, the model needs {name} of shape {expected}"
            raise StateError(msg)
        new._parameters["bias"] = None
        new.install({name: tensors[name], "weight_scale": tensors["weight_scale"]}, tensors.get("bias"), group)
        new.take_kernels(data)
        layer: torch.nn.Module = new
        return layer


def require_weight_only(layer: QuantizedLinear) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a layer without a weight-only form."""
    quantizer = layer.weight_quantizer
    if layer.smoothing is not None or not layer.output_quantizer.is_stub():
        msg = "only its weight is integer; smoothing or an output quantizer then need the simulation"
        raise UnsupportedOperatorError(msg)
    if _is_int4(quantizer):
        assert isinstance(quantizer, LinearQuantizer)
        if not hasattr(torch, "_weight_int4pack_mm_for_cpu") or layer.out_features % 16:
            msg = f"int4 kernels need output features in multiples of 16, it has {layer.out_features}"
            raise UnsupportedOperatorError(msg)
        _group(quantizer, layer.weight.shape)
    else:
        require_integer(quantizer, layer.weight.shape)


def _bfloat16_rows(input: torch.Tensor) -> torch.Tensor:
    return input.detach().reshape(-1, input.shape[-1]).to(torch.bfloat16)


def _is_int4(quantizer: Any) -> bool:
    """Whether a weight is stored in half bytes: four bits, or groups along its rows."""
    if not isinstance(quantizer, LinearQuantizer):
        return False
    return quantizer.num_bits <= 4 and quantizer.quant_min >= -8


def _group(quantizer: LinearQuantizer, shape: torch.Size) -> int:
    """The group size for torch's kernel: the quantizer's own, or for longer groups a size that divides it."""
    block = quantizer.granularity.block_size(shape)
    own = block[1] if block[0] == 1 else shape[1]
    for group in GROUPS:
        if own % group == 0:
            return group
    msg = f"int4 kernels need groups that are multiples of 32, its weight has groups of {own}"
    raise UnsupportedOperatorError(msg)


def _int4(quantizer: LinearQuantizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Integers packed for torch's kernel, and scale and zero per group."""
    n, k = weight.shape
    group = _group(quantizer, weight.shape)
    parameters = quantizer.scale.detach().float(), quantizer.rounded_zero_point()
    packed = torch.cat([torch._convert_weight_to_int4pack_for_cpu(part, 1) for part in _digits(quantizer, weight)])
    scale, zero = (per_group(parameter.float(), n, k // group) for parameter in parameters)
    return {
        "weight_int4": packed,
        "weight_scale": torch.stack((scale, -zero * scale), -1).transpose(0, 1).to(torch.bfloat16).contiguous(),
    }


def _digits(quantizer: LinearQuantizer, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight as integers from 0 to 15, int32 as the packing operator wants them, some channels at a time."""
    parameters = quantizer.scale.detach().float(), quantizer.rounded_zero_point()
    low, high, granularity = quantizer.quant_min, quantizer.quant_max, quantizer.granularity
    for start in range(0, weight.shape[0], _PACKED_AT_ONCE):
        part = weight.detach()[start : start + _PACKED_AT_ONCE]
        scale, zero_point = (p if p.numel() == 1 else p[start : start + _PACKED_AT_ONCE] for p in parameters)
        yield affine.quantize(part, scale, zero_point, low, high, torch.int8, granularity).to(torch.int32).add_(8)
