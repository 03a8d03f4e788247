"""The gradients of fake-quantize from its input, for CPUs: clipped straight-through, and LSQ's to scale and zero point.

Where only the input learns, :func:`cpu_fake_quantize.zero_clipped` is what runs; these are for learnt parameters, for
compiled graphs and for float8 grids.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastforward_kernels import memory
from fastforward_kernels.cpu_fake_quantize import chunks_with_grid, clip, gate
from fastforward_kernels.cpu_sweep import Parameter, Sweep, scratch

INSIDE = (-0.5, 0.5)  # what an excess of zero lies in


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> Tensor:
    """See :func:`reference.fake_quantize_backward`."""
    out = memory.empty_like(x)
    if not x.numel():
        return out
    sweep = Sweep(tuple(x.shape), tile, like=out)
    views = [sweep.view(tensor) for tensor in (x, grad, out)]
    for *piece, _ in chunks_with_grid(sweep, views, (scale, zero_point, qmin, qmax)):
        _pass_inside(*piece)
    return out


def _pass_inside(x: Tensor, grad: Tensor, out: Tensor, inverse: Tensor, low: Parameter, high: Parameter) -> None:
    v = scratch(0, x)
    direct = x.dtype == grad.dtype == torch.float32
    torch.mul(x if x.dtype == torch.float32 else v.copy_(x), inverse, out=v)
    buffer = out if direct else scratch(1, grad)
    numbers = isinstance(low, float) and isinstance(high, float)
    gated, bounds = (v, _open_interval(low, high)) if numbers else (_excess(v, low, high)[0], INSIDE)
    gate(grad if direct else buffer.copy_(grad), gated, bounds, out=buffer)
    if not direct:
        out.copy_(buffer)


@functools.lru_cache
def _open_interval(low: float, high: float) -> tuple[float, float]:
    """Return the open interval of values that round into ``[low, high]``.

    A tie goes to the even neighbour, so an even bound takes the tie beside it in.
    """
    below, above = np.float32(low - 0.5), np.float32(high + 0.5)
    if low % 2 == 0:
        below = np.nextafter(below, np.float32(-np.inf))
    if high % 2 == 0:
        above = np.nextafter(above, np.float32(np.inf))
    return float(below), float(above)


def _excess(v: Tensor, low: Parameter, high: Parameter) -> tuple[Tensor, Tensor]:
    """Return how far ``rint(v)`` lies outside its bounds (zero inside, NaN for NaN), and ``rint(v)`` clamped."""
    rounded = torch.round(v, out=scratch(2, v))
    clamped = clip(rounded, low, high, out=scratch(3, v))
    return rounded.sub_(clamped), clamped


def fake_quantize_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`reference.fake_quantize_lsq_backward`, in chunks; chunk sums are added in float64."""
    out = memory.empty_like(x)
    sweep = Sweep(tuple(x.shape), tile)
    sums = torch.zeros(2, *sweep.layout.parameters, dtype=torch.float64)
    if x.numel():
        target = sweep.view(out)
        views = [sweep.view(x), sweep.view(grad), target]
        for piece in chunks_with_grid(sweep, views, (scale, zero_point, qmin, qmax), [sums[0], sums[1]]):
            _lsq_chunk(*piece)
        sweep.write_back(out, target)
    to_zero_point = sums[1] * -sweep.factor("scale", scale).double()
    return out, _per_parameter(sums[0], scale), _per_parameter(to_zero_point, zero_point)


def _lsq_chunk(
    x: Tensor,
    grad: Tensor,
    result: Tensor,
    inv: Tensor,
    low: Parameter,
    high: Parameter,
    _step: Tensor,
    to_scale: Tensor,
    clipped: Tensor,
) -> None:
    """Write the gradient to ``x`` and add this chunk's terms to the sums of its blocks."""
    v = scratch(0, x).copy_(x)
    g = grad if grad.dtype == torch.float32 else scratch(1, grad).copy_(grad)
    excess, offset = _excess(v.mul_(inv), low, high)
    passed = scratch(4, v)
    gate(g, excess, INSIDE, out=passed)
    result.copy_(passed)
    clipped.add_(torch.sub(g, passed, out=passed).sum_to_size(clipped.shape))
    gate(v, excess, INSIDE, out=passed)
    to_scale.add_(offset.sub_(passed).mul_(g).sum_to_size(to_scale.shape))


def _per_parameter(sums: Tensor, parameter: Tensor) -> Tensor:
    total = sums.reshape(-1) if parameter.numel() == sums.numel() else sums.sum()
    return total.to(torch.float32).reshape(parameter.shape)
