"""Float8 matrix product on GPUs, with the native flavour of each vendor; anything else is left to the reference.

NVIDIA from sm_89 and AMD gfx950 multiply e4m3fn and e5m2; AMD gfx942 multiplies the fnuz flavours only, and would
compute the others in half precision without a word.
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

OCP = (torch.float8_e4m3fn, torch.float8_e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
NATIVE = {"sm_89": OCP, "sm_90": OCP, "sm_100": OCP, "sm_103": OCP, "sm_120": OCP, "gfx950": OCP, "gfx942": FNUZ}
NATIVE["interpreter"] = OCP


@triton.jit
def float8_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    row_stride,
    column_stride,
    BIAS: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``x [m, k]`` by ``weight [n, k]``; sm_90 adds to the float32 sum after IMPRECISE products (0: n/a)."""
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns, depth = rows % m, columns % n, tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_rows.to(tl.int64)[:, None] * k + depth[None, :]
    weight_ptrs = weight_ptr + safe_columns.to(tl.int64)[None, :] * k + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = k - start
        x = tl.load(x_ptrs, mask=depth[None, :] < left, other=0.0)
        weight = tl.load(weight_ptrs, mask=depth[:, None] < left, other=0.0)
        if INTERPRETED:
            acc = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc)
        elif IMPRECISE > 0:
            acc = tl.dot(x, weight, acc, max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    y = acc * tl.load(x_scale_ptr + safe_rows.to(tl.int64) * row_stride)[:, None]
    y = y * tl.load(weight_scale_ptr + safe_columns.to(tl.int64) * column_stride)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + safe_columns)[None, :].to(tl.float32)
    exists = (rows < m)[:, None] & (columns < n)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptr + offsets, to_dtype(y, out_ptr.dtype.element_ty), mask=exists)


def float8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See :func:`reference_matmul.float8_linear`."""
    arch = launch.architecture(x.device)
    native = NATIVE.get(arch, ())
    n, k = weight.shape
    rows = x.reshape(-1, k).contiguous()
    if x.dtype not in native or weight.dtype not in native or not rows.numel() or not n:
        return reference.float8_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    m = rows.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    options = launch.config("float8_matmul", launch.rows_bucket(m), x.device)
    grid = (launch.ceil_div(m, options["BLOCK_M"]) * launch.ceil_div(n, options["BLOCK_N"]),)
    scales = (x_scale.reshape(-1).contiguous(), weight_scale.reshape(-1).contiguous())
    strides = (int(x_scale.numel() > 1), int(weight_scale.numel() > 1))
    tensors = (rows, weight.contiguous(), out, *scales, scales[0] if bias is None else bias)
    float8_kernel[grid](
        *tensors, m, n, k, *strides, BIAS=bias is not None, IMPRECISE=128 if arch == "sm_90" else 0, **options
    )
    return out.reshape(*x.shape[:-1], n)
