"""Static int8 matrix products on GPUs: linear, linear that quantizes on the way in, split along k, and batched.

The sums are exact in int32; zero points are taken off afterwards, with the weight's precomputed sums. The tail of ``k``
is masked on the weight's side, so that whatever is loaded for the activation there counts nothing. Unsigned operands
are moved down by 128 in registers, which also halves the registers that sm_8x needs.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import epilogue
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.triton import fake_quantize, launch
from fastforward_kernels.triton.numerics import activated, clamp, finished, inverse, rint, signed

QUANTIZED_ON_THE_WAY = 16  # rows: with more, every tile of columns would quantize the same rows again
SPLIT_BELOW = 64  # rows: with fewer, tiles of the result do not fill a GPU and the inner axis is split


@triton.jit
def tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return this program's tile of the result; neighbours share columns of the weight in the cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width = GROUP_M * tiles_n
    first = program // width * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % width % height, program % width // height


@triton.jit
def quantized(x, x_scale_ptr, x_zero_point_ptr, rows, row_stride, exists, qmin, qmax):
    """Quantize a block of floating activations; elements outside become 0."""
    inv = inverse(tl.load(x_scale_ptr + rows.to(tl.int64) * row_stride))[:, None]
    zero_point = tl.load(x_zero_point_ptr + rows.to(tl.int64) * row_stride).to(tl.float32)[:, None]
    q = rint(clamp(x.to(tl.float32) * inv, qmin - zero_point, qmax - zero_point)) + zero_point
    return tl.where(exists, q, 0.0).to(tl.int32)


@triton.jit
def multiplied(acc, row_sums, x, weight, exists, SUM_ROWS: tl.constexpr):
    """Add one step along the inner axis: the product, and for weights with zero points the sums of the activation."""
    if SUM_ROWS:
        row_sums += tl.sum(tl.where(exists[None, :], x.to(tl.int32), 0), axis=1)
    return tl.dot(x, weight, acc, out_dtype=tl.int32), row_sums


@triton.jit
def epilogue_of(
    acc,
    rows,
    columns,
    exists,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    offsets,
    row_stride,
    column_stride,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
):
    """Rescale, add, activate, convert and store, in the order of ``epilogue.apply``."""
    x_scale = tl.load(x_scale_ptr + rows.to(tl.int64) * row_stride)[:, None]
    y = acc.to(tl.float32) * (x_scale * tl.load(weight_scale_ptr + columns.to(tl.int64) * column_stride)[None, :])
    if BIAS:
        y = y + tl.load(bias_ptr + columns)[None, :]
    if RESIDUAL:
        y = y + tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = activated(y, ACTIVATION)
    y = finished(y, out_scale_ptr, out_zero_point_ptr, out_ptr.dtype.element_ty, REQUANTIZE)
    tl.store(out_ptr + offsets, y, mask=exists)


@triton.jit
def matmul_kernel(
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
    partial_ptr,
    qmin,
    qmax,
    m,
    n,
    k,
    x_batch,
    x_row,
    weight_batch,
    weight_row,
    weight_column,
    row_stride,
    column_stride,
    sums_batch,
    QUANTIZE: tl.constexpr,
    X_ZERO_POINT: tl.constexpr,
    WEIGHT_ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    UNSIGNED_SHIFT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``x [batch, m, k]`` (rows contiguous) by ``weight [batch, n, k]`` with any strides."""
    batch = tl.program_id(2).to(tl.int64)
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns = rows % m, columns % n
    lane = tl.arange(0, BLOCK_K)
    depth = part * BLOCK_K + lane
    x_ptrs = x_ptr + batch * x_batch + safe_rows.to(tl.int64)[:, None] * x_row + depth[None, :]
    weight_ptrs = weight_ptr + batch * weight_batch + safe_columns.to(tl.int64)[None, :] * weight_row
    weight_ptrs += depth[:, None] * weight_column
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    row_sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(part * BLOCK_K, k, BLOCK_K * SPLIT_K):
        exists = lane < k - start
        weight = tl.load(weight_ptrs, mask=exists[:, None], other=0)
        x = tl.load(x_ptrs, mask=exists[None, :], other=0)
        if QUANTIZE:
            q = quantized(x, x_scale_ptr, x_zero_point_ptr, safe_rows, row_stride, exists[None, :], qmin, qmax)
            x8 = (q - UNSIGNED_SHIFT).to(tl.int8)
        else:
            x8 = signed(x)
        acc, row_sums = multiplied(acc, row_sums, x8, weight, exists, WEIGHT_ZERO_POINT)
        x_ptrs += BLOCK_K * SPLIT_K
        weight_ptrs += BLOCK_K * SPLIT_K * weight_column
    if X_ZERO_POINT:
        zero = tl.load(x_zero_point_ptr + safe_rows.to(tl.int64) * row_stride) - UNSIGNED_SHIFT
        if SPLIT_K == 1:  # noqa: SIM114 - known when compiling
            acc -= zero[:, None] * tl.load(sums_ptr + batch * sums_batch + safe_columns)[None, :]
        elif part == 0:
            acc -= zero[:, None] * tl.load(sums_ptr + batch * sums_batch + safe_columns)[None, :]
    if WEIGHT_ZERO_POINT:
        acc -= row_sums[:, None] * tl.load(weight_zero_point_ptr + safe_columns.to(tl.int64) * column_stride)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    offsets = (batch * m + rows.to(tl.int64))[:, None] * n + columns[None, :]
    if SPLIT_K > 1:
        tl.atomic_add(partial_ptr + offsets, acc, mask=inside, sem="relaxed")
    else:
        epilogue_of(
            acc,
            safe_rows,
            safe_columns,
            inside,
            x_scale_ptr,
            weight_scale_ptr,
            bias_ptr,
            residual_ptr,
            out_ptr,
            out_scale_ptr,
            out_zero_point_ptr,
            offsets,
            row_stride,
            column_stride,
            BIAS,
            RESIDUAL,
            ACTIVATION,
            REQUANTIZE,
        )


