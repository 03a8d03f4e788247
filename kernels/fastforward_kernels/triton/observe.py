"""Observation on GPUs: smallest and largest value, histogram. Partial results per program, no float atomics."""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import reference, tiling
from fastforward_kernels.triton import launch
from fastforward_kernels.triton.fake_quantize import LAYOUT_ROWS, LAYOUT_TILES, Plan, block_of, blocks, plan
from fastforward_kernels.triton.numerics import NAN_STAYS

MOST_BINS = 1 << 16


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=NAN_STAYS)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=NAN_STAYS)


@triton.jit
def min_max_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    rows_total,
    columns_total,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the extremes of rows (KIND 0: ``[rows, column_blocks]``) or columns (``[row_blocks, columns]``)."""
    rows, columns, _ = block_of(rows_total, columns_total, ROWS, COLUMNS)
    exists = (rows < rows_total) & (columns < columns_total)
    x = tl.load(x_ptr + rows * columns_total + columns, mask=exists, other=0.0).to(tl.float32)
    axis: tl.constexpr = 1 if KIND == 0 else 0
    low = tl.reduce(tl.where(exists, x, float("inf")), axis, smaller, keep_dims=True)
    high = tl.reduce(tl.where(exists, x, float("-inf")), axis, larger, keep_dims=True)
    column_blocks = tl.cdiv(columns_total, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    if KIND == 0:
        place, there = rows * column_blocks + program % column_blocks, rows < rows_total
    else:
        place, there = (program // column_blocks) * columns_total + columns, columns < columns_total
    tl.store(low_ptr + place, low, mask=there)
    tl.store(high_ptr + place, high, mask=there)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, total, low, factor, bins, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Add to one of ``COPIES`` rows of counts, so that few programs meet; integers, so their order does not matter."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < total
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    position = tl.minimum(tl.maximum((x - low) * factor, 0.0), bins - 1.0).to(tl.int32)
    place = (program % COPIES) * bins + position
    tl.atomic_add(counts_ptr + place, 1, mask=exists, sem="relaxed")


def min_max(x: Tensor, tile: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See :func:`reference.min_max`."""
    matrix = _matrix(x, tile)
    if matrix is None:
        return reference.min_max(x, tile)
    grid, constants = blocks(matrix, x.device)
    row_blocks = launch.ceil_div(matrix.rows, constants["ROWS"])
    column_blocks = launch.ceil_div(matrix.columns, constants["COLUMNS"])
    by_row = matrix.kind == LAYOUT_ROWS
    shape = (matrix.rows, column_blocks) if by_row else (row_blocks, matrix.columns)
    low, high = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    min_max_kernel[grid](x.contiguous(), low, high, matrix.rows, matrix.columns, **constants)
    if by_row:
        low, high = low.view(-1, matrix.period, column_blocks), high.view(-1, matrix.period, column_blocks)
        return low.amin((0, 2)).to(x.dtype), high.amax((0, 2)).to(x.dtype)
    return low.amin(0).to(x.dtype), high.amax(0).to(x.dtype)


def _matrix(x: Tensor, tile: Sequence[int]) -> Plan | None:
    if not x.numel() or x.dtype == torch.float64:
        return None
    shape, sizes = tuple(x.shape), tuple(tile)
    matrix = plan(shape, sizes, tiling.layout(shape, sizes).blocks)
    return None if matrix is None or matrix.kind == LAYOUT_TILES else matrix


def histogram(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """See :func:`reference.histogram`."""
    if not low < high or bins < 1 or bins > MOST_BINS or x.dtype == torch.float64 or not x.numel():
        return reference.histogram(x, low, high, bins)
    options = launch.config("histogram", "any", x.device)
    counts = torch.zeros((options["COPIES"], bins), dtype=torch.int32, device=x.device)
    numbers = (x.numel(), low, bins / (high - low), bins)
    grid = (launch.ceil_div(x.numel(), options["BLOCK"]),)
    histogram_kernel[grid](x.contiguous(), counts, *numbers, **options, **launch.EXACT)
    return counts.sum(0, dtype=torch.int64)
