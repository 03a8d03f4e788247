"""Fake-quantize for CPUs, forward and backward, by ATen's vectorized operators over chunks that stay in the cache.

Four passes over a chunk (five where zero points differ) cost about as much again as the one over memory: about
twice the time of a memory copy (more for small blocks with zero points of their own), where torch's own operator
(scalar code) takes fifteen to twenty times. For the gradient to the input it keeps which elements were clipped (of
large tensors a byte each, of small ones the excess itself, which saves two passes), and so the input may be changed
afterwards.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import memory, tiling
from fastforward_kernels.cpu_sweep import SINGLE, Parameter, Sweep, scratch

GATE = torch.ops.aten.hardtanh_backward.grad_input
Grid = tuple[Tensor, Parameter, Parameter, Tensor]  # 1 / scale, the bounds without the zero point, scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: Sequence[int],
    gradient_scale: float = 1.0,
) -> Tensor:
    """See :func:`reference.fake_quantize`."""
    del gradient_scale
    out = memory.empty_like(x)
    _run(x, scale, zero_point, qmin, qmax, tile, out, None)
    return out


def fake_quantize_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int], out: Tensor
) -> None:
    """Round ``x`` to the grid into ``out``, which may be ``x`` itself."""
    _run(x, scale, zero_point, qmin, qmax, tile, out, None)


def fake_quantize_with_clipped(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Round ``x`` to the grid; also return what :func:`zero_clipped` takes, which is not zero where it was clipped."""
    kept = torch.float32 if x.dtype == torch.float32 and x.numel() <= SINGLE else torch.bool
    out, clipped = memory.empty_like(x), memory.mapped(torch.empty_like(x, dtype=kept))
    _run(x, scale, zero_point, qmin, qmax, tile, out, clipped)
    return out, clipped


def _run(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: Sequence[int],
    out: Tensor,
    clipped: Tensor | None,
) -> None:
    if not x.numel():
        return
    if _is_single(x, tile) and scale.numel() == zero_point.numel() == 1 and out.is_contiguous():
        inverse, low, high, step = _one_grid(scale, zero_point, qmin, qmax)
        _round_to_grid(x, out, clipped, inverse, low, high, step)
        return
    sweep = Sweep(tuple(x.shape), tile, like=out)
    grid = scale, zero_point, qmin, qmax
    views = [sweep.view(x), sweep.view(out)]
    if clipped is None:
        for source, target, *parameters in chunks_with_grid(sweep, views, grid):
            _round_to_grid(source, target, None, *parameters)
    else:
        for piece in chunks_with_grid(sweep, [*views, sweep.view(clipped)], grid):
            _round_to_grid(*piece)
    sweep.write_back(out, views[1])


def _is_single(x: Tensor, tile: Sequence[int]) -> bool:
    """Return whether a tensor is small and plain enough to skip cutting it."""
    return not tile and x.numel() <= SINGLE and x.is_contiguous()


