"""Which elements share parameters: a tile per axis in, the smallest equivalent view out. Integers only.

A *tile* gives the block length along every axis: ``[1, -1]`` is per row (``-1`` is the whole axis), ``[1, 32]``
groups of 32 along the last axis, ``[]`` the whole tensor. Blocks are numbered in row-major order of their grid.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """A view of a contiguous tensor whose axes are either spread over blocks or inside a block, never both.

    Attributes:
        view: shape to view the data with; neighbouring axes of one kind are merged.
        parameters: shape to view the parameters with, so that they broadcast against ``view``.
        inside: axes of ``view`` that lie inside a block (what a reduction reduces over).
        grid: number of blocks along every axis of the original tensor.
    """

    view: tuple[int, ...]
    parameters: tuple[int, ...]
    inside: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks, and so of scales."""
        return math.prod(self.grid)


def tile_for(ndim: int, axis: int | None, group_size: int | None) -> list[int]:
    """Return the tile of a per-tensor, per-channel (``axis``) or grouped granularity.

    Groups lie along the last axis; with ``axis`` as well, along that axis, and the other axes stay whole.
    """
    if axis is None and group_size is None:
        return []
    if axis is None:
        return [1] * (ndim - 1) + [_positive(group_size)]
    if not -ndim <= axis < ndim:
        msg = f"axis {axis} does not exist in a tensor with {ndim} axes"
        raise IndexError(msg)
    tile = [-1] * ndim
    tile[axis] = 1 if group_size is None else _positive(group_size)
    return tile


def _positive(group_size: int | None) -> int:
    if not group_size or group_size < 0:
        msg = f"group_size must be positive, got {group_size}"
        raise ValueError(msg)
    return group_size


@functools.lru_cache(maxsize=1024)
def layout(shape: tuple[int, ...], tile: tuple[int, ...]) -> Layout:
    """Return the layout of ``tile`` over ``shape``; a tile must divide its axis, else ValueError."""
    if not tile:
        return Layout((math.prod(shape),), (1,), (0,), (1,) * len(shape))
    block = _block(shape, tile)
    grid = tuple(n // b if b else 0 for n, b in zip(shape, block, strict=True))
    merged: list[tuple[int, bool]] = []
    for count, length in zip(grid, block, strict=True):
        for size, is_inside in ((count, False), (length, True)):
            if size == 1:
                continue
            if merged and merged[-1][1] == is_inside:
                merged[-1] = (merged[-1][0] * size, is_inside)
            else:
                merged.append((size, is_inside))
    merged = merged or [(1, True)]
    return Layout(
        tuple(size for size, _ in merged),
        tuple(1 if is_inside else size for size, is_inside in merged),
        tuple(index for index, (_, is_inside) in enumerate(merged) if is_inside),
        grid,
    )


def _block(shape: Sequence[int], tile: Sequence[int]) -> tuple[int, ...]:
    block = tuple(n if t == -1 else t for n, t in zip(shape, tile, strict=False))
    if len(shape) != len(tile) or any(n and (b < 1 or n % b) for n, b in zip(shape, block, strict=True)):
        msg = f"a tile of shape {tuple(tile)} does not divide a tensor of shape {tuple(shape)}; pad the tensor first"
        raise ValueError(msg)
    return block


def check_parameter(name: str, numel: int, blocks: int, shape: Sequence[int], tile: Sequence[int]) -> None:
    """Raise ValueError unless ``numel`` parameters fit ``blocks`` blocks (one for all of them always does)."""
    if numel not in (1, blocks):
        msg = f"{name} has {numel} elements, but tile {list(tile)} cuts shape {list(shape)} into {blocks} blocks"
        raise ValueError(msg)
