"""How moving, slicing, transposing and reshaping act on a ``QuantizedTensor``: the grid goes along."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from fastforward_kernels.ops_chain import INTEGERS_OF
from torch import Tensor

from fastforward.exceptions import QuantizationError
from fastforward.quantization.granularity import wrap_dim
from fastforward.quantization.tensor import QuantizedTensor, implements_operator, plain

aten = torch.ops.aten


def rebuilt(
    old: QuantizedTensor, int_data: Tensor, block_size: Sequence[int], transform: Any = None
) -> QuantizedTensor:
    """Return a tensor with new values and blocks; ``transform`` acts on parameters with one axis per data axis."""

    def moved(parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.numel() == 1 or transform is None:
            return parameter
        result: Tensor = transform(old.parameter_view(parameter))
        return result.reshape(-1) if parameter.dim() == 1 else result

    scale = moved(old.scale)
    assert scale is not None
    return QuantizedTensor(int_data, scale, moved(old.zero_point), block_size, old.dtype, old.quant_min, old.quant_max)


@implements_operator(aten.detach.default, aten.alias.default, aten.clone.default)
def _same(func: Any, x: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    return x.with_parts(lambda part: func(part, **(kwargs if part.dim() == x.dim() else {})))


@implements_operator(INTEGERS_OF)
def _integers_of(func: Any, x: QuantizedTensor) -> tuple[Tensor, Tensor]:
    del func
    if x.zero_point is not None:
        msg = "a QuantizedTensor with zero points is more than integers and a scale: dequantize() it first"
        raise QuantizationError(msg)
    scale = x.parameter_view(x.scale)
    if any(count not in (1, size) for count, size in zip(scale.shape, x.shape, strict=True)):
        within = [size // count for size, count in zip(x.shape, scale.shape, strict=True)]
        scale = scale.repeat_interleave(within[0], 0).repeat_interleave(within[1], 1)
    return x.int_data, scale


@implements_operator(aten._to_copy.default)
def _to_copy(func: Any, x: QuantizedTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return func(x.dequantize(), dtype=dtype, **kwargs)
    kwargs.pop("memory_format", None)
    return x.with_parts(lambda part: func(part, **kwargs), dtype)


@implements_operator(aten.t.default)
def _t(func: Any, x: QuantizedTensor) -> QuantizedTensor:
    return permuted(x, tuple(reversed(range(x.dim()))))


@implements_operator(aten.transpose.int)
def _transpose(func: Any, x: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    order = list(range(x.dim()))
    a, b = wrap_dim(dim0, x.dim()), wrap_dim(dim1, x.dim())
    order[a], order[b] = order[b], order[a]
    del func
    return permuted(x, order)


@implements_operator(aten.permute.default)
def _permute(func: Any, x: QuantizedTensor, order: Sequence[int]) -> QuantizedTensor:
    del func
    return permuted(x, order)


def permuted(x: QuantizedTensor, order: Sequence[int]) -> QuantizedTensor:
    """Return ``x`` with its axes in another order."""
    order = [wrap_dim(dim, x.dim()) for dim in order]
    block_size = [x.block_size[dim] for dim in order]
    return rebuilt(x, x.int_data.permute(order), block_size, lambda parameter: parameter.permute(order))


@implements_operator(aten.unsqueeze.default)
def _unsqueeze(func: Any, x: QuantizedTensor, dim: int) -> QuantizedTensor:
    dim = wrap_dim(dim, x.dim() + 1)
    block_size = (*x.block_size[:dim], 1, *x.block_size[dim:])
    return rebuilt(x, func(x.int_data, dim), block_size, lambda parameter: parameter.unsqueeze(dim))


@implements_operator(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(func: Any, x: QuantizedTensor, dims: int | Sequence[int] | None = None) -> QuantizedTensor:
    del func
    wanted = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [wrap_dim(dim, x.dim()) for dim in wanted]
    kept = [dim for dim in range(x.dim()) if not (dim in gone and x.shape[dim] == 1)]
    block_size = [x.block_size[dim] for dim in kept]
    shape = [x.shape[dim] for dim in kept]
    counts = x.block_counts()
    return rebuilt(x, x.int_data.reshape(shape), block_size, lambda p: p.reshape([counts[dim] for dim in kept]))


@implements_operator(aten.slice.Tensor)
def _slice(
    func: Any, x: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim = wrap_dim(dim, x.dim())
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    values = func(x.int_data, dim, first, last, step)
    block, size = x.block_size[dim], values.shape[dim]
    block_size = list(x.block_size)
    if block == x.shape[dim]:  # one block along this axis: what is left of it keeps its scale
        block_size[dim] = size
        return rebuilt(x, values, block_size)
    if step == 1 and first % block == 0 and size % block == 0:
        begin, stop = first // block, (first + size) // block
        return rebuilt(x, values, block_size, lambda parameter: parameter.narrow(dim, begin, stop - begin))
    if block == 1:
        return rebuilt(x, values, block_size, lambda parameter: func(parameter, dim, first, last, step))
    return func(x.dequantize(), dim, first, last, step)


@implements_operator(aten.select.int)
def _select(func: Any, x: QuantizedTensor, dim: int, index: int) -> QuantizedTensor:
    dim = wrap_dim(dim, x.dim())
    block_size = [size for axis, size in enumerate(x.block_size) if axis != dim]
    block = max(x.block_size[dim], 1)
    position = (index % x.shape[dim]) // block if -x.shape[dim] <= index < x.shape[dim] else index
    return rebuilt(x, func(x.int_data, dim, index), block_size, lambda parameter: parameter.select(dim, position))


@implements_operator(aten.index_select.default)
def _index_select(func: Any, x: QuantizedTensor, dim: int, index: Tensor) -> Any:
    dim = wrap_dim(dim, x.dim())
    block_size = list(x.block_size)
    if x.block_size[dim] == x.shape[dim]:
        block_size[dim] = index.numel()
        return rebuilt(x, func(x.int_data, dim, index), block_size)
    if x.block_size[dim] == 1:
        return rebuilt(x, func(x.int_data, dim, index), block_size, lambda parameter: func(parameter, dim, index))
    return func(x.dequantize(), dim, index)


@implements_operator(aten.embedding.default)
def _embedding(func: Any, weight: Any, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Look rows up and dequantize those alone."""
    del func, args, kwargs  # padding and gradients do not concern a lookup
    rows = _index_select(aten.index_select.default, weight, 0, index.reshape(-1))
    values: Tensor = plain(rows).reshape(*index.shape, weight.shape[1])
    return values