def _one_grid(scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Grid:
    """Return the grid of a tensor that has one, with as few calls as possible."""
    step = scale if not scale.dim() and scale.dtype == torch.float32 else scale.reshape(()).to(torch.float32)
    z = round(zero_point.item())
    return step.reciprocal(), float(qmin - z), float(qmax - z), step


def chunks_with_grid(
    sweep: Sweep, tensors: Sequence[Tensor], grid: tuple[Tensor, Tensor, int, int], sums: Sequence[Tensor] = ()
) -> Iterator[list[Any]]:
    """Yield aligned pieces of ``tensors``, of the grid's parameters and of ``sums``, which have one entry per block."""
    scale, zero_point, qmin, qmax = grid
    parameters = sweep.factor("scale", scale), _offset(sweep, zero_point)
    for batch in sweep.batches(tensors, [*parameters, *sums]):
        step, offset, *own = batch[len(tensors) :]
        yield from sweep.chunks(batch[: len(tensors)], [*_grid(step, offset, qmin, qmax), *own])


def _offset(sweep: Sweep, zero_point: Tensor) -> Parameter:
    """Return the rounded zero point of every block, or one number if they are the same, as on every symmetric grid."""
    if zero_point.numel() > 1:
        tiling.check_parameter("zero_point", zero_point.numel(), sweep.layout.blocks, sweep.original, sweep.tile)
        least, most = zero_point.aminmax()
        zero_point = least if least.item() == most.item() else zero_point
    offset = sweep.spread("zero_point", torch.round(zero_point) if zero_point.is_floating_point() else zero_point)
    return float(offset) if offset.numel() == 1 else offset


def _grid(step: Tensor, offset: Parameter, qmin: int, qmax: int) -> Grid:
    """Return the grid of blocks; the bounds have the zero point taken off, so that no pass is spent on it.

    Bounds that are the same for all blocks are numbers: clamping by numbers is one pass, clamping by tensors that
    broadcast is two. Tensors are written into buffers: there can be as many parameters as a few chunks have elements,
    and mapping fresh memory for them can take as long as two passes.
    """
    inverse = torch.reciprocal(step, out=scratch(5, step))
    if isinstance(offset, float):
        return inverse, qmin - offset, qmax - offset, step
    z = scratch(6, offset).copy_(offset)
    return inverse, torch.sub(qmin, z, out=scratch(7, z)), torch.sub(qmax, z, out=z), step


def _round_to_grid(
    x: Tensor,
    out: Tensor,
    clipped: Tensor | None,
    inverse: Tensor,
    low: Parameter,
    high: Parameter,
    scale: Tensor,
) -> None:
    direct = x.dtype == torch.float32 == out.dtype
    if clipped is not None and clipped.is_floating_point():
        torch.mul(x, inverse, out=clipped).round_()
        clip(clipped, low, high, out=out)
        clipped.sub_(out)
        out.mul_(scale)
        return
    v = out if direct else scratch(0, x).copy_(x)
    torch.mul(x if direct else v, inverse, out=v)
    v.round_()
    if clipped is None:
        torch.mul(clip(v, low, high, out=v), scale, out=v)
    else:
        q = clip(v, low, high, out=scratch(1, v))
        clipped.copy_(v.sub_(q))
        torch.mul(q, scale, out=v)
    if not direct:
        out.copy_(v)


def clip(v: Tensor, low: Parameter, high: Parameter, *, out: Tensor) -> Tensor:
    """Clamp, NaN staying NaN; ``torch.clamp`` is fast by numbers and by tensors that are not spread inside a row."""
    if isinstance(low, float) and isinstance(high, float):
        return torch.clamp(v, low, high, out=out)
    assert isinstance(low, Tensor)
    assert isinstance(high, Tensor)
    if low.dim() and low.shape[-1] == v.shape[-1] > 1:
        return torch.clamp(v, low, high, out=out)
    return torch.minimum(torch.maximum(v, low, out=out), high, out=out)


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    """Return ``grad`` where ``clipped`` is zero or NaN and zero elsewhere, in the layout of ``clipped``."""
    out = memory.mapped(torch.empty_like(clipped, dtype=grad.dtype))
    mask = clipped.view(torch.uint8) if clipped.dtype == torch.bool else clipped  # torch converts bytes fast
    if _is_single(mask, ()) and grad.is_contiguous():
        _zero_clipped(grad, mask, out)
        return out
    if out.numel():
        sweep = Sweep(tuple(grad.shape), (), like=out)
        for piece in sweep.chunks([sweep.view(grad), sweep.view(mask), sweep.view(out)], ()):
            _zero_clipped(*piece)
    return out


def _zero_clipped(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    excess = mask if mask.dtype == grad.dtype else scratch(0, mask, grad.dtype).copy_(mask)
    gate(grad, excess, (-0.5, 0.5), out=out)


def gate(grad: Tensor, v: Tensor, bounds: tuple[float, float], *, out: Tensor) -> None:
    """Write ``grad`` where ``v`` lies inside the open interval and zero elsewhere, in a single vectorized pass."""
    GATE(grad, v, *bounds, grad_input=out)
