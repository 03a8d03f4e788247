"""IntegerConv: convolutions of one and two dimensions on uint8 activations and int8 weights."""

from typing import Any

import torch
from fastforward_kernels.cpu_matmul import conv1d_fuses_relu
from fastforward_kernels.ops_chain import ADDS_CODES

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer import onednn, portable
from fastforward.integer.deferred import Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue, arguments, make_epilogue
from fastforward.integer.folding import Folded, Norm
from fastforward.integer.grid import Grid, grid_of
from fastforward.integer.layer import become
from fastforward.integer.layout import laid_out, padded
from fastforward.integer.measured import MeasuredLayer
from fastforward.integer.tracing import fuses, is_exporting
from fastforward.integer.unfolded import conv_int_mm
from fastforward.integer.weights import integer_weight
from fastforward.nn.conv import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from fastforward.nn.operands import quantize_parameter

_FUSIBLE_AFTER_SUM = ("none", "relu")
_MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
_WIDE = 64
"""Input over weight, in elements, from which padding the input takes longer than the kernel's way with a zero point."""
_MOST_PACKS = 4
"""Input shapes of a layer for which packed weights are kept."""
_ANY_SHAPE: tuple[int, tuple[int, ...]] = (0, ())


class IntegerConv(MeasuredLayer):
    """A convolution with integer operands; subclasses add the float class.

    Buffers ``weight_int8`` (shape of the float weight) and ``weight_scale`` (``[out_channels]``) replace the float
    weight.
    """

    channels_first = True
    _fusible: tuple[str, ...] = ("none",)
    """Activations that oneDNN's convolution of these dimensions takes over."""
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    _packs: dict[tuple[int, tuple[int, ...]], torch.Tensor]
    _operands: portable.Operands | None
    _folded: Folded | None
    _sizes: dict[torch.Size, tuple[int, ...]]
    _strides: list[int]
    _paddings: list[int]
    _dilations: list[int]
    _dimensions: int
    _on_cpu: bool
    _conv_forward: Any
    _zero_points: torch.Tensor
    _columns: torch.Tensor | None
    _pointwise: bool

    @classmethod
    def swap(cls, layer: Any, grid: Grid | None = None, *, keep_float: bool = False) -> "IntegerConv":
        """Turn a calibrated convolution into an integer one, in place."""
        grid = grid_of(layer.input_quantizer) if grid is None else grid
        integers, scale = integer_weight(layer.weight_quantizer, layer.weight)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        output_quantizer = layer.output_quantizer
        become(layer, _CLASSES[type(layer)], keep_float)
        layer.install(integers, scale, bias, grid, None if output_quantizer.is_stub() else output_quantizer)
        return layer  # type: ignore[no-any-return]

    def prepare(self, bias: torch.Tensor | None) -> None:
        super().prepare(bias)
        self._packs, self._folded, self._operands, self._sizes, self._columns = {}, None, None, {}, None
        self._strides, self._paddings, self._dilations = list(self.stride), self._padding_sizes(), list(self.dilation)
        self._pointwise = self.groups == 1 and self.weight_int8[0, 0].numel() == 1 and not any(self._paddings)
        self._dimensions, self._on_cpu = self.weight_int8.dim(), self.weight_int8.device.type == "cpu"
        self._zero_points = onednn._zeros(self.out_channels)
        self.record.kernel = "onednn"
        self._pack_ahead()

    @property
    def _memory(self) -> torch.memory_format:
        """How the kernel wants its operands; not an attribute, because ``torch.save`` cannot write one."""
        return _MEMORY.get(self._dimensions, torch.contiguous_format)

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``[batch, in_channels, *size]``, in the dtype of ``input``."""
        if torch.compiler.is_compiling():
            return self._traced(input)
        begun = self.begin(input)
        if begun is not None:
            return self.defer(begun) if isinstance(begun, Product) else begun
        if self.prefers_floats(input):
            return self.in_floats(input)
        batched = input.dim() == self._dimensions
        y: torch.Tensor = self.defer(self.product(self.codes(input if batched else input.unsqueeze(0)), input.dtype))
        if not self.defers and type(y) is Deferred:
            y.computed()  # in the kernel's memory layout, which the next operator may take as it is
        if self.output_quantizer is not None:
            y = self.output_quantizer(y)
        return y if batched else y.squeeze(0)

    def begin(self, input: torch.Tensor) -> Product | torch.Tensor | None:
        shape, dtype = (input._shape, input._dtype) if type(input) is Deferred else (input.shape, input.dtype)
        if not self.defers or self.output_quantizer is not None or len(shape) != self._dimensions:
            return None
        if self.prefers_floats(input):
            return self.in_floats(input)
        return self.product(self.codes(input), dtype)

    def follow(self, before: Product) -> Product | None:
        other = self.output_quantizer is not None or before.codes.dim() != self._dimensions or self._float_wins
        return None if other or not self.defers else self.product(self.codes(before), before.dtype)

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        if not self._on_cpu:
            return self._portable(codes, epilogue, activation, out)
        if self._pointwise and self._is_small_matrix(codes):
            return self._multiplied(codes, epilogue, activation, out)
        epilogue, activation, scale, zero_point, dtype = onednn.stored(epilogue, activation, out)
        if activation.name not in self._fusible:
            y = activation.apply(self.compute(codes, epilogue))
            return y if out is None else out.codes(y)
        self.record.kernel = "onednn"
        codes, bias, point, padding = self._operands_of(codes, epilogue)
        weight = self._pack(point, codes.shape), epilogue.scale, self._zero_points, bias
        geometry = self._strides, padding, self._dilations
        after = activation.name, arguments(activation), activation.algorithm
        operands = self.grid.scale, point, *weight
        result = onednn.convolve(codes, operands, geometry, self.groups, (scale, zero_point, dtype, *after))
        return onednn.limited(result, out)

    def _is_small_matrix(self, codes: torch.Tensor) -> bool:
        """Whether there is one pixel for each of a few images: what squeeze-and-excitation makes of them."""
        rows = codes.shape[0]
        one_pixel = codes.numel() == rows * self.in_channels
        return one_pixel and 0 < rows <= onednn.SMALL_ROWS and not torch.compiler.is_compiling()

    def _multiplied(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> torch.Tensor:
        """A pointwise convolution of one pixel, which is a product of matrices."""
        self.record.kernel = "int_mm"
        if self._columns is None:
            self._columns = self.weight_int8.flatten(1).t()
        shape = codes.shape
        y = onednn.linear_int_mm(codes.view(shape[0], -1).contiguous(), self._columns, epilogue, activation, out)
        return y.view(shape[0], -1, *shape[2:])

    def accumulate(
        self,
        codes: torch.Tensor,
        epilogue: Epilogue,
        activation: Activation,
        into: torch.Tensor,
        scale: float,
        zero_point: int,
        out: Grid | None,
    ) -> torch.Tensor:
        if activation.name not in _FUSIBLE_AFTER_SUM:
            y = into if out is None else torch.sub(into, float(zero_point)).mul_(scale)
            y = activation.apply(self.accumulate(codes, epilogue, NO_ACTIVATION, y, 1.0, 0, None))
            return y if out is None else out.codes_in_place(y)
        epilogue, activation, out_scale, out_zero_point, _ = onednn.stored(epilogue, activation, out)
        scale = scale if out is None else scale / (out.scale / out_scale)
        codes, bias, point, padding = self._operands_of(codes, epilogue)
        result: torch.Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            codes,
            self.grid.scale,
            point,
            self._pack(point, codes.shape),
            epilogue.scale,
            self._zero_points,
            into,
            bias,
            self._strides,
            padding,
            self._dilations,
            self.groups,
            out_scale,
            out_zero_point,
            into.dtype,
            scale,
            zero_point,
            "sum",
            1.0,
            activation.name,
            arguments(activation),
            activation.algorithm,
        )
        return onednn.limited(result, out)

    def float_operator(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self._conv_forward(x, weight, bias)
        return y

    def _operands_of(
        self, codes: torch.Tensor, epilogue: Epilogue
    ) -> tuple[torch.Tensor, torch.Tensor | None, int, list[int]]:
        """Codes, bias, zero point and padding for the kernel.

        For a zero point other than 0 the kernel sums the weight on every call. Without padding the bias can hold that
        sum, so the input is padded beforehand, unless it is so large that this takes longer.
        """
        point, padding = self.grid.zero_point, self._paddings
        if point == 0 or not any(padding):
            bias = epilogue.bias if point == 0 else epilogue.compensated
            return laid_out(codes, self._memory), bias, 0, padding
        wide = codes.numel() > _WIDE * self.weight_int8.numel() and codes.is_contiguous(memory_format=self._memory)
        if wide and not torch.compiler.is_compiling():
            return codes, epilogue.bias, point, padding
        return padded(codes, padding, point, self._memory), epilogue.compensated, 0, [0] * len(padding)

    def _portable(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> torch.Tensor:
        if self._operands is None:
            self._operands = portable.operands(self.weight_int8, self.grid)
        stride, padding, dilation = self._strides, self._paddings, self._dilations
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}
        return portable.conv(codes, self.weight_int8, self._operands, epilogue, geometry, activation, out)

    def folded(
        self, base: Epilogue, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float
    ) -> Epilogue:
        """The epilogue followed by batch normalization with running statistics; kept until one of them changes."""
        known = self._folded
        if known is None or not known.holds(base, mean, var, weight, bias, eps):
            norm = Norm(mean, var, weight, bias, eps)
            scale, shift = norm.folded(base)
            result = make_epilogue(self.weight_int8, scale, shift, self.grid.scale, self.grid.zero_point)
            known = self._folded = Folded(base, norm, result)
        return known.result

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        size = codes.shape[2:]
        known = self._sizes.get(size)
        if known is None:
            geometry = zip(size, self.kernel_size, self._strides, self._paddings, self._dilations, strict=True)
            known = tuple((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in geometry)
            self._sizes = {size: known}
        return (codes.shape[0], self.out_channels, *known)

    def _padding_sizes(self) -> list[int]:
        if self.padding == "valid":
            return [0] * len(self.kernel_size)
        if self.padding == "same":
            return [d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return list(self.padding)

    def _pack_ahead(self) -> None:
        """Pack for any shape, because a compiler cannot pack while it traces."""
        if self._on_cpu:
            self._packs[_ANY_SHAPE] = self._packed(0, None)

    def _pack(self, zero_point: int, shape: torch.Size) -> torch.Tensor:
        """The weight as oneDNN wants it for an input of this shape; kernels are slower on that of another shape."""
        packed = self._packs.get((zero_point, shape))
        if packed is not None:
            return packed
        if torch.compiler.is_compiling():
            return next(pack for (point, _), pack in self._packs.items() if point == zero_point)
        packed = self._packed(zero_point, list(shape))
        kept = [key for key in self._packs if key[0] == zero_point]
        if len(kept) == _MOST_PACKS or kept == [_ANY_SHAPE]:
            del self._packs[kept[0]]
        self._packs[zero_point, shape] = packed
        return packed

    def _packed(self, zero_point: int, shape: list[int] | None) -> torch.Tensor:
        padding = [0] * len(self._paddings) if zero_point == 0 != self.grid.zero_point else self._paddings
        packed: torch.Tensor = torch.ops.onednn.qconv_prepack(
            self.weight_int8,
            torch.ones(self.out_channels),
            self.grid.scale,
            zero_point,
            self._strides,
            padding,
            self._dilations,
            self.groups,
            shape,
        )
        return packed

    def _traced(self, input: torch.Tensor) -> torch.Tensor:
        """The same computation in operators that compilers and exporters understand."""
        batched = input.dim() == self._dimensions
        codes = self.grid.traced_codes(input if batched else input.unsqueeze(0))
        # A program cannot carry oneDNN's packed weight into another process.
        y = self._unfolded(codes) if is_exporting() else self.compute(codes, self.epilogue)
        if self.adds_codes and fuses("cpu"):
            y = ADDS_CODES(y, self.weight_int8)
        y = y if batched else y.squeeze(0)
        y = y if y.dtype == input.dtype else y.to(input.dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _unfolded(self, codes: torch.Tensor) -> torch.Tensor:
        geometry = self._strides, self._paddings, self._dilations
        return conv_int_mm(codes, self.weight_int8, self.epilogue, geometry, self.groups, self.grid.zero_point)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again: a packed weight is an opaque tensor of this process.
        derived = {"_folded": None, "_operands": None, "_columns": None, "_float_weight": None}
        return {**self.__dict__, "_packs": {}, **derived}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack_ahead()


class IntegerConv1d(IntegerConv, torch.nn.Conv1d):  # type: ignore[override]
    """``torch.nn.Conv1d`` with integer operands."""

    _fusible = ("none", "relu") if conv1d_fuses_relu() else ("none",)


class IntegerConv2d(IntegerConv, torch.nn.Conv2d):  # type: ignore[override]
    """``torch.nn.Conv2d`` with integer operands."""

    _fusible = ("none", "relu", "hardtanh", "hardswish", "swish")

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """In two dimensions, which is what oneDNN adds in."""
        return self._on_cpu


class IntegerConv3d(IntegerConv, torch.nn.Conv3d):  # type: ignore[override]
    """``torch.nn.Conv3d`` with integer operands."""


def require_kernel(layer: Any) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a convolution without an integer kernel."""
    if layer.padding_mode != "zeros":
        msg = f"padding mode {layer.padding_mode!r} has no integer kernel"
        raise UnsupportedOperatorError(msg)
    reaches = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" and any(reach % 2 for reach in reaches):
        msg = "padding 'same' with an even kernel pads unevenly, which has no integer kernel"
        raise UnsupportedOperatorError(msg)
    if layer.weight.device.type != "cpu":
        if len(layer.kernel_size) > 2:
            msg = f"three-dimensional convolutions have no integer kernel on {layer.weight.device.type}"
            raise UnsupportedOperatorError(msg)
    elif not onednn.has_onednn():
        msg = "integer convolutions need torch's oneDNN operators on a machine with exact uint8 x int8 products"
        raise UnsupportedOperatorError(msg)


_CLASSES: dict[type, type[IntegerConv]] = {
    QuantizedConv1d: IntegerConv1d,
    QuantizedConv2d: IntegerConv2d,
    QuantizedConv3d: IntegerConv3d,
}
