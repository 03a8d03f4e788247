"""IntegerConv: convolutions of one and two dimensions on uint8 activations and int8 weights."""

from typing import Any

import torch

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer import onednn, portable
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue, arguments, make_epilogue
from fastforward.integer.grid import Grid, grid_of
from fastforward.integer.layer import IntegerLayer, become
from fastforward.integer.unfolded import conv_int_mm
from fastforward.integer.weights import integer_weight
from fastforward.nn.conv import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from fastforward.nn.operands import quantize_parameter

_FUSIBLE_AFTER_SUM = ("none", "relu")
_MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}


class IntegerConv(IntegerLayer):
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
    _packed: torch.Tensor | None
    _operands: portable.Operands | None
    _folds: dict[tuple[int, ...], tuple[Any, Epilogue]]

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
        self._packed, self._folds, self._operands = None, {}, None
        self.record.kernel = "onednn"
        self._pack()  # now, because a compiler cannot do it while it traces

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``[batch, in_channels, *size]``, in the dtype of ``input``."""
        if torch.compiler.is_compiling():
            return self._traced(input)
        batched = input.dim() == self.weight_int8.dim()
        codes = self.codes(input if batched else input.unsqueeze(0))
        y = self.product(codes, input.dtype)
        if self.output_quantizer is not None:
            y = self.output_quantizer(y)
        return y if batched else y.squeeze(0)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        codes = super().codes(x)
        memory = _MEMORY.get(codes.dim())
        return codes.contiguous() if memory is None else codes.contiguous(memory_format=memory)

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        scale, zero_point, dtype = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)
        if codes.device.type != "cpu":
            return self._portable(codes, epilogue, activation, out)
        if activation.name not in self._fusible:
            y = activation.apply(self.compute(codes, epilogue))
            return y if out is None else out.codes(y)
        stride, padding, dilation = self._geometry()
        result: torch.Tensor = torch.ops.onednn.qconv_pointwise(
            codes,
            self.grid.scale,
            self.grid.zero_point,
            self._pack(),
            epilogue.scale,
            onednn._zeros(self.out_channels),
            epilogue.bias,
            stride,
            padding,
            dilation,
            self.groups,
            scale,
            zero_point,
            dtype,
            activation.name,
            arguments(activation),
            activation.algorithm,
        )
        return onednn.limited(result, out)

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
        stride, padding, dilation = self._geometry()
        out_scale, out_zero_point, dtype = (1.0, 0, None) if out is None else (out.scale, out.zero_point, torch.uint8)
        result: torch.Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            codes,
            self.grid.scale,
            self.grid.zero_point,
            self._pack(),
            epilogue.scale,
            onednn._zeros(self.out_channels),
            into,
            epilogue.bias,
            stride,
            padding,
            dilation,
            self.groups,
            out_scale,
            out_zero_point,
            torch.float32 if dtype is None else dtype,
            scale,
            zero_point,
            "sum",
            1.0,
            activation.name,
            arguments(activation),
            activation.algorithm,
        )
        return onednn.limited(result, out)

    def _portable(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> torch.Tensor:
        if self._operands is None:
            self._operands = portable.operands(self.weight_int8, self.grid)
        stride, padding, dilation = self._geometry()
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}
        return portable.conv(codes, self.weight_int8, self._operands, epilogue, geometry, activation, out)

    def folded(
        self, base: Epilogue, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float
    ) -> Epilogue:
        """The epilogue followed by batch normalization with running statistics; computed once per set of statistics."""
        sources = [base.scale, mean, var, *(p for p in (weight, bias) if p is not None)]
        key = tuple(part for p in sources for part in (id(p), -1 if p.is_inference() else p._version))
        if key not in self._folds:
            if len(self._folds) > 4:
                self._folds.clear()
            self._folds[key] = (sources, self._fold(base, mean, var, weight, bias, eps))
        return self._folds[key][1]

    def _fold(
        self, base: Epilogue, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float
    ) -> Epilogue:
        gain = (var.detach().double() + eps).rsqrt()
        gain = gain if weight is None else gain * weight.detach().double()
        shift = -mean.detach().double() if base.bias is None else base.bias.double() - mean.detach().double()
        shift = shift * gain
        shift = shift if bias is None else shift + bias.detach().double()
        scale = (base.scale.double() * gain).float()
        return make_epilogue(self.weight_int8, scale, shift, self.grid.scale, self.grid.zero_point)

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        stride, padding, dilation = self._geometry()
        sizes = tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(codes.shape[2:], self.kernel_size, stride, padding, dilation, strict=True)
        )
        return (codes.shape[0], self.out_channels, *sizes)

    def _geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), self._symmetric_padding(), list(self.dilation)

    def _symmetric_padding(self) -> list[int]:
        if self.padding == "valid":
            return [0] * len(self.kernel_size)
        if self.padding == "same":
            return [d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return list(self.padding)

    def _pack(self) -> torch.Tensor | None:
        if self._packed is None and self.weight_int8.device.type == "cpu":
            stride, padding, dilation = self._geometry()
            ones = torch.ones(self.out_channels)
            self._packed = torch.ops.onednn.qconv_prepack(
                self.weight_int8,
                ones,
                self.grid.scale,
                self.grid.zero_point,
                stride,
                padding,
                dilation,
                self.groups,
                None,
            )
        return self._packed

    def _traced(self, input: torch.Tensor) -> torch.Tensor:
        """The same computation in operators that compilers and exporters understand."""
        batched = input.dim() == self.weight_int8.dim()
        codes = self.grid.traced_codes(input if batched else input.unsqueeze(0))
        # A program cannot carry oneDNN's packed weight into another process.
        y = self._unfolded(codes) if torch.compiler.is_exporting() else self.compute(codes, self.epilogue)
        y = (y if batched else y.squeeze(0)).to(input.dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _unfolded(self, codes: torch.Tensor) -> torch.Tensor:
        return conv_int_mm(codes, self.weight_int8, self.epilogue, self._geometry(), self.groups, self.grid.zero_point)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again: a packed weight is an opaque tensor of this process.
        return {**self.__dict__, "_packed": None, "_folds": {}, "_operands": None}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


class IntegerConv1d(IntegerConv, torch.nn.Conv1d):  # type: ignore[override]
    """``torch.nn.Conv1d`` with integer operands."""

    _fusible = ("none", "relu")


class IntegerConv2d(IntegerConv, torch.nn.Conv2d):  # type: ignore[override]
    """``torch.nn.Conv2d`` with integer operands."""

    _fusible = ("none", "relu", "hardtanh", "hardswish", "swish")

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """In two dimensions, which is what oneDNN adds in."""
        return self.weight_int8.device.type == "cpu"


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
