"""IntegerConvTranspose: transposed convolutions on uint8 activations and int8 weights.

With stride ``s`` every output position sees each ``s``-th tap of the kernel, so that a transposed convolution is an
ordinary one with ``s`` times as many output channels per dimension, one set for each position modulo ``s``, whose
results are then laid side by side (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016).
"""

import math
from typing import Any

import torch

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer import onednn
from fastforward.integer.conv import IntegerConv, IntegerConv1d, IntegerConv2d, IntegerConv3d
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.grid import Grid
from fastforward.integer.layer import become
from fastforward.integer.measured import MeasuredLayer
from fastforward.integer.weights import integer_weight, require_integer
from fastforward.nn.conv import QuantizedConvTranspose1d, QuantizedConvTranspose2d, QuantizedConvTranspose3d
from fastforward.nn.operands import quantize_parameter

_MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVS = (
    (torch.nn.Conv1d, IntegerConv1d),
    (torch.nn.Conv2d, IntegerConv2d),
    (torch.nn.Conv3d, IntegerConv3d),
)


class IntegerConvTranspose(MeasuredLayer):
    """A transposed convolution with integer operands; subclasses add the float class.

    Buffers ``weight_int8`` (shape of the float weight, ``[in_channels, out_channels / groups, *kernel]``) and
    ``weight_scale`` (``[out_channels]``, float32) replace the float weight.
    """

    channels_first = False  # a normalization that follows is not folded into the channels of the inner convolution
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    _output_padding: Any
    _inner: IntegerConv
    _kernel: str

    @classmethod
    def swap(cls, layer: Any, grid: Grid, *, keep_float: bool = False) -> "IntegerConvTranspose":
        """Turn a calibrated transposed convolution into an integer one, in place."""
        integers, scale = integer_weight(layer.weight_quantizer, layer.weight, channel_dim=1)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        output_quantizer = layer.output_quantizer
        become(layer, _CLASSES[type(layer)], keep_float)
        output = None if output_quantizer.is_stub() else output_quantizer
        layer.install(integers, scale.repeat(layer.groups), bias, grid, output)
        return layer  # type: ignore[no-any-return]

    def prepare(self, bias: torch.Tensor | None) -> None:
        super().prepare(bias)
        grid = self.grid
        phases = math.prod(self.stride)
        spread = (self.groups, 1, self.out_channels // self.groups)

        def per_phase(values: torch.Tensor) -> torch.Tensor:
            return values.detach().view(spread).expand(-1, phases, -1).flatten()

        weight = phase_weight(self.weight_int8, self.stride, self.dilation, self.groups)
        plain, integer = _CONVS[len(self.stride) - 1]
        kernel = tuple(weight.shape[2:])
        inner: Any = plain(
            self.in_channels,
            self.out_channels * phases,
            kernel,  # type: ignore[arg-type]
            padding=tuple(size - 1 for size in kernel),  # type: ignore[arg-type]
            groups=self.groups,
            bias=False,
            device="meta",
        )
        become(inner, integer)
        inner.install(weight, per_phase(self.weight_scale), None if bias is None else per_phase(bias), grid, None)
        object.__setattr__(self, "_inner", inner)  # beside the modules: its tensors are derived from this layer's
        self.record.kernel = self._kernel = f"onednn, {phases} phases"

    def filters(self) -> torch.Tensor:
        rows: torch.Tensor = self.weight_int8.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return rows

    def weight_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def weight(self) -> torch.Tensor:
        """The float weight that the integers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        if kept is not None:
            return kept
        scale = self.weight_scale.view(self.groups, 1, -1, *[1] * len(self.kernel_size))
        weight: torch.Tensor = (self.weight_int8.unflatten(0, (self.groups, -1)) * scale).flatten(0, 1)
        return weight

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Convolve ``[batch, in_channels, *size]`` transposed, in the dtype of ``input``."""
        extra = self.output_padding
        if output_size is not None:
            dims = len(self.kernel_size)
            extra = tuple(
                self._output_padding(
                    input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
                )
            )
        if extra == self.output_padding and not torch.compiler.is_compiling() and self.prefers_floats(input):
            return self.in_floats(input)
        batched = input.dim() == self.weight_int8.dim()
        x = input if batched else input.unsqueeze(0)
        if torch.compiler.is_compiling():
            y = self._side_by_side(self._inner(self._extended(x, extra, 0)), x.shape[2:], extra)
        elif extra == self.output_padding:
            y = self.defer(self.product(self.codes(x), input.dtype))
        else:
            y = self._computed(self.codes(x), extra).to(input.dtype)
        y = y if self.output_quantizer is None else self.output_quantizer(y)
        return y if batched else y.squeeze(0)

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        return self._computed(codes, self.output_padding, activation, out)

    def _computed(
        self,
        codes: torch.Tensor,
        extra: tuple[int, ...],
        activation: Activation = NO_ACTIVATION,
        out: Grid | None = None,
    ) -> torch.Tensor:
        inner, self.record.kernel = self._inner, self._kernel
        extended = self._extended(codes, extra, self.grid.zero_point)
        extended = extended.contiguous(memory_format=_MEMORY.get(codes.dim(), torch.contiguous_format))
        y = inner.compute(extended, inner.epilogue, activation, out)
        return self._side_by_side(y, codes.shape[2:], extra)

    def float_operator(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        function = getattr(torch.nn.functional, f"conv_transpose{len(self.stride)}d")
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        y: torch.Tensor = function(x, weight, bias, *geometry)
        return y

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        return (codes.shape[0], self.out_channels, *self._sizes(codes.shape[2:], self.output_padding))

    def _sizes(self, sizes: Any, extra: tuple[int, ...]) -> list[int]:
        geometry = zip(sizes, self.stride, self.padding, self._reach(), extra, strict=True)
        return [(size - 1) * step - 2 * pad + reach + more for size, step, pad, reach, more in geometry]

    def _reach(self) -> list[int]:
        return [gap * (size - 1) + 1 for gap, size in zip(self.dilation, self.kernel_size, strict=True)]

    def _extended(self, x: torch.Tensor, extra: tuple[int, ...], value: float) -> torch.Tensor:
        """``x`` followed by as many zeros as the wanted size takes more than the inner convolution gives."""
        rows = [
            max(0, -(-(reach + more - pad - kernel * step) // step))
            for reach, more, pad, kernel, step in zip(
                self._reach(), extra, self.padding, self._inner.kernel_size, self.stride, strict=True
            )
        ]
        if not any(rows):
            return x
        return torch.nn.functional.pad(x, [size for count in reversed(rows) for size in (0, count)], value=value)

    def _side_by_side(self, y: torch.Tensor, sizes: Any, extra: tuple[int, ...]) -> torch.Tensor:
        """Lay the phases ``[batch, groups * phases * channels, *size]`` out as ``[batch, out_channels, *size]``."""
        dims = len(self.stride)
        y = y.movedim(1, -1).unflatten(-1, (self.groups, *self.stride, -1))
        # batch, sizes, groups, phases, channels: each size next to its phases, channels innermost
        order = [0, *(axis for d in range(dims) for axis in (1 + d, 2 + dims + d)), 1 + dims, 2 + 2 * dims]
        y = y.permute(order)
        wide = [y.shape[1 + 2 * d] * y.shape[2 + 2 * d] for d in range(dims)]
        y = y.reshape(y.shape[0], *wide, self.out_channels).movedim(-1, 1)
        for d, (start, size) in enumerate(zip(self.padding, self._sizes(sizes, extra), strict=True)):
            y = y.narrow(2 + d, start, size)
        return y

    def multiplications(self, input: torch.Tensor, output: torch.Tensor) -> int:
        """Multiply-accumulates of one call."""
        return input.numel() * math.prod(self.weight_shape()[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_inner"}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare(self.epilogue.bias)


class IntegerConvTranspose1d(IntegerConvTranspose, torch.nn.ConvTranspose1d):  # type: ignore[override, misc]
    """``torch.nn.ConvTranspose1d`` with integer operands."""


class IntegerConvTranspose2d(IntegerConvTranspose, torch.nn.ConvTranspose2d):  # type: ignore[override, misc]
    """``torch.nn.ConvTranspose2d`` with integer operands."""


class IntegerConvTranspose3d(IntegerConvTranspose, torch.nn.ConvTranspose3d):  # type: ignore[override, misc]
    """``torch.nn.ConvTranspose3d`` with integer operands."""


def phase_weight(weight: torch.Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> torch.Tensor:
    """The weight of the ordinary convolution.

    Args:
        weight: ``[in_channels, out_channels / groups, *kernel]``.
        stride: Of the transposed convolution, per dimension.
        dilation: Likewise.
        groups: Groups of channels.

    Returns:
        ``[groups * prod(stride) * out_channels / groups, in_channels / groups, *taps]``, phases before channels.
    """
    dims = len(stride)
    for axis, (step, gap) in enumerate(zip(stride, dilation, strict=True), start=2):
        size = weight.shape[axis]
        taps = -(-(gap * (size - 1) + 1) // step)
        spread = weight.new_zeros(*weight.shape[:axis], taps * step, *weight.shape[axis + 1 :])
        spread.narrow(axis, 0, gap * (size - 1) + 1)[(slice(None),) * axis + (slice(None, None, gap),)] = weight
        weight = spread
    for axis, step in reversed(list(enumerate(stride, start=2))):
        weight = weight.unflatten(axis, (-1, step)).flip(axis)
    # groups, in, out, then taps and phase of each dimension
    weight = weight.unflatten(0, (groups, -1))
    order = [0, *(4 + 2 * d for d in range(dims)), 2, 1, *(3 + 2 * d for d in range(dims))]
    return weight.permute(order).flatten(0, 1 + dims).contiguous()


def require_transposed(layer: Any) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a transposed convolution without an integer kernel."""
    if layer.weight.device.type != "cpu" or not onednn.has_onednn():
        msg = "transposed convolutions need torch's oneDNN operators on a CPU with exact uint8 x int8 products"
        raise UnsupportedOperatorError(msg)
    require_integer(layer.weight_quantizer, layer.weight.shape, channel_dim=1)


_CLASSES: dict[type, type[IntegerConvTranspose]] = {
    QuantizedConvTranspose1d: IntegerConvTranspose1d,
    QuantizedConvTranspose2d: IntegerConvTranspose2d,
    QuantizedConvTranspose3d: IntegerConvTranspose3d,
}
