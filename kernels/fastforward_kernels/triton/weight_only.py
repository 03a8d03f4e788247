"""Floating activations by int4 or int8 weights, dequantized in registers.

Four-bit integers become floats without a conversion instruction: put into the mantissa of 2**23, they are the number
2**23 + q, and subtracting 2**23 + zero_point is exact. The two halves of a byte are neighbouring columns, so that
joining them needs no shuffle.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D103 - kernels: Triton reads annotations itself
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.triton import launch
from fastforward_kernels.triton.int8_matmul import tile_of
from fastforward_kernels.triton.numerics import INTERPRETED, to_dtype

DEQUANTIZED_ROWS = 128  # with more, the plain product of a dequantized weight is faster than one that does both
VECTOR_ROWS = 4  # with so few rows the weight is read once per row: the matrix unit would not pay


@triton.jit
def as_float(q):
    """Return small unsigned integers plus 2**23 as float32, exactly and without a conversion."""
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def weight_only_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    m,
    n,
    k,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``x [m, k]`` by ``weight [n, k]`` (or ``[n, k / 2]``); a block along k lies in one group."""
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns = (rows % m).to(tl.int64), (columns % n).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_rows[:, None] * k + depth[None, :]
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = tl.arange(0, BLOCK_K // PER_BYTE)
    weight_ptrs = weight_ptr + safe_columns[:, None] * (k // PER_BYTE) + byte[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_ptrs)
        packed = tl.load(weight_ptrs)
        place = safe_columns * groups + start // GROUP_SIZE
        scale = tl.load(scale_ptr + place)
        zero_point = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if ZERO_POINT:
            zero_point = tl.load(zero_point_ptr + place).to(tl.float32)
        if BITS == 4:
            low = as_float(packed & 15)
            high = as_float(packed >> 4)
            values = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)) - (8388608.0 + zero_point)[:, None]
        else:
            values = as_float(packed.to(tl.uint8, bitcast=True) ^ 128) - (8388736.0 + zero_point)[:, None]
        weight = to_dtype(values * scale[:, None], x.dtype)
        if INTERPRETED:
            acc = tl.dot(x.to(tl.float32), tl.trans(weight.to(tl.float32)), acc)
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // PER_BYTE
    if BIAS:
        acc += tl.load(bias_ptr + safe_columns)[None, :].to(tl.float32)
    exists = (rows < m)[:, None] & (columns < n)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptr + offsets, to_dtype(acc, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def vector_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    n,
    k,
    stored,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row ``x [k]`` per second program axis: no matrix unit, each group is summed and then scaled once."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_columns, row = (columns % n).to(tl.int64), tl.program_id(1).to(tl.int64)
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUP_SIZE // PER_BYTE
    group, lane = tl.arange(0, GROUPS), tl.arange(0, BYTES)
    byte = group[:, None] * BYTES + lane[None, :]
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, GROUPS), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        known = start // GROUP_SIZE + group < groups
        exists = known[None, :, None]
        place = safe_columns[:, None, None] * stored + (start // PER_BYTE + byte)[None, :, :]
        packed = tl.load(weight_ptr + place, mask=exists, other=0)
        x = tl.load(x_ptr + row * k + start + depth, mask=start + depth < k, other=0.0).to(tl.float32)
        index = safe_columns[:, None] * groups + (start // GROUP_SIZE + group)[None, :]
        scale = tl.load(scale_ptr + index, mask=known[None, :], other=0.0)
        zero_point = tl.zeros((BLOCK_N, GROUPS), dtype=tl.float32)
        if ZERO_POINT:
            zero_point = tl.load(zero_point_ptr + index, mask=known[None, :], other=0).to(tl.float32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x, (GROUPS, BYTES, 2)))
            zero = (8388608.0 + zero_point)[:, :, None]
            products = (as_float(packed & 15) - zero) * even[None, :, :] + (as_float(packed >> 4) - zero) * odd[
                None, :, :
            ]
        else:
            zero = (8388736.0 + zero_point)[:, :, None]
            products = (as_float(packed.to(tl.uint8, bitcast=True) ^ 128) - zero) * tl.reshape(x, (1, GROUPS, BYTES))
        acc += tl.sum(products, axis=2) * scale
    y = tl.sum(acc, axis=1)
    if BIAS:
        y += tl.load(bias_ptr + safe_columns).to(tl.float32)
    tl.store(out_ptr + row * n + columns, to_dtype(y, out_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def dequantize_kernel(
    weight_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight in floats: ``groups`` rows of a matrix, each with its scale, follow one another in memory."""
    BYTES: tl.constexpr = GROUP_SIZE * BITS // 8
    group = tl.program_id(0).to(tl.int64) * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
    exists = group < groups
    packed = tl.load(weight_ptr + group[:, None] * BYTES + tl.arange(0, BYTES)[None, :], mask=exists[:, None], other=0)
    zero = tl.zeros((BLOCK // GROUP_SIZE,), dtype=tl.float32) + (8388608.0 if BITS == 4 else 8388736.0)
    if ZERO_POINT:
        zero += tl.load(zero_point_ptr + group, mask=exists, other=0).to(tl.float32)
    if BITS == 4:
        both = tl.join(as_float(packed & 15), as_float(packed >> 4))
        values = tl.reshape(both, (BLOCK // GROUP_SIZE, GROUP_SIZE)) - zero[:, None]
    else:
        values = as_float(packed.to(tl.uint8, bitcast=True) ^ 128) - zero[:, None]
    values = values * tl.load(scale_ptr + group, mask=exists, other=0.0)[:, None]
    place = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    tl.store(out_ptr + place, to_dtype(values, out_ptr.dtype.element_ty), mask=exists[:, None])


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    """See :func:`reference_matmul.weight_only_linear`."""
    n, k = weight.shape[0], x.shape[-1]
    rows = (x if x.dim() == 2 else x.reshape(-1, k)).contiguous()
    if group_size % 32 or k % group_size or not rows.numel() or not n:
        return reference.weight_only_linear(x, weight, scale, zero_point, group_size, bias)
    m = rows.shape[0]
    if m > DEQUANTIZED_ROWS and x.dtype != torch.float32:
        return torch.nn.functional.linear(x, dequantized(weight, scale, zero_point, group_size, x.dtype), bias)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    tensors = (rows, weight, out, scale, scale if zero_point is None else zero_point, scale if bias is None else bias)
    flags = {
        "BITS": 8 if weight.dtype == torch.int8 else 4, "GROUP_SIZE": group_size,
        "ZERO_POINT": zero_point is not None, "BIAS": bias is not None,
    }  # fmt: skip
    if m <= VECTOR_ROWS and group_size & (group_size - 1) == 0:
        options = launch.config("weight_only", "vector", x.device)
        options["BLOCK_K"] = max(group_size, min(options["BLOCK_K"], launch.power_of_two(k)))
        vector_kernel[(launch.ceil_div(n, options["BLOCK_N"]), m)](
            *tensors, n, k, weight.shape[1], k // group_size, **flags, **options
        )
    else:
        options = launch.config("weight_only", launch.rows_bucket(m), x.device)
        # a block must lie in one group and its length be a power of two: the largest that divides the group
        options["BLOCK_K"] = min(options["BLOCK_K"], group_size & -group_size)
        grid = (launch.ceil_div(m, options["BLOCK_M"]) * launch.ceil_div(n, options["BLOCK_N"]),)
        weight_only_kernel[grid](*tensors, m, n, k, k // group_size, **flags, **options)
    return out


def dequantized(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """See :func:`reference_matmul.dequantized`."""
    if group_size & (group_size - 1) or not weight.numel():
        return reference.dequantized(weight, scale, zero_point, group_size, dtype)
    n, stored = weight.shape
    bits = 8 if weight.dtype == torch.int8 else 4
    out = torch.empty((n, stored * 8 // bits), dtype=dtype, device=weight.device)
    options = launch.config("weight_only", "dequantize", weight.device)
    options["BLOCK"] = max(options["BLOCK"], group_size)
    groups = out.numel() // group_size
    dequantize_kernel[(launch.ceil_div(groups, options["BLOCK"] // group_size),)](
        weight, out, scale, scale if zero_point is None else zero_point, groups,
        BITS=bits, GROUP_SIZE=group_size, ZERO_POINT=zero_point is not None, **options, **launch.EXACT,
    )  # fmt: skip
    return out
