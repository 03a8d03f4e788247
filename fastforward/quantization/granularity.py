"""Which elements of a tensor share one scale and one zero point.

A granularity answers two questions for a tensor shape: how large the blocks are that share
parameters (``block_size``), and what shape the parameters have (``parameter_shape``). Everything
else (reducing a tensor to its parameters' shape, spreading parameters over a tensor) follows.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Granularity:
    """Base class; subclasses define ``block_size``, and ``kept_dims`` if parameters have fewer axes than the data."""

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one block of elements that share parameters, for data of ``shape``."""
        raise NotImplementedError

    def kept_dims(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of the data that the parameters keep; all of them unless a subclass says less."""
        return tuple(range(ndim))

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of scale and zero point for data of ``shape``."""
        counts = block_counts(shape, self.block_size(shape))
        return tuple(counts[dim] for dim in self.kept_dims(len(shape)))

    def spread(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """View ``parameter`` so that it broadcasts against ``blocked(x)`` for ``x`` of ``shape``."""
        kept = self.kept_dims(len(shape))
        if parameter.numel() == 1:
            return parameter.reshape([1] * (2 * len(shape)))
        if parameter.dim() != len(kept):
            msg = (
                f"{self} of data with shape {tuple(shape)} needs parameters with {len(kept)} axes, "
                f"got shape {tuple(parameter.shape)}"
            )
            raise ValueError(msg)
        view = [1] * (2 * len(shape))
        for axis, dim in enumerate(kept):
            view[2 * dim] = parameter.shape[axis]
        return parameter.reshape(view)


def block_counts(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks lie along each axis; a block size must divide its axis."""
    if len(shape) != len(block_size) or any(b <= 0 or n % b for n, b in zip(shape, block_size, strict=True) if n):
        msg = f"blocks of size {tuple(block_size)} do not divide a tensor of shape {tuple(shape)}"
        raise ValueError(msg)
    return tuple(n // b if n else 0 for n, b in zip(shape, block_size, strict=True))


def blocked(x: Tensor, block_size: Sequence[int]) -> Tensor:
    """Reshape ``x`` of shape ``[n0, n1, ...]`` to ``[n0 / b0, b0, n1 / b1, b1, ...]``."""
    counts = block_counts(x.shape, block_size)
    return x.reshape([size for pair in zip(counts, block_size, strict=True) for size in pair])


def reduction_view(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Return a blocked view of ``x``, the axes of it to reduce over, and the shape of the parameters."""
    block_size = granularity.block_size(x.shape)
    dims = tuple(range(1, 2 * x.dim(), 2))
    return blocked(x, block_size), dims, granularity.parameter_shape(x.shape)


def rows_by_block(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...]]:
    """Return ``x`` as ``[number of blocks, elements per block]`` and the shape of the parameters."""
    view, inner, parameter_shape = reduction_view(x, granularity)
    outer = tuple(dim for dim in range(view.dim()) if dim not in inner)
    count = math.prod(parameter_shape)
    return view.permute(*outer, *inner).reshape(count, -1 if x.numel() else 0), parameter_shape


def min_max(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each block, in the data type of ``x``.

    ``torch.aminmax`` serves a whole tensor; over axes ``amin`` and ``amax`` are an order of magnitude
    faster than ``aminmax(dim)`` on CPUs.
    """
    if isinstance(granularity, PerTensor):
        low, high = torch.aminmax(in_storage_order(x))
        return low, high
    if isinstance(granularity, PerToken):
        return x.amin(-1), x.amax(-1)
    if isinstance(granularity, PerChannel):
        kept = granularity.kept_dims(x.dim())
        dims = tuple(dim for dim in range(x.dim()) if dim not in kept)
        return (x.amin(dims), x.amax(dims)) if dims else (x, x)
    view, dims, parameter_shape = reduction_view(x, granularity)
    return view.amin(dims).reshape(parameter_shape), view.amax(dims).reshape(parameter_shape)


def in_storage_order(x: Tensor) -> Tensor:
    """Return ``x`` with its axes in the order of memory, which spares reductions a copy of transposed tensors.

    Compilers make no such copy, and cannot sort strides that they do not know.
    """
    if torch.compiler.is_compiling() or x.is_contiguous():
        return x
    strides = x.stride()
    return x.permute(sorted(range(x.dim()), key=lambda dim: -strides[dim]))


@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor; parameters have shape ``()``."""

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def kept_dims(self, ndim: int) -> tuple[int, ...]:
        del ndim
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class PerChannel(Granularity):
    """One scale per index of ``dim`` (an axis, or several); parameters have one axis for each of them."""

    dim: int | tuple[int, ...] = 0

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.dim,) if isinstance(self.dim, int) else tuple(self.dim)

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        kept = self.kept_dims(len(shape))
        return tuple(1 if dim in kept else size for dim, size in enumerate(shape))

    def kept_dims(self, ndim: int) -> tuple[int, ...]:
        return tuple(sorted(wrap_dim(dim, ndim) for dim in self.dims))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerChannel) and self.dims == other.dims

    def __hash__(self) -> int:
        return hash(("PerChannel", self.dims))


class PerAxis(PerChannel):
    """torchao's name of :class:`PerChannel`: ``PerAxis(axis=0)``."""

    def __init__(self, axis: int = 0) -> None:
        super().__init__(axis)

    @property
    def axis(self) -> int:
        return self.dims[0]

    def __repr__(self) -> str:
        return f"PerAxis(axis={self.axis})"


@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per ``group_size`` consecutive elements of the last axis."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size <= 0:
            msg = f"group_size must be positive, got {self.group_size}"
            raise ValueError(msg)

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not shape:
            msg = "PerGroup needs data with at least one axis"
            raise ValueError(msg)
        return (*(1 for _ in shape[:-1]), self.group_size)


@dataclasses.dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each line of elements along ``dim``; parameters have every axis but that one."""

    dim: int = -1

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        line = wrap_dim(self.dim, len(shape))
        return tuple(size if dim == line else 1 for dim, size in enumerate(shape))

    def kept_dims(self, ndim: int) -> tuple[int, ...]:
        line = wrap_dim(self.dim, ndim)
        return tuple(dim for dim in range(ndim) if dim != line)


@dataclasses.dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each vector along the last axis; parameters have every axis but the last."""

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        return PerRow(-1).block_size(shape)

    def kept_dims(self, ndim: int) -> tuple[int, ...]:
        return PerRow(-1).kept_dims(ndim)


@dataclasses.dataclass(frozen=True)
class PerTile(Granularity):
    """One scale per tile of shape ``tile_shape`` (-1: the whole axis); parameters have every axis of the data."""

    tile_shape: tuple[int, ...]

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(shape) != len(self.tile_shape):
            msg = f"tiles of shape {self.tile_shape} need data with as many axes, got shape {tuple(shape)}"
            raise ValueError(msg)
        return tuple(size if tile == -1 else tile for tile, size in zip(self.tile_shape, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class PerBlock(Granularity):
    """Blocks of ``block_sizes`` along ``block_dims``, single elements along ``per_channel_dims``, whole axes elsewhere.

    torchao's form is accepted too: ``PerBlock(block_size=(1, 128))`` gives the block's size along every axis.
    """

    block_dims: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    per_channel_dims: tuple[int, ...] = ()
    block_size_: tuple[int, ...] | None = None

    def __init__(
        self,
        block_dims: int | Sequence[int] = (),
        block_sizes: int | Sequence[int] = (),
        per_channel_dims: int | Sequence[int] = (),
        *,
        block_size: Sequence[int] | None = None,
    ) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "block_dims", _as_tuple(block_dims))
        set_field(self, "block_sizes", _as_tuple(block_sizes))
        set_field(self, "per_channel_dims", _as_tuple(per_channel_dims))
        set_field(self, "block_size_", None if block_size is None else tuple(block_size))
        if len(self.block_dims) != len(self.block_sizes):
            msg = f"block_dims {self.block_dims} and block_sizes {self.block_sizes} must have the same length"
            raise ValueError(msg)
        if (block_size is None) == (not self.block_dims):
            msg = "PerBlock takes either block_dims and block_sizes, or block_size"
            raise ValueError(msg)

    def block_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.block_size_ is not None:
            return PerTile(self.block_size_).block_size(shape)
        sizes = list(shape)
        for dim, size in zip(self.block_dims, self.block_sizes, strict=True):
            sizes[wrap_dim(dim, len(shape))] = size
        for dim in self.per_channel_dims:
            sizes[wrap_dim(dim, len(shape))] = 1
        return tuple(sizes)


def wrap_dim(dim: int, ndim: int) -> int:
    """Return ``dim`` counted from the front; an axis that does not exist raises IndexError."""
    if not -ndim <= dim < ndim:
        msg = f"axis {dim} does not exist in data with {ndim} axes"
        raise IndexError(msg)
    return dim % ndim


def granularity_from_block_size(block_size: Sequence[int], shape: Sequence[int]) -> Granularity:
    """Return the simplest granularity with this block size for data of ``shape``."""
    whole = tuple(b == n for b, n in zip(block_size, shape, strict=True))
    if all(whole):
        return PerTensor()
    single = tuple(dim for dim, b in enumerate(block_size) if b == 1 and not whole[dim])
    if all(whole[dim] or dim in single for dim in range(len(shape))):
        return PerChannel(single if len(single) > 1 else single[0])
    return PerTile(tuple(block_size))


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
