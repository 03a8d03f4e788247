"""Float8 and weight-only linear on CPUs: ATen's int4 kernel for bfloat16 activations, else converted and multiplied.

ATen multiplies no float8 on CPUs, and its int4 kernel is scalar code for other activations: there the weight is made
real first, bit for bit as the reference does it, in chunks that stay in the cache.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from fastforward_kernels import memory, packing
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.cpu_sweep import CHUNK, scratch

PACKS = packing.PackCache()
GROUPS = (32, 64, 128, 256)  # what ATen's kernel is written for
MIDDLE = 8  # ATen's kernel computes (q - 8) * scale + zero
CONVERT = "_convert_weight_to_int4pack_for_cpu"


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    """See :func:`reference_matmul.weight_only_linear`; scales are rounded to bfloat16 with bfloat16 activations."""
    n = weight.shape[0]
    fits = weight.dtype == torch.uint8 and x.dtype == torch.bfloat16 and group_size in GROUPS and n % 16 == 0
    if not fits or not x.numel() or not hasattr(torch.ops.aten, CONVERT):
        real = dequantized(weight, scale, zero_point, group_size, x.dtype)
        return functional.linear(x, real, bias)
    packed = PACKS.get(weight, "int4", lambda: getattr(torch.ops.aten, CONVERT)(_integers(weight), 2))
    # the key holds the zero point's number, the value the tensor itself, so that the number stays its own
    _, grid = PACKS.get(scale, id(zero_point), lambda: (zero_point, _scale_and_zero(scale, zero_point)))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, grid)
    y = y if bias is None else y.add_(bias)
    return y.reshape(*x.shape[:-1], n)


def _integers(weight: Tensor) -> Tensor:
    return packing.unpack_weight_only(weight).to(torch.int32)


def _scale_and_zero(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return bfloat16 ``[groups, n, 2]``: the scale, and the real value of the integer 8."""
    middle = scale * MIDDLE if zero_point is None else (MIDDLE - zero_point) * scale
    return torch.stack((scale.t(), middle.t()), dim=-1).to(torch.bfloat16).contiguous()


def dequantized(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """See :func:`reference_matmul.dequantized`."""
    groups = scale.shape[1]
    out = memory.mapped(torch.empty(weight.shape[0], groups, group_size, dtype=dtype))
    rows = max(1, CHUNK // max(groups * group_size, 1))
    zeros = [None] * len(weight.split(rows)) if zero_point is None else zero_point.unsqueeze(-1).split(rows)
    pieces = zip(weight.split(rows), scale.unsqueeze(-1).split(rows), zeros, out.split(rows), strict=True)
    for packed, step, zero, target in pieces:
        values = target if dtype == torch.float32 else scratch(0, target)
        values.copy_(_bytes(packed).view(target.shape))
        if zero is not None:
            values.sub_(zero)
        values.mul_(step)
        if values is not target:
            target.copy_(values)
    return out.view(weight.shape[0], -1)


def _bytes(packed: Tensor) -> Tensor:
    """Return the integers of a packed weight, one a byte: both halves of a byte at once, each moved to its own."""
    if packed.dtype == torch.int8:
        return packed
    pair = packed.to(torch.int16)
    return pair.bitwise_or_(pair << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def float8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See :func:`reference_matmul.float8_linear`."""
    y = _float32(x).reshape(-1, x.shape[-1]) @ _float32(weight).t()
    y.mul_(reference.column(x_scale)).mul_(weight_scale.reshape(-1))
    if bias is not None:
        y = y.add_(bias) if bias.dtype == torch.float32 else y + bias
    return y.to(out_dtype).reshape(*x.shape[:-1], weight.shape[0])


def _float32(q: Tensor) -> Tensor:
    """Convert float8; ATen's conversion is fast for e5m2 (the upper half of float16), others are looked up."""
    if q.dtype == torch.float8_e5m2 or not q.numel():
        return q.to(torch.float32)
    out = memory.mapped(torch.empty(q.shape, dtype=torch.float32))
    table = _table(q.dtype)
    places = q.contiguous().view(torch.uint8).view(-1)
    for piece, target in zip(places.split(CHUNK), out.view(-1).split(CHUNK), strict=True):
        torch.index_select(table, 0, piece.to(torch.int32), out=target)
    return out


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """Return the 256 numbers of a float8 type, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
