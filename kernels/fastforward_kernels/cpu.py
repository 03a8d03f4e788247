"""Quantize, dequantize and observe on CPUs, by ATen's vectorized ``out=`` operators over chunks that stay in the cache.

One pass over memory per call whatever the granularity, and nothing is allocated but the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastforward_kernels import memory, reference
from fastforward_kernels.cpu_sweep import CHUNK, Sweep, scratch


def fake_quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int]) -> Tensor:
    """See :func:`reference.fake_quantize_float8`."""
    out = memory.empty_like(x)
    if not x.numel():
        return out
    sweep = Sweep(tuple(x.shape), tile, like=out)
    s = sweep.factor("scale", scale)
    largest = torch.finfo(dtype).max
    for piece, result, inv, step in sweep.chunks([sweep.view(x), sweep.view(out)], [s.reciprocal(), s]):
        buffer = scratch(0, piece).copy_(piece).mul_(inv).clamp_(-largest, largest)
        result.copy_(buffer.copy_(buffer.to(dtype)).mul_(step))
    return out


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype, tile: Sequence[int]
) -> Tensor:
    """See :func:`reference.quantize`."""
    reference.refuse_nan(x)
    return quantize_finite(x, scale, zero_point, qmin, qmax, dtype, tile)


def quantize_finite(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype, tile: Sequence[int]
) -> Tensor:
    """Quantize without looking for NaN."""
    out = memory.mapped(torch.empty(x.shape, dtype=dtype))
    if not x.numel():
        return out
    sweep = Sweep(tuple(x.shape), tile)
    s, z = sweep.factor("scale", scale), sweep.number("zero_point", zero_point)
    for piece, result, inv, zero in sweep.chunks([sweep.view(x), sweep.view(out)], [s.reciprocal(), z]):
        buffer = scratch(0, piece)
        torch.mul(piece if piece.dtype == torch.float32 else buffer.copy_(piece), inv, out=buffer)
        result.copy_(buffer.round_().add_(zero).clamp_(qmin, qmax))
    return out


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, tile: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    """See :func:`reference.dequantize`."""
    out = memory.mapped(torch.empty(q.shape, dtype=out_dtype))
    if not q.numel():
        return out
    sweep = Sweep(tuple(q.shape), tile)
    s = sweep.factor("scale", scale)
    z = 0.0 if zero_point is None else sweep.number("zero_point", zero_point)
    for piece, result, step, zero in sweep.chunks([sweep.view(q), sweep.view(out)], [s, z]):
        buffer = result if out_dtype == torch.float32 else scratch(0, result)
        buffer.copy_(piece).sub_(zero).mul_(step)
        if buffer is not result:
            result.copy_(buffer)
    return out


def min_max(x: Tensor, tile: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See :func:`reference.min_max`."""
    if tile or not x.numel():
        return reference.min_max(x, tile)
    low, high = torch.aminmax(x)
    return low.reshape(1), high.reshape(1)


def histogram(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """See :func:`reference.histogram`."""
    if not low < high or bins < 1:
        return reference.histogram(x, low, high, bins)  # explains what is wrong
    reference.refuse_nan(x)
    counts = torch.zeros(bins, dtype=torch.int64)
    for piece in x.reshape(-1).split(CHUNK):
        position = scratch(0, piece).copy_(piece).sub_(low).mul_(bins / (high - low)).clamp_(0, bins - 1)
        counts += torch.bincount(position.to(torch.int32), minlength=bins)
    return counts
