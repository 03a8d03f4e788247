"""The elementwise and observing operators: schema, shapes under tracing, gradients, and the functions to call.

Parameters (``scale`` float32, ``zero_point`` int32) hold one number, or one for every block in row-major order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import cpu, cpu_fake_quantize, cpu_gradients, gradients, reference, tiling, transforms
from fastforward_kernels.library import define

GRID = "Tensor scale, Tensor zero_point, int qmin, int qmax, int[] tile"


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _like_second(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize_out(*arguments: Any) -> None:
    *rest, out = arguments
    out.copy_(reference.fake_quantize(*rest))


def _shape_quantize(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-2])


def _shape_block_pair(x: Tensor, tile: Sequence[int]) -> tuple[Tensor, Tensor]:
    blocks = 1
    for size, length in zip(x.shape, tile, strict=False):
        blocks *= 1 if length == -1 else size // length
    return x.new_empty(blocks), x.new_empty(blocks)


FAKE_QUANTIZE: Callable[..., Tensor] = define(
    f"fake_quantize(Tensor x, {GRID}, float gradient_scale=1.0) -> Tensor",
    reference=reference.fake_quantize,
    cpu=cpu_fake_quantize.fake_quantize,
    triton="fake_quantize:fake_quantize",
    differentiable=True,
    fake=_like_first,
)
FAKE_QUANTIZE_BACKWARD: Callable[..., Tensor] = define(
    f"fake_quantize_backward(Tensor grad, Tensor x, {GRID}) -> Tensor",
    reference=reference.fake_quantize_backward,
    cpu=cpu_gradients.fake_quantize_backward,
    triton="fake_quantize:fake_quantize_backward",
    fake=_like_second,
)
FAKE_QUANTIZE_LSQ_BACKWARD = define(
    f"fake_quantize_lsq_backward(Tensor grad, Tensor x, {GRID}) -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_lsq_backward,
    cpu=cpu_gradients.fake_quantize_lsq_backward,
    triton="fake_quantize:fake_quantize_lsq_backward",
    fake=lambda grad, x, scale, zero_point, *_: (
        torch.empty_like(x),
        scale.new_empty(scale.shape, dtype=torch.float32),
        zero_point.new_empty(zero_point.shape, dtype=torch.float32),
    ),
)
FAKE_QUANTIZE_WITH_MASK = define(
    f"fake_quantize_with_mask(Tensor x, {GRID}) -> (Tensor, Tensor)",
    reference=reference.fake_quantize_with_mask,
    triton="fake_quantize:fake_quantize_with_mask",
    differentiable=True,
    fake=lambda x, *_: (torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)),
)
APPLY_MASK: Callable[..., Tensor] = define(
    "apply_mask(Tensor grad, Tensor mask) -> Tensor",
    reference=lambda grad, mask: reference.like(reference.apply_mask(grad, mask), grad),
    triton="fake_quantize:apply_mask",
    fake=_like_first,
)
ZERO_CLIPPED: Callable[..., Tensor] = define(
    "zero_clipped(Tensor grad, Tensor clipped) -> Tensor",
    reference=reference.zero_clipped,
    cpu=cpu_fake_quantize.zero_clipped,
    fake=lambda grad, clipped: torch.empty_like(clipped, dtype=grad.dtype),
)
FAKE_QUANTIZE_OUT: Callable[..., Tensor] = define(
    f"fake_quantize_out(Tensor x, {GRID}, Tensor(a!) out) -> ()",
    reference=_fake_quantize_out,
    cpu=cpu_fake_quantize.fake_quantize_out,
    triton="fake_quantize:fake_quantize_out",
    fake=lambda *_: None,
)
FAKE_QUANTIZE_FLOAT8: Callable[..., Tensor] = define(
    "fake_quantize_float8(Tensor x, Tensor scale, ScalarType dtype, int[] tile) -> Tensor",
    reference=reference.fake_quantize_float8,
    cpu=cpu.fake_quantize_float8,
    triton="float8_grid:fake_quantize_float8",
    differentiable=True,
    fake=_like_first,
)
QUANTIZE_FLOAT8: Callable[..., Tensor] = define(
    "quantize_float8(Tensor x, Tensor scale, ScalarType dtype, int[] tile) -> Tensor",
    reference=reference.quantize_float8,
    triton="float8_grid:quantize_float8",
    fake=_shape_quantize,
)
QUANTIZE: Callable[..., Tensor] = define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype, int[] tile) -> Tensor",
    reference=reference.quantize,
    cpu=cpu.quantize,
    triton="fake_quantize:quantize",
    fake=_shape_quantize,
)
DEQUANTIZE: Callable[..., Tensor] = define(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, int[] tile, ScalarType out_dtype) -> Tensor",
    reference=reference.dequantize,
    cpu=cpu.dequantize,
    triton="fake_quantize:dequantize",
    fake=lambda q, scale, zero_point, tile, out_dtype: q.new_empty(q.shape, dtype=out_dtype),
)
MIN_MAX = define(
    "min_max(Tensor x, int[] tile) -> (Tensor, Tensor)",
    reference=reference.min_max,
    cpu=cpu.min_max,
    triton="observe:min_max",
    fake=_shape_block_pair,
)
HISTOGRAM: Callable[..., Tensor] = define(
    "histogram(Tensor x, float low, float high, int bins) -> Tensor",
    reference=reference.histogram,
    cpu=cpu.histogram,
    triton="observe:histogram",
    fake=lambda x, low, high, bins: x.new_empty(bins, dtype=torch.int64),
)


gradients.register(FAKE_QUANTIZE, FAKE_QUANTIZE_BACKWARD, FAKE_QUANTIZE_LSQ_BACKWARD, ZERO_CLIPPED, APPLY_MASK)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    *,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Round ``x`` to an integer grid and back, in float32, keeping its data type.

    Args:
        x: floating tensor of any shape.
        scale: float32, one number or one for each block.
        zero_point: int32 (or float32 while it is learnt), like ``scale``.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        axis: the channel axis, for one scale per channel.
        group_size: one scale for every ``group_size`` elements along the last axis (along ``axis`` if given).
        gradient_scale: factor on the gradients of ``scale`` and ``zero_point`` (LSQ's ``1 / sqrt(n * qmax)``).

    Returns:
        Tensor like ``x``. Its gradient to ``x`` is the clipped straight-through estimator; to ``scale`` and
        ``zero_point`` that of LSQ, computed only where they require one.
    """
    return _fake_quantize(x, scale, zero_point, qmin, qmax, tiling.tile_for(x.dim(), axis, group_size), gradient_scale)


