"""Elementwise and observing kernels for CPUs: ATen's vectorized ``out=`` operators over chunks that stay in the cache.

One pass over memory per call whatever the granularity: about twice the time of a memory copy, where torch's own
operator (scalar code) takes fifteen to twenty times. Nothing is allocated but the result.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastforward_kernels import memory, reference, tiling

CHUNK = 1 << 17  # float32 elements; 512 KiB stays in a second-level cache
SCRATCH = threading.local()
SINGLE = 2 * CHUNK  # up to here a plain tensor is not cut
Parameter = Tensor | float


def scratch(slot: int, like: Tensor) -> Tensor:
    """Return this thread's float32 buffer number ``slot``, viewed with the shape of ``like``."""
    buffers: dict[Any, Tensor] = SCRATCH.__dict__
    size = like.numel()
    buffer = buffers.get(slot)
    if buffer is None or buffer.numel() < size:
        buffer = buffers[slot] = torch.empty(max(size, SINGLE), dtype=torch.float32)
    return buffer[:size].view(like.shape)


class Sweep:
    """Walks tensors of one shape chunk by chunk, together with the parameters of their blocks."""

    def __init__(self, shape: tuple[int, ...], tile: Sequence[int], like: Tensor | None = None) -> None:
        self.order = _storage_order(like) if like is not None else None
        if self.order is not None and tile:
            tile = [tile[dim] for dim in self.order]
        self.original = shape
        self.shape = shape if self.order is None else tuple(shape[dim] for dim in self.order)
        self.layout = tiling.layout(self.shape, tuple(tile))
        self.tile = tile

    def number(self, name: str, value: Tensor) -> Parameter:
        """Return one number as a float, and one per block as a float32 tensor that broadcasts against the view."""
        return float(value) if value.numel() == 1 else self.factor(name, value)

    def factor(self, name: str, value: Tensor) -> Tensor:
        """Return the float32 tensor that broadcasts against the view; ATen multiplies fastest by one without axes."""
        value = value.detach().to(torch.float32)
        if value.numel() == 1:
            return value.reshape(())
        tiling.check_parameter(name, value.numel(), self.layout.blocks, self.original, self.tile)
        if self.order is not None:
            grid = [0] * len(self.order)
            for position, dim in enumerate(self.order):
                grid[dim] = self.layout.grid[position]
            value = value.reshape(grid).permute(self.order)
        return value.reshape(self.layout.parameters)

    def view(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in the layout's shape; a copy if its memory is not in that order."""
        if self.order is not None:
            tensor = tensor.permute(self.order)
        return tensor.reshape(self.layout.view)

    def chunks(self, tensors: Sequence[Tensor], parameters: Sequence[Parameter]) -> Iterator[list[Any]]:
        """Yield aligned pieces of ``tensors`` (as viewed) and ``parameters``, each of about CHUNK elements."""
        return _chunks(list(tensors), list(parameters))


def _storage_order(x: Tensor) -> tuple[int, ...] | None:
    """Return the axes of ``x`` from the slowest to the fastest, None if that is their order."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim)))


def _chunks(tensors: list[Tensor], parameters: list[Parameter]) -> Iterator[list[Any]]:
    first = tensors[0]
    if first.numel() <= SINGLE:
        yield [*tensors, *parameters]
        return
    length = first.shape[0]
    row = first.numel() // length
    if row > SINGLE and first.dim() > 1:
        for index in range(length):
            rows = [tensor[index] for tensor in tensors]
            yield from _chunks(rows, [_row(parameter, index) for parameter in parameters])
        return
    rows_at_once = max(1, CHUNK // row)
    pieces: list[Any] = [tensor.split(rows_at_once) for tensor in tensors]
    count = len(pieces[0])
    for parameter in parameters:
        if isinstance(parameter, float) or not parameter.dim() or parameter.shape[0] == 1:
            pieces.append([parameter] * count)
        else:
            pieces.append(parameter.split(rows_at_once))
    for piece in zip(*pieces, strict=True):
        yield list(piece)


def _row(parameter: Parameter, index: int) -> Parameter:
    if isinstance(parameter, float) or not parameter.dim():
        return parameter
    return parameter[index if parameter.shape[0] > 1 else 0]


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
    fake_quantize_out(x, scale, zero_point, qmin, qmax, tile, out)
    return out


def fake_quantize_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int], out: Tensor
) -> None:
    """Round ``x`` to the grid into ``out``, which may be ``x`` itself."""
    if not x.numel():
        return
    sweep = Sweep(tuple(x.shape), tile, like=out)
    s, low, high = _grid(sweep, scale, zero_point, qmin, qmax)
    if _is_single(sweep, x):
        _round_to_grid(x, out, s.reciprocal(), low, high, s)
        return
    target = sweep.view(out)
    for piece in sweep.chunks([sweep.view(x), target], [s.reciprocal(), low, high, s]):
        _round_to_grid(*piece)
    _write_back(sweep, out, target)


def _round_to_grid(x: Tensor, out: Tensor, inverse: Tensor, low: Parameter, high: Parameter, scale: Tensor) -> None:
    if x.dtype == torch.float32 == out.dtype:
        torch.mul(x, inverse, out=out)
        _clip(out.round_(), low, high, out=out)
        out.mul_(scale)
        return
    buffer = scratch(0, x).copy_(x).mul_(inverse).round_()
    out.copy_(_clip(buffer, low, high, out=buffer).mul_(scale))


def _write_back(sweep: Sweep, out: Tensor, target: Tensor) -> None:
    """Copy the result if ``out`` could not be viewed (an ``out`` with holes, given by the caller)."""
    if target.data_ptr() != out.data_ptr():
        (out if sweep.order is None else out.permute(sweep.order)).copy_(target.view(sweep.shape))


def _grid(sweep: Sweep, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Parameter, Parameter]:
    """Return scale and the clipping bounds with the zero point taken off, so that no pass is spent on it.

    Bounds that are the same for all blocks, as on every symmetric grid, are numbers: clamping by numbers is three times
    faster than by tensors that broadcast.
    """
    if zero_point.is_floating_point():
        zero_point = torch.round(zero_point)
    if zero_point.numel() > 1 and bool((zero_point == zero_point.reshape(-1)[0]).all()):
        tiling.check_parameter("zero_point", zero_point.numel(), sweep.layout.blocks, sweep.original, sweep.tile)
        zero_point = zero_point.reshape(-1)[0]
    z = sweep.number("zero_point", zero_point)
    return sweep.factor("scale", scale), qmin - z, qmax - z


def _clip(v: Tensor, low: Parameter, high: Parameter, *, out: Tensor) -> Tensor:
    """Clamp, NaN staying NaN; with tensors two passes are faster than ``torch.clamp``'s one."""
    if isinstance(low, float) and isinstance(high, float):
        return torch.clamp(v, low, high, out=out)
    assert isinstance(low, Tensor)
    assert isinstance(high, Tensor)
    return torch.minimum(torch.maximum(v, low, out=out), high, out=out)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> Tensor:
    """See :func:`reference.fake_quantize_backward`."""
    out = memory.empty_like(x)
    if not x.numel():
        return out
    sweep = Sweep(tuple(x.shape), tile, like=out)
    s, low, high = _grid(sweep, scale, zero_point, qmin, qmax)
    bounds = _open_interval(low, high)
    if _is_single(sweep, x) and grad.is_contiguous():
        _pass_inside(x, grad, out, s.reciprocal(), low, high, bounds=bounds)
        return out
    views = [sweep.view(tensor) for tensor in (x, grad, out)]
    for piece in sweep.chunks(views, [s.reciprocal(), low, high]):
        _pass_inside(*piece, bounds=bounds)
    return out


def _is_single(sweep: Sweep, x: Tensor) -> bool:
    """Return whether a tensor is small and plain enough to skip cutting it."""
    return not sweep.tile and sweep.order is None and x.numel() <= SINGLE and x.is_contiguous()


def _pass_inside(
    x: Tensor,
    grad: Tensor,
    out: Tensor,
    inverse: Tensor,
    low: Parameter,
    high: Parameter,
    *,
    bounds: tuple[float, float] | None,
) -> None:
    v = scratch(0, x)
    direct = x.dtype == grad.dtype == torch.float32
    torch.mul(x if x.dtype == torch.float32 else v.copy_(x), inverse, out=v)
    buffer = out if direct else scratch(1, grad)
    _gate(grad if direct else buffer.copy_(grad), v if bounds else _excess(v, low, high), bounds, out=buffer)
    if not direct:
        out.copy_(buffer)


def _gate(grad: Tensor, v: Tensor, bounds: tuple[float, float] | None, *, out: Tensor) -> None:
    """Write ``grad`` where ``v`` lies inside the open interval and zero elsewhere, in a single vectorized pass."""
    low, high = bounds or (-0.5, 0.5)
    torch.ops.aten.hardtanh_backward.grad_input(grad, v, low, high, grad_input=out)


def _open_interval(low: Parameter, high: Parameter) -> tuple[float, float] | None:
    """Return the open interval of values that round into ``[low, high]``; None if the bounds differ between blocks.

    A tie goes to the even neighbour, so an even bound takes the tie beside it in.
    """
    if not isinstance(low, float) or not isinstance(high, float):
        return None
    below, above = np.float32(low - 0.5), np.float32(high + 0.5)
    if low % 2 == 0:
        below = np.nextafter(below, np.float32(-np.inf))
    if high % 2 == 0:
        above = np.nextafter(above, np.float32(np.inf))
    return float(below), float(above)


def _excess(v: Tensor, low: Parameter, high: Parameter) -> Tensor:
    """Return how far ``rint(v)`` lies outside its bounds, in a scratch buffer: zero exactly inside, NaN for NaN."""
    rounded = torch.round(v, out=scratch(2, v))
    return rounded.sub_(_clip(rounded, low, high, out=scratch(3, v)))


def fake_quantize_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`reference.fake_quantize_lsq_backward`, in chunks; chunk sums are added in float64."""
    out = memory.empty_like(x)
    sweep = Sweep(tuple(x.shape), tile)
    sums = torch.zeros(2, *sweep.layout.parameters, dtype=torch.float64)
    s, low, high = _grid(sweep, scale, zero_point, qmin, qmax)
    if x.numel():
        target = sweep.view(out)
        views = [sweep.view(x), sweep.view(grad), target]
        for piece in sweep.chunks(views, [s.reciprocal(), low, high, sums[0], sums[1]]):
            _lsq_chunk(*piece)
        if target.data_ptr() != out.data_ptr():
            out.copy_(target.view(x.shape))
    to_zero_point = sums[1] * -s.double()
    return out, _per_parameter(sums[0], scale), _per_parameter(to_zero_point, zero_point)


def _lsq_chunk(
    x: Tensor,
    grad: Tensor,
    result: Tensor,
    inv: Tensor,
    low: Parameter,
    high: Parameter,
    to_scale: Tensor,
    clipped: Tensor,
) -> None:
    """Write the gradient to ``x`` and add this chunk's terms to the sums of its blocks."""
    v = scratch(0, x).copy_(x)
    g = grad if grad.dtype == torch.float32 else scratch(1, grad).copy_(grad)
    excess = _excess(v.mul_(inv), low, high)
    offset = scratch(3, v)  # clamp(rint(v)), left there by _excess
    passed = scratch(4, v)
    _gate(g, excess, None, out=passed)
    result.copy_(passed)
    clipped.add_(torch.sub(g, passed, out=passed).sum_to_size(clipped.shape))
    _gate(v, excess, None, out=passed)
    to_scale.add_(offset.sub_(passed).mul_(g).sum_to_size(to_scale.shape))


def _per_parameter(sums: Tensor, parameter: Tensor) -> Tensor:
    total = sums.reshape(-1) if parameter.numel() == sums.numel() else sums.sum()
    return total.to(torch.float32).reshape(parameter.shape)


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
