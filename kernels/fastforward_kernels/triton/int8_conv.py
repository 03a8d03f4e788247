"""Static int8 convolution on GPUs as an implicit matrix product over channels-last data; depthwise has its own kernel.

Rows are output positions, columns output channels of one group, and the inner axis runs over the window and the
channels. Positions outside the image are loaded as the activation's zero point, so that the precomputed weight sums
stay right.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import epilogue
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.packing import PackCache
from fastforward_kernels.triton import launch
from fastforward_kernels.triton.int8_matmul import epilogue_of, multiplied
from fastforward_kernels.triton.numerics import signed

WEIGHTS = PackCache()


@triton.jit
def positions(block, total, height_out, width_out, stride_h, stride_w, pad_h, pad_w, BLOCK_M: tl.constexpr):
    """Return output positions [BLOCK_M], their image, and the top left corner of their window."""
    rows = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe = rows % total
    x_out = safe % width_out
    y_out = safe // width_out % height_out
    return rows, safe // width_out // height_out, y_out * stride_h - pad_h, x_out * stride_w - pad_w


@triton.jit
def pixels_under(window, image, top, left, height, width, channels, dilation_h, dilation_w, KERNEL_W: tl.constexpr):
    """Return which positions have a pixel under this place of their window, and where its channels start."""
    y = top + (window // KERNEL_W) * dilation_h
    x = left + (window % KERNEL_W) * dilation_w
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return inside, ((image * height + y) * width + x) * channels


@triton.jit
def conv_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    weight_scale_ptr,
    weight_zero_point_ptr,
    sums_ptr,
    bias_ptr,
    residual_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    total,
    height,
    width,
    channels,
    height_out,
    width_out,
    outputs,
    group_channels,
    group_outputs,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WEIGHT_ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    UNSIGNED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x [batch, h, w, channels]``, ``weight [outputs, kernel_h, kernel_w, channels / groups]``."""
    group = tl.program_id(2).to(tl.int64)
    rows, image, top, left = positions(
        tl.program_id(0), total, height_out, width_out, stride_h, stride_w, pad_h, pad_w, BLOCK_M
    )
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_local = local % group_outputs
    columns = (group * group_outputs).to(tl.int32) + safe_local
    zero = tl.load(x_zero_point_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    row_sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for window in range(KERNEL_H * KERNEL_W):
        inside, pixel = pixels_under(
            window, image, top, left, height, width, channels, dilation_h, dilation_w, KERNEL_W
        )
        pixel += group * group_channels
        weight_row = (columns * (KERNEL_H * KERNEL_W) + window).to(tl.int64) * group_channels
        for start in range(0, group_channels, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            exists = depth < group_channels
            data = tl.load(x_ptr + pixel[:, None] + depth[None, :], mask=inside[:, None] & exists[None, :], other=0)
            data = tl.where(inside[:, None], data, zero.to(data.dtype))
            weight = tl.load(weight_ptr + weight_row[None, :] + depth[:, None], mask=exists[:, None], other=0)
            acc, row_sums = multiplied(acc, row_sums, signed(data), weight, exists, WEIGHT_ZERO_POINT)
    acc -= (zero - UNSIGNED_SHIFT) * tl.load(sums_ptr + columns)[None, :]
    if WEIGHT_ZERO_POINT:
        acc -= row_sums[:, None] * tl.load(weight_zero_point_ptr + columns)[None, :]
    exists_out = (rows < total)[:, None] & (local < group_outputs)[None, :]
    offsets = rows[:, None] * outputs + columns[None, :]
    epilogue_of(
        acc,
        rows % total,
        columns,
        exists_out,
        x_scale_ptr,
        weight_scale_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        out_scale_ptr,
        out_zero_point_ptr,
        offsets,
        0,
        1,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        REQUANTIZE,
    )


@triton.jit
def depthwise_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    weight_scale_ptr,
    weight_zero_point_ptr,
    sums_ptr,
    bias_ptr,
    residual_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    total,
    height,
    width,
    channels,
    height_out,
    width_out,
    outputs,
    group_channels,
    group_outputs,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WEIGHT_ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    UNSIGNED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One input channel per group: no matrix instruction, neighbouring channels in neighbouring lanes."""
    rows, image, top, left = positions(
        tl.program_id(0), total, height_out, width_out, stride_h, stride_w, pad_h, pad_w, BLOCK_M
    )
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_columns = columns % outputs
    source = safe_columns // group_outputs
    zero = tl.load(x_zero_point_ptr)
    weight_zero = tl.zeros((BLOCK_N,), dtype=tl.int32)
    if WEIGHT_ZERO_POINT:
        weight_zero = tl.load(weight_zero_point_ptr + safe_columns)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for window in range(KERNEL_H * KERNEL_W):
        inside, pixel = pixels_under(
            window, image, top, left, height, width, channels, dilation_h, dilation_w, KERNEL_W
        )
        data = tl.load(x_ptr + pixel[:, None] + source[None, :], mask=inside[:, None], other=0).to(tl.int32)
        weight = tl.load(weight_ptr + safe_columns * (KERNEL_H * KERNEL_W) + window).to(tl.int32) - weight_zero
        acc += tl.where(inside[:, None], data - zero, 0) * weight[None, :]
    exists = (rows < total)[:, None] & (columns < outputs)[None, :]
    offsets = rows[:, None] * outputs + columns[None, :]
    epilogue_of(
        acc,
        rows % total,
        safe_columns,
        exists,
        x_scale_ptr,
        weight_scale_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        out_scale_ptr,
        out_zero_point_ptr,
        offsets,
        0,
        1,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        REQUANTIZE,
    )


def _two_dimensional(values: Sequence[int], first: int) -> list[int]:
    return list(values) if len(values) == 2 else [first, *values]


def _channels_last_weight(weight: Tensor) -> Tensor:
    """Return ``weight [outputs, kernel_h, kernel_w, channels / groups]``, contiguous, made once per weight."""
    square = weight if weight.dim() == 4 else weight.unsqueeze(2)
    made: Tensor = WEIGHTS.get(weight, "conv", lambda: square.permute(0, 2, 3, 1).contiguous())
    return made


def int8_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """See :func:`reference_matmul.int8_conv`."""
    epilogue.check(activation, out_dtype, out_scale)
    one_dimensional = x.dim() == 3
    image = x.unsqueeze(2) if one_dimensional else x
    strides, dilations = _two_dimensional(stride, 1), _two_dimensional(dilation, 1)
    pads = _two_dimensional(padding, 0)
    filters = _channels_last_weight(weight)
    outputs, kernel_h, kernel_w, group_channels = filters.shape
    batch, channels, height, width = image.shape
    size = [
        (length + 2 * p - d * (kernel - 1) - 1) // s + 1
        for length, kernel, s, p, d in zip((height, width), (kernel_h, kernel_w), strides, pads, dilations, strict=True)
    ]
    out = torch.empty((batch, *size, outputs), dtype=out_dtype, device=x.device)
    if out.numel():
        unused = x_scale
        missing = x_zero_point is None or (out_zero_point is None and out_scale is not None)
        zeros = torch.zeros((), dtype=torch.int32, device=x.device) if missing else unused
        after = (bias, _channels_last(residual, one_dimensional), out_scale, _or(out_zero_point, zeros))
        _launch(
            (
                image.permute(0, 2, 3, 1).contiguous(), filters, out, x_scale, _or(x_zero_point, zeros),
                weight_scale, _or(weight_zero_point, unused), weight_sums, *(_or(tensor, unused) for tensor in after),
            ),
            (
                batch * size[0] * size[1], height, width, channels, *size, outputs, group_channels, outputs // groups,
                *strides, *pads, *dilations,
            ),
            groups,
            KERNEL_H=kernel_h, KERNEL_W=kernel_w, WEIGHT_ZERO_POINT=weight_zero_point is not None,
            BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
            REQUANTIZE=out_scale is not None, UNSIGNED_SHIFT=128 if x.dtype == torch.uint8 else 0,
        )  # fmt: skip
    y = out.permute(0, 3, 1, 2)
    return reference.channels_last(y.squeeze(2) if one_dimensional else y)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if tensor is None else tensor


def _channels_last(residual: Tensor | None, one_dimensional: bool) -> Tensor | None:
    if residual is None:
        return None
    return (residual.unsqueeze(2) if one_dimensional else residual).permute(0, 2, 3, 1).contiguous()


def _launch(tensors: tuple[Tensor, ...], sizes: tuple[int, ...], groups: int, **constants: Any) -> None:
    total, outputs, group_channels, group_outputs = sizes[0], sizes[6], sizes[7], sizes[8]
    depthwise = group_channels == 1 and groups > 1
    options = launch.config("int8_conv", "depthwise" if depthwise else "any", tensors[0].device)
    columns = outputs if depthwise else group_outputs
    grid = (launch.ceil_div(total, options["BLOCK_M"]), launch.ceil_div(columns, options["BLOCK_N"]))
    kernel = depthwise_kernel if depthwise else conv_kernel
    kernel[(*grid, 1 if depthwise else groups)](*tensors, *sizes, **constants, **options, **launch.EXACT)