@triton.jit
def finish_kernel(
    partial_ptr,
    out_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    m,
    n,
    row_stride,
    column_stride,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of a product that was split along k."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (rows < m)[:, None] & (columns < n)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
    acc = tl.load(partial_ptr + offsets, mask=exists, other=0)
    epilogue_of(
        acc,
        rows % m,
        columns % n,
        exists,
        x_scale_ptr,
        weight_scale_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        out_scale_ptr,
        out_zero_point_ptr,
        offsets,
        row_stride,
        column_stride,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        REQUANTIZE,
    )


def _run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    activation_grid: tuple[Any, ...],
    weight_grid: tuple[Any, ...],
    after: tuple[Any, ...],
    grid_of_x: tuple[int, int] | None = None,
) -> None:
    """Launch over ``x [batch, m, k]`` and ``weight [batch, n, k]`` (strided); ``out`` holds ``batch * m`` rows."""
    x_scale, x_zero_point = activation_grid
    weight_scale, weight_zero_point, sums = weight_grid
    bias, residual, activation, _, out_scale, out_zero_point = after
    batch, m, k = x.shape
    n = weight.shape[1]
    x = x if x.stride(2) == 1 else x.contiguous()
    grid, constants = blocks(batch, m, n, k, x.device)
    split = grid[1]
    shift = 128 if x.dtype == torch.uint8 or (grid_of_x is not None and grid_of_x[0] >= 0) else 0
    has_zero = x_zero_point is not None or shift != 0
    if x_zero_point is None:
        x_zero_point = torch.zeros_like(x_scale, dtype=torch.int32)
    if out_scale is not None and out_zero_point is None:
        out_zero_point = torch.zeros_like(out_scale, dtype=torch.int32)
    flags = {
        "BIAS": bias is not None, "RESIDUAL": residual is not None,
        "ACTIVATION": activation, "REQUANTIZE": out_scale is not None,
    }  # fmt: skip
    strides = (int(x_scale.numel() > 1), int(weight_scale.numel() > 1))
    unused = x_scale  # stands in for tensors that are absent; the flags keep it from being read
    present = [unused if tensor is None else tensor for tensor in (bias, residual, out_scale, out_zero_point)]
    if residual is not None:
        present[1] = residual.contiguous()
    partial = torch.zeros((m, n), dtype=torch.int32, device=x.device) if split > 1 else unused
    zero_points = (x_zero_point, weight_scale, unused if weight_zero_point is None else weight_zero_point, sums)
    matmul_kernel[grid](
        x, weight, out, x_scale, *zero_points, *present, partial, *map(float, grid_of_x or (0, 0)),
        m, n, k, x.stride(0), x.stride(1), *weight.stride(), *strides, n if batch > 1 else 0,
        QUANTIZE=grid_of_x is not None, X_ZERO_POINT=has_zero, WEIGHT_ZERO_POINT=weight_zero_point is not None,
        UNSIGNED_SHIFT=shift, **constants, **flags, **launch.EXACT,
    )  # fmt: skip
    if split > 1:
        finish_kernel[(launch.ceil_div(m, 16), launch.ceil_div(n, 128))](
            partial, out, x_scale, weight_scale, *present, m, n, *strides,
            BLOCK_M=16, BLOCK_N=128, **flags, **launch.EXACT,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def blocks(batch: int, m: int, n: int, k: int, device: torch.device) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the launch grid (tiles, parts of the inner axis, batch) and the constants of a product of that size."""
    options = launch.config("int8_matmul", launch.rows_bucket(m), device)
    tiles = launch.ceil_div(m, options["BLOCK_M"]) * launch.ceil_div(n, options["BLOCK_N"])
    split = 1 if batch > 1 else options.get("SPLIT_K") or _splits(m, k, tiles, options, device)
    return (tiles, split, batch), {**options, "SPLIT_K": split}


def _splits(m: int, k: int, tiles: int, options: dict[str, Any], device: torch.device) -> int:
    """Return into how many parts the inner axis is cut so that a small result still fills the GPU."""
    if m > SPLIT_BELOW:
        return 1
    wanted = launch.compute_units(device) // max(tiles, 1)
    return max(1, min(wanted, launch.ceil_div(k, options["BLOCK_K"]), 16))


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    *after: Any,
) -> Tensor:
    """See :func:`reference_matmul.int8_linear`."""
    return _linear(x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, weight_sums, after, None)


def int8_linear_quantizing(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    qmin: int,
    qmax: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    *after: Any,
) -> Tensor:
    """See :func:`reference_matmul.int8_linear_quantizing`."""
    factors = (weight, weight_scale, weight_zero_point, weight_sums)
    if x.numel() > QUANTIZED_ON_THE_WAY * x.shape[-1]:
        dtype = torch.uint8 if qmin >= 0 else torch.int8
        scale, zero_point = _matching(x_scale, x_zero_point)
        assert zero_point is not None
        tile = [] if scale.numel() == 1 else [1] * (x.dim() - 1) + [-1]
        codes = fake_quantize.quantize(x, scale, zero_point, qmin, qmax, dtype, tile)
        return _linear(codes, scale, zero_point, *factors, after, None)
    return _linear(x, x_scale, x_zero_point, *factors, after, (qmin, qmax))


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    after: tuple[Any, ...],
    limits: tuple[int, int] | None,
) -> Tensor:
    _, _, activation, out_dtype, out_scale, _ = after
    epilogue.check(activation, out_dtype, out_scale)
    n, k = weight.shape
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    shape = (*x.shape[:-1], n)
    if not rows.numel() or not n:
        factors = (x_scale, x_zero_point, weight, weight_scale, weight_zero_point, weight_sums)
        return reference.int8_linear(rows.to(torch.int8), *factors, *after).reshape(shape)
    out = torch.empty(shape, dtype=out_dtype, device=x.device)
    activation_grid = _matching(x_scale, x_zero_point)
    weight_grid = (weight_scale, weight_zero_point, weight_sums)
    _run(rows[None], weight.contiguous()[None], out, activation_grid, weight_grid, after, limits)
    return out


def _matching(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give a zero point as many elements as its scale has, both in one contiguous axis."""
    if scale.dim() <= 1 and scale.is_contiguous() and (zero_point is None or zero_point.shape == scale.shape):
        return scale, None if zero_point is None else zero_point.contiguous()
    if zero_point is None or zero_point.numel() == scale.numel():
        return scale.reshape(-1).contiguous(), None if zero_point is None else zero_point.reshape(-1).contiguous()
    count = max(scale.numel(), zero_point.numel())
    return scale.reshape(-1).expand(count).contiguous(), zero_point.reshape(-1).expand(count).contiguous()


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """See :func:`reference_matmul.int8_matmul`; ``b`` is read through its strides, its column sums are taken first."""
    epilogue.check("none", out_dtype, out_scale)
    if not a.numel() * b.numel():
        out = (out_dtype, out_scale, out_zero_point)
        return reference.int8_matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, *out)
    zero = b_zero_point
    if b.dtype == torch.uint8:
        b = (b ^ 128).view(torch.int8)
        zero = (zero if zero is not None else torch.zeros_like(b_scale, dtype=torch.int32)) - 128
    sums = b.sum(1, dtype=torch.int32)
    if zero is not None:
        sums = sums - b.shape[1] * zero.reshape(())
    out_tensor = torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=out_dtype, device=a.device)
    after = (None, None, "none", out_dtype, out_scale, out_zero_point)
    weight_grid = (b_scale.reshape(1), None if zero is None else zero.reshape(1), sums.contiguous())
    _run(a, b.transpose(1, 2), out_tensor, _matching(a_scale, a_zero_point), weight_grid, after)
    return out_tensor
