"""Walking tensors in chunks that stay in the cache, together with the parameters of their blocks.

A chunk is what a few of ATen's vectorized ``out=`` operators work on in turn, so that only the first of them reads from
memory. The buffers between them belong to the thread and are reused.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import tiling

CHUNK = 1 << 17  # float32 elements; 512 KiB stays in a second-level cache
SINGLE = 2 * CHUNK  # up to here cutting costs more calls than it saves
FRESH = 1 << 13  # up to here memory of one's own costs less than finding the buffer
SCRATCH = threading.local()
Parameter = Tensor | float


def scratch(slot: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return this thread's buffer number ``slot`` of that type, viewed with the shape of ``like``."""
    if like.numel() <= FRESH:
        return torch.empty(like.shape, dtype=dtype)
    buffers: dict[Any, Tensor] = SCRATCH.__dict__
    size = like.numel()
    buffer = buffers.get((slot, dtype))
    if buffer is None or buffer.numel() < size:
        buffer = buffers[slot, dtype] = torch.empty(max(size, SINGLE), dtype=dtype)
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
        """Return the float32 tensor that broadcasts against the view."""
        return self.spread(name, value).to(torch.float32)

    def spread(self, name: str, value: Tensor) -> Tensor:
        """Return the tensor that broadcasts against the view; ATen multiplies fastest by one without axes."""
        value = value.detach() if value.requires_grad else value
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
        return tensor if tensor.shape == self.layout.view else tensor.reshape(self.layout.view)

    def chunks(self, tensors: Sequence[Tensor], parameters: Sequence[Parameter]) -> Iterator[list[Any]]:
        """Yield aligned pieces of ``tensors`` (as viewed) and ``parameters``, each of about CHUNK elements."""
        return _chunks(list(tensors), list(parameters), CHUNK)

    def batches(self, tensors: Sequence[Tensor], parameters: Sequence[Parameter]) -> Iterator[list[Any]]:
        """Yield larger pieces, of about CHUNK blocks each: what is derived from their parameters fits buffers."""
        block = tensors[0].numel() // self.layout.blocks
        return _chunks(list(tensors), list(parameters), CHUNK * block)

    def write_back(self, out: Tensor, target: Tensor) -> None:
        """Copy the result if ``out`` could not be viewed as ``target`` (an ``out`` with holes, given by the caller)."""
        if target.data_ptr() != out.data_ptr():
            (out if self.order is None else out.permute(self.order)).copy_(target.view(self.shape))


def _storage_order(x: Tensor) -> tuple[int, ...] | None:
    """Return the axes of ``x`` from the slowest to the fastest, None if that is their order."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim)))


def _chunks(tensors: list[Tensor], parameters: list[Parameter], size: int) -> Iterator[list[Any]]:
    first = tensors[0]
    if first.numel() <= 2 * size:
        yield [*tensors, *parameters]
        return
    length = first.shape[0]
    row = first.numel() // length
    if row > 2 * size and first.dim() > 1:
        for index in range(length):
            rows = [tensor[index] for tensor in tensors]
            yield from _chunks(rows, [_row(parameter, index) for parameter in parameters], size)
        return
    rows_at_once = max(1, size // row)
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