@implements_operator(aten.copy_.default)
def _copy(func: Any, target: Any, source: Any, *args: Any) -> Any:
    """Copy between tensors of one format, as loading a state does; other copies would lose the grid."""
    if not isinstance(target, QuantizedTensor):
        return func(target, plain(source), *args)
    same = isinstance(source, QuantizedTensor) and source.shape == target.shape and _same_format(source, target)
    if not same or source.block_size != target.block_size or source.scale.shape != target.scale.shape:
        msg = (
            "only a QuantizedTensor of the same shape and format can be copied into one: dequantize() the target first"
        )
        raise QuantizationError(msg)
    target.int_data.copy_(source.int_data)
    target.scale.copy_(source.scale)
    if target.zero_point is not None:
        target.zero_point.copy_(source.zero_point)
    return target


@implements_operator(aten.expand.default)
def _expand(func: Any, x: QuantizedTensor, size: Sequence[int], **kwargs: Any) -> Any:
    if not x.is_per_tensor():
        return func(x.dequantize(), size, **kwargs)
    values = func(x.int_data, size, **kwargs)
    return rebuilt(x, values, values.shape)


@implements_operator(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, x: QuantizedTensor, shape: Sequence[int]) -> Any:
    values = func(x.int_data, shape)
    if x.is_per_tensor():
        return rebuilt(x, values, values.shape)
    block_size = _blocks_after_reshape(x, values.shape)
    if block_size is None:
        return func(x.dequantize(), shape)
    counts = [size // block for size, block in zip(values.shape, block_size, strict=True)]
    return rebuilt(x, values, block_size, lambda parameter: parameter.reshape(counts))


def _blocks_after_reshape(x: QuantizedTensor, shape: Sequence[int]) -> list[int] | None:
    """Return the new block size if every block stays a block, else None.

    Axes with single-element blocks in front, followed by axes that lie in one block, may be split and joined among
    their own kind: ``[B, T, K]`` per token becomes ``[B * T, K]``.
    """
    ones = 0
    while ones < x.dim() and x.block_size[ones] == 1:
        ones += 1
    if any(block != size for block, size in zip(x.block_size[ones:], x.shape[ones:], strict=True)):
        return None
    rows, covered, axis = math.prod(x.shape[:ones]), 1, 0
    while axis < len(shape) and covered < rows:
        covered *= shape[axis]
        axis += 1
    if covered != rows:
        return None
    return [1] * axis + list(shape[axis:])


@implements_operator(aten.split.Tensor)
def _split(func: Any, x: QuantizedTensor, size: int, dim: int = 0) -> list[Any]:
    del func
    starts = range(0, x.shape[dim], size)
    return [_slice(aten.slice.Tensor, x, dim, start, start + size) for start in starts]


@implements_operator(aten.split_with_sizes.default)
def _split_with_sizes(func: Any, x: QuantizedTensor, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    del func
    ends = itertools.accumulate(sizes)
    return [_slice(aten.slice.Tensor, x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@implements_operator(aten.cat.default)
def _cat(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Join quantized tensors whose grids allow it: equal parameters, or blocks that lie side by side along ``dim``."""
    first = tensors[0]
    dim = wrap_dim(dim, first.dim())
    if not all(isinstance(x, QuantizedTensor) and _same_format(x, first) for x in tensors):
        return func([plain(x) for x in tensors], dim)
    values = func([x.int_data for x in tensors], dim)
    others = [axis for axis in range(first.dim()) if axis != dim]
    one_block = all(x.block_size[dim] == x.shape[dim] for x in tensors)
    same_blocks = all(x.block_size[axis] == first.block_size[axis] for x in tensors for axis in others)
    if one_block and same_blocks and all(_same_parameters(x, first) for x in tensors):
        block_size = list(first.block_size)
        block_size[dim] = values.shape[dim]
        return rebuilt(first, values, block_size)
    if same_blocks and all(x.block_size[dim] == first.block_size[dim] for x in tensors):
        return _joined(tensors, values, dim)
    return func([x.dequantize() for x in tensors], dim)


def _joined(tensors: Sequence[QuantizedTensor], values: Tensor, dim: int) -> QuantizedTensor:
    first = tensors[0]
    scale = torch.cat([full_view(x, x.scale) for x in tensors], dim)
    points = [x.zero_point for x in tensors]
    zero_point = None
    if first.zero_point is not None:
        zero_point = torch.cat([full_view(x, p) for x, p in zip(tensors, points, strict=True) if p is not None], dim)
    if first.scale.dim() <= 1:
        scale, zero_point = scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1)
    return QuantizedTensor(values, scale, zero_point, first.block_size, first.dtype, first.quant_min, first.quant_max)


def full_view(x: QuantizedTensor, parameter: Tensor) -> Tensor:
    """Return a parameter with the number of blocks along each axis, a single one spread over them."""
    return x.parameter_view(parameter).expand(x.block_counts())


def _same_format(x: QuantizedTensor, y: QuantizedTensor) -> bool:
    return (
        x.int_data.dtype == y.int_data.dtype
        and x.dtype == y.dtype
        and x.dim() == y.dim()
        and (x.zero_point is None) == (y.zero_point is None)
        and (x.quant_min, x.quant_max) == (y.quant_min, y.quant_max)
    )


def _same_parameters(x: QuantizedTensor, y: QuantizedTensor) -> bool:
    same_scale = x.scale is y.scale or torch.equal(x.scale, y.scale)
    if x.zero_point is None or y.zero_point is None:
        return same_scale
    return same_scale and (x.zero_point is y.zero_point or torch.equal(x.zero_point, y.zero_point))


@implements_operator(aten.unbind.int)
def _unbind(func: Any, x: QuantizedTensor, dim: int = 0) -> list[QuantizedTensor]:
    del func
    return [_select(aten.select.int, x, dim, index) for index in range(x.shape[dim])]
