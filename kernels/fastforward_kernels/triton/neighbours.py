"""The operators between the big ones on GPUs: 8-bit integers in and out, one pass each.

Statistics of a normalization are sums of integers (int64), so that the order of the sum does not matter.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import reference_neighbours as reference
from fastforward_kernels.triton import launch
from fastforward_kernels.triton.numerics import activated, finished

LONGEST_ROW = 16384  # a row is held in registers


@triton.jit
def real(ptr, offsets, exists, scale_ptr, zero_point_ptr):
    q = tl.load(ptr + offsets, mask=exists, other=0).to(tl.float32)
    return (q - tl.load(zero_point_ptr).to(tl.float32)) * tl.load(scale_ptr)


@triton.jit
def pair_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    a_zero_point_ptr,
    b_scale_ptr,
    b_zero_point_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    total,
    MULTIPLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < total
    if MULTIPLY:
        a = tl.load(a_ptr + offsets, mask=exists, other=0).to(tl.float32) - tl.load(a_zero_point_ptr).to(tl.float32)
        b = tl.load(b_ptr + offsets, mask=exists, other=0).to(tl.float32) - tl.load(b_zero_point_ptr).to(tl.float32)
        y = a * b * (tl.load(a_scale_ptr) * tl.load(b_scale_ptr))
    else:
        y = real(a_ptr, offsets, exists, a_scale_ptr, a_zero_point_ptr)
        y = y + real(b_ptr, offsets, exists, b_scale_ptr, b_zero_point_ptr)
    y = finished(activated(y, ACTIVATION), out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
    tl.store(out_ptr + offsets, y, mask=exists)


@triton.jit
def lookup_kernel(x_ptr, table_ptr, out_ptr, total, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < total
    place = tl.load(x_ptr + offsets, mask=exists, other=0).to(tl.int32) + SHIFT
    tl.store(out_ptr + offsets, tl.load(table_ptr + place, mask=exists), mask=exists)


@triton.jit
def embedding_kernel(
    indices_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    width,
    PER_ROW: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < width
    index = tl.load(indices_ptr + row)
    q = tl.load(weight_ptr + index * width + columns, mask=exists, other=0).to(tl.float32)
    y = (q - tl.load(zero_point_ptr + index * PER_ROW).to(tl.float32)) * tl.load(scale_ptr + index * PER_ROW)
    y = finished(y, out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
    tl.store(out_ptr + row * width + columns, y, mask=exists)


@triton.jit
def norm_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    weight_ptr,
    bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    width,
    eps,
    CENTRE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Layer norm (CENTRE) or RMS norm of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < width
    q = tl.load(x_ptr + row * width + columns, mask=exists, other=0).to(tl.int32) - tl.load(zero_point_ptr)
    q = tl.where(exists, q, 0)
    second = tl.sum((q * q).to(tl.int64), axis=0)
    mean = 0.0
    if CENTRE:
        first = tl.sum(q.to(tl.int64), axis=0)
        spread = (second * width - first * first).to(tl.float32)
        mean = tl.math.div_rn(first.to(tl.float32), width.to(tl.float32))
        variance = tl.math.div_rn(spread, width.to(tl.float32) * width.to(tl.float32))
    else:
        variance = tl.math.div_rn(second.to(tl.float32), width.to(tl.float32))
    scale = tl.load(scale_ptr)
    deviation = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + tl.math.div_rn(eps, scale * scale)))
    y = (q.to(tl.float32) - mean) * deviation
    if WEIGHT:
        y = y * tl.load(weight_ptr + columns, mask=exists, other=0.0)
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=exists, other=0.0)
    y = finished(y, out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
    tl.store(out_ptr + row * width + columns, y, mask=exists)


@triton.jit
def softmax_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    width,
    REQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < width
    q = tl.load(x_ptr + row * width + columns, mask=exists, other=0).to(tl.int32)
    q = tl.where(exists, q, -1000000)
    shifted = (q - tl.max(q, axis=0)).to(tl.float32) * tl.load(scale_ptr)
    weights = tl.where(exists, tl.exp(shifted), 0.0)
    y = tl.math.div_rn(weights, tl.sum(weights, axis=0))
    y = finished(y, out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
    tl.store(out_ptr + row * width + columns, y, mask=exists)


@triton.jit
def pool_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    total,
    height,
    width,
    height_out,
    width_out,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    MEAN: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``x [planes, h, w]``: the mean of each window requantized, or its largest integer on the same grid."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < total
    left = offsets % width_out * stride_w - pad_w
    top = offsets // width_out % height_out * stride_h - pad_h
    plane = offsets // width_out // height_out
    zero = tl.load(zero_point_ptr)
    result = tl.full((BLOCK,), 0 if MEAN else -1000, dtype=tl.int32)
    for window in range(KERNEL_H * KERNEL_W):
        y = top + window // KERNEL_W
        x = left + window % KERNEL_W
        inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        q = tl.load(x_ptr + (plane * height + y) * width + x, mask=inside, other=0).to(tl.int32)
        if MEAN:
            result += tl.where(inside, q - zero, 0)
        else:
            result = tl.maximum(result, tl.where(inside, q, -1000))
    if MEAN:
        value = result.to(tl.float32) * tl.math.div_rn(tl.load(scale_ptr), KERNEL_H * KERNEL_W * 1.0)
        value = finished(value, out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
        tl.store(out_ptr + offsets, value, mask=exists)
    else:
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=exists)


def _zero(zero_point: Tensor | None, scale: Tensor) -> Tensor:
    return torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point


def _out(out: tuple[Any, ...], unused: Tensor) -> tuple[torch.dtype, tuple[Tensor, Tensor], dict[str, bool]]:
    """Return the result's type, its grid's tensors (stand-ins if it has none) and the flag that goes with them."""
    dtype, scale, zero_point = out
    if scale is None:
        return dtype, (unused, unused), {"REQUANTIZE": False}
    return dtype, (scale, _zero(zero_point, scale)), {"REQUANTIZE": True}


def _elementwise(total: int, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
    options = launch.config("neighbours", "any", device)
    return (launch.ceil_div(total, options["BLOCK"]),), {**options, **launch.EXACT}


def add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    activation: str,
    *out: Any,
) -> Tensor:
    """See :func:`reference_neighbours.add`."""
    return _pair((a, a_scale, a_zero_point), (b, b_scale, b_zero_point), activation, False, out)


def mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    *out: Any,
) -> Tensor:
    """See :func:`reference_neighbours.mul`."""
    return _pair((a, a_scale, a_zero_point), (b, b_scale, b_zero_point), "none", True, out)


def _pair(
    left: tuple[Tensor, Tensor, Tensor | None],
    right: tuple[Tensor, Tensor, Tensor | None],
    activation: str,
    multiply: bool,
    out: tuple[Any, ...],
) -> Tensor:
    a, b = torch.broadcast_tensors(left[0], right[0])
    dtype, grid_tensors, flag = _out(out, left[1])
    y = torch.empty(a.shape, dtype=dtype, device=a.device)
    if y.numel():
        grid, options = _elementwise(y.numel(), a.device)
        grids = (left[1], _zero(left[2], left[1]), right[1], _zero(right[2], right[1]))
        pair_kernel[grid](
            a.contiguous(), b.contiguous(), y, *grids, *grid_tensors, y.numel(),
            MULTIPLY=multiply, ACTIVATION=activation, **flag, **options,
        )  # fmt: skip
    return y


def concat(tensors: Sequence[Tensor], scales: Tensor, zero_points: Tensor, dim: int, *out: Any) -> Tensor:
    """See :func:`reference_neighbours.concat`: requantized one by one (adding zero), then joined."""
    zero, one = torch.zeros((), dtype=torch.int32, device=scales.device), torch.ones((), device=scales.device)
    parts = []
    for q, scale, zero_point in zip(tensors, scales.unbind(), zero_points.unbind(), strict=True):
        parts.append(_pair((q, scale, zero_point), (q.new_zeros(()), one, zero), "none", False, out))
    return torch.cat(parts, dim)


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """See :func:`reference_neighbours.lookup`."""
    y = torch.empty(x.shape, dtype=table.dtype, device=x.device)
    if y.numel():
        grid, options = _elementwise(y.numel(), x.device)
        shift = 128 if x.dtype == torch.int8 else 0
        lookup_kernel[grid](x.contiguous(), table.contiguous(), y, y.numel(), SHIFT=shift, **options)
    return y


def embedding(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *out: Any) -> Tensor:
    """See :func:`reference_neighbours.embedding`."""
    zeros = _zero(zero_point, scale)
    if scale.numel() != zeros.numel():
        return reference.embedding(indices, weight, scale, zero_point, *out)
    dtype, grid_tensors, flag = _out(out, scale)
    width = weight.shape[1]
    y = torch.empty((*indices.shape, width), dtype=dtype, device=weight.device)
    if y.numel():
        _, options = _elementwise(width, weight.device)
        options["BLOCK"] = min(options["BLOCK"], launch.power_of_two(width))
        grid = (indices.numel(), launch.ceil_div(width, options["BLOCK"]))
        tensors = (indices.contiguous(), weight.contiguous(), y, scale.contiguous(), zeros.contiguous())
        embedding_kernel[grid](*tensors, *grid_tensors, width, PER_ROW=int(scale.numel() > 1), **flag, **options)
    return y


def layer_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *out: Any,
) -> Tensor:
    """See :func:`reference_neighbours.layer_norm`."""
    if x.shape[-1] > LONGEST_ROW:
        return reference.layer_norm(x, x_scale, x_zero_point, weight, bias, eps, *out)
    return _norm(x, x_scale, x_zero_point, weight, bias, eps, True, out)


def rms_norm(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor | None, eps: float, *out: Any
) -> Tensor:
    """See :func:`reference_neighbours.rms_norm`."""
    if x.shape[-1] > LONGEST_ROW:
        return reference.rms_norm(x, x_scale, x_zero_point, weight, eps, *out)
    return _norm(x, x_scale, x_zero_point, weight, None, eps, False, out)


def _norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    out: tuple[Any, ...],
) -> Tensor:
    dtype, grid_tensors, flag = _out(out, x_scale)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        width = x.shape[-1]
        scaling = (x_scale if weight is None else weight.contiguous(), x_scale if bias is None else bias.contiguous())
        norm_kernel[(x.numel() // width,)](
            x.contiguous(), y, x_scale, _zero(x_zero_point, x_scale), *scaling, *grid_tensors, width, eps,
            CENTRE=centre, WEIGHT=weight is not None, BIAS=bias is not None, **flag,
            BLOCK=launch.power_of_two(width), num_warps=_warps(width), **launch.EXACT,
        )  # fmt: skip
    return y


def _warps(width: int) -> int:
    """Return the warps of a program that holds a row in registers; with 4 a row of 1024 spills on sm_89."""
    return 4 if width <= 512 else 8


def softmax(x: Tensor, x_scale: Tensor, *out: Any) -> Tensor:
    """See :func:`reference_neighbours.softmax`."""
    width = x.shape[-1]
    if width > LONGEST_ROW:
        return reference.softmax(x, x_scale, *out)
    dtype, grid_tensors, flag = _out(out, x_scale)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        constants = {"BLOCK": launch.power_of_two(width), "num_warps": _warps(width), **flag, **launch.EXACT}
        softmax_kernel[(x.numel() // width,)](x.contiguous(), y, x_scale, *grid_tensors, width, **constants)
    return y


def max_pool2d(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """See :func:`reference_neighbours.max_pool2d`."""
    unused = torch.zeros((), dtype=torch.int32, device=x.device)
    return _pool(x, (unused, unused), kernel_size, stride, padding, False, (x.dtype, None, None))


def avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *out: Any,
) -> Tensor:
    """See :func:`reference_neighbours.avg_pool2d`."""
    return _pool(x, (x_scale, _zero(x_zero_point, x_scale)), kernel_size, stride, padding, True, out)


def _pool(
    x: Tensor,
    grid_of_x: tuple[Tensor, Tensor],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mean: bool,
    out: tuple[Any, ...],
) -> Tensor:
    height, width = x.shape[-2:]
    sizes = zip((height, width), kernel_size, stride, padding, strict=True)
    size = [(length + 2 * p - k) // s + 1 for length, k, s, p in sizes]
    dtype, grid_tensors, flag = _out(out, grid_of_x[0])
    y = torch.empty((*x.shape[:-2], *size), dtype=dtype, device=x.device)
    if y.numel():
        grid, options = _elementwise(y.numel(), x.device)
        geometry = (y.numel(), height, width, *size, *stride, *padding)
        constants = {"KERNEL_H": kernel_size[0], "KERNEL_W": kernel_size[1], "MEAN": mean}
        pool_kernel[grid](x.contiguous(), y, *grid_of_x, *grid_tensors, *geometry, **constants, **flag, **options)
    return y