def fake_quantize_tiles(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: Sequence[int],
    *,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Like :func:`fake_quantize`, with one scale per tile: a length for every axis, ``-1`` for the whole axis."""
    return _fake_quantize(x, scale, zero_point, qmin, qmax, list(tile), gradient_scale)


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: list[int], gradient_scale: float
) -> Tensor:
    if transforms.active():
        return transforms.fake_quantize(x, scale, zero_point, qmin, qmax, tile, gradient_scale)
    if x.is_cuda and x.requires_grad and not (scale.requires_grad or zero_point.requires_grad):
        kept: Tensor = FAKE_QUANTIZE_WITH_MASK(x, scale, zero_point, qmin, qmax, tile)[0]
        return kept  # keeps 1 bit an element for backward
    return FAKE_QUANTIZE(x, scale, zero_point, qmin, qmax, tile, gradient_scale)


def fake_quantize_out(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """Like :func:`fake_quantize` into ``out`` (``x`` itself is allowed); no gradient."""
    FAKE_QUANTIZE_OUT(x, scale, zero_point, qmin, qmax, tiling.tile_for(x.dim(), axis, group_size), out)
    return out


def fake_quantize_float8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """Round ``x / scale`` to a float8 format, saturating, and scale back; straight-through gradient inside."""
    return FAKE_QUANTIZE_FLOAT8(x, scale, dtype, tiling.tile_for(x.dim(), axis, group_size))


def quantize_float8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """Return ``x / scale`` rounded to the float8 ``dtype``, saturating; contiguous."""
    return QUANTIZE_FLOAT8(x, scale, dtype, tiling.tile_for(x.dim(), axis, group_size))


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return the integers of ``x`` on the grid as a contiguous tensor of ``dtype``.

    Raises:
        ValueError: ``x`` is on the CPU and holds NaN (on a GPU its integer is the zero point).
    """
    return QUANTIZE(x, scale, zero_point, qmin, qmax, dtype, tiling.tile_for(x.dim(), axis, group_size))


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(q - zero_point) * scale`` as a contiguous tensor of ``out_dtype``."""
    return DEQUANTIZE(q, scale, zero_point, tiling.tile_for(q.dim(), axis, group_size), out_dtype)


def min_max(x: Tensor, axis: int | None = None, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value: shape ``()``, ``[channels]``, or ``[..., groups]`` for groups.

    NaN where a block holds NaN. Raises ValueError for an empty tensor.
    """
    low, high = MIN_MAX(x, tiling.tile_for(x.dim(), axis, group_size))
    shape = _parameter_shape(x, axis, group_size)
    return low.reshape(shape), high.reshape(shape)


def _parameter_shape(x: Tensor, axis: int | None, group_size: int | None) -> list[int]:
    if group_size is None:
        return [] if axis is None else [x.shape[axis]]
    if axis is not None:
        return [x.shape[axis] // group_size]
    return [*x.shape[:-1], x.shape[-1] // group_size]


def histogram(x: Tensor, low: float, high: float, bins: int = 2048) -> Tensor:
    """Count the values of ``x`` in equal bins from ``low`` to ``high`` (the end bins take the rest): int64 [bins]."""
    return HISTOGRAM(x, low, high, bins)
