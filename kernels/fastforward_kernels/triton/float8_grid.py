"""Rounding to the float8 grid on GPUs: by arithmetic, so that it is the same on targets that have no float8."""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import reference
from fastforward_kernels.triton.fake_quantize import _deliver, _into, _planned, block_of, blocks, index_of
from fastforward_kernels.triton.numerics import inverse, round_to_float8, to_dtype

# mantissa bits, smallest normal exponent, largest finite value
FORMATS = {
    torch.float8_e4m3fn: (3, -6, 448.0),
    torch.float8_e5m2: (2, -14, 57344.0),
    torch.float8_e4m3fnuz: (3, -7, 240.0),
    torch.float8_e5m2fnuz: (2, -15, 57344.0),
}


@triton.jit
def float8_grid_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    rows_total,
    columns_total,
    row_length,
    period,
    stride,
    column_length,
    KIND: tl.constexpr,
    RESCALE: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, _ = block_of(rows_total, columns_total, ROWS, COLUMNS)
    offsets, exists = rows * columns_total + columns, (rows < rows_total) & (columns < columns_total)
    index, known = index_of(rows, columns, rows_total, columns_total, row_length, period, stride, column_length, KIND)
    scale = tl.load(scale_ptr + index, mask=known, other=1.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=exists).to(tl.float32)
    rounded = round_to_float8(x * inverse(scale), MANTISSA, SMALLEST_EXPONENT, LARGEST)
    if RESCALE:
        rounded = rounded * scale
    tl.store(out_ptr + offsets, to_dtype(rounded, out_ptr.dtype.element_ty), mask=exists)


def fake_quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int]) -> Tensor:
    """See :func:`reference.fake_quantize_float8`."""
    if _planned(x, scale, None, tile) is None or dtype not in FORMATS:
        return reference.fake_quantize_float8(x, scale, dtype, tile)
    out = torch.empty_like(x)
    buffer = _into(out)
    _launch(x, buffer, scale, dtype, tile, rescale=True)
    return _deliver(out, buffer)


def quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int]) -> Tensor:
    """See :func:`reference.quantize_float8`: the kernel rounds, the conversion afterwards is exact."""
    if _planned(x, scale, None, tile) is None or dtype not in FORMATS:
        return reference.quantize_float8(x, scale, dtype, tile)
    rounded = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _launch(x, rounded, scale, dtype, tile, rescale=False)
    return rounded.to(dtype)


def _launch(x: Tensor, out: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int], *, rescale: bool) -> None:
    matrix = _planned(x, scale, None, tile)
    assert matrix is not None
    grid, constants = blocks(matrix, x.device)
    mantissa, exponent, largest = FORMATS[dtype]
    numbers = {"MANTISSA": mantissa, "SMALLEST_EXPONENT": exponent, "LARGEST": largest, "RESCALE": rescale}
    float8_grid_kernel[grid](x.contiguous(), out, scale.contiguous(), *matrix[1:], **numbers, **constants)
