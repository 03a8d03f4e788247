"""What is known about one tensor during a recorded run, and how data movement carries it on."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastforward.nn.quantizer import Quantizer

UNKNOWN = -1
"""An axis that cannot be followed back."""

# Movements that leave every element where it is.
_IDENTITY = frozenset(
    "contiguous clone detach detach_ alias to type type_as float half bfloat16 double cpu cuda requires_grad_ data "
    "__deepcopy__ lift_fresh real pin_memory".split()
)
# Data movement that the operator table does not list, because it is no call in the source.
UNLISTED_MOVES = frozenset({"__getitem__", "T", "mT", "H", "mH", "data", "alias", "detach_", "swapaxes", "swapdims"})

_numbers = itertools.count()


@dataclasses.dataclass(slots=True)
class Trace:
    """Where a tensor comes from.

    Attributes:
        value: Number of the value; stubs, casts and copies keep it, anything that moves elements gives a new one.
        root: Number of the value that was computed, before any movement.
        axes: For each axis, the axis of the tensor that the quantizer saw; ``UNKNOWN`` where that is lost.
        shape: Shape of the tensor that the quantizer saw.
        quantizer: The last stub or quantizer passed.
        parameter: Whether it depends on parameters alone.
        producer: Number of the site that computed it.
    """

    value: int
    root: int
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    quantizer: Quantizer | None = None
    parameter: bool = False
    producer: int | None = None


def fresh(tensor: Tensor, *, parameter: bool = False, producer: int | None = None) -> Trace:
    """The trace of a value seen for the first time."""
    number = next(_numbers)
    shape = tuple(tensor.shape)
    return Trace(number, number, tuple(range(len(shape))), shape, None, parameter, producer)


def quantized(trace: Trace, quantizer: Quantizer, out: Tensor) -> Trace:
    """The trace of what a stub or quantizer returned."""
    shape = tuple(out.shape)
    return dataclasses.replace(trace, axes=tuple(range(len(shape))), shape=shape, quantizer=quantizer)


def moved(trace: Trace, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor, out: Tensor) -> Trace:
    """The trace of ``out``, which the movement called ``name`` made of ``source``."""
    if name in _IDENTITY:
        return trace
    number = next(_numbers)
    return dataclasses.replace(trace, value=number, axes=_axes(trace.axes, name, args, kwargs, source, out))


def _axes(
    axes: tuple[int, ...], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor, out: Tensor
) -> tuple[int, ...]:
    order = _permutation(name, args[1:], kwargs, source.dim())
    if order is not None:
        return tuple(axes[axis] for axis in order)
    if name in ("flip", "narrow", "split", "chunk", "tensor_split", "__getitem__", "index_select", "split_with_sizes"):
        if out.dim() == source.dim():
            return axes
    return _matching(axes, tuple(source.shape), tuple(out.shape))


def _permutation(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: int) -> list[int] | None:
    order = list(range(dims))
    if name in ("transpose", "swapaxes", "swapdims", "mT", "mH", "adjoint"):
        last = (dims - 2, dims - 1) if dims >= 2 else (0, 0)
        first, second = _pair(args, kwargs) if name in ("transpose", "swapaxes", "swapdims") else last
        order[first], order[second] = order[second], order[first]
        return order
    if name in ("t", "T", "H"):
        return order[::-1]
    if name == "permute":
        given = kwargs.get("dims", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
        return [int(axis) % dims for axis in given]
    return None


def _pair(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    given = [*args, *(kwargs[key] for key in ("dim0", "axis0", "dim1", "axis1") if key in kwargs)]
    return int(given[0]), int(given[1])


def _matching(axes: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """Leading axes of equal size are the same axis; so are trailing ones."""
    found = [UNKNOWN] * len(after)
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            break
        found[index] = axes[index]
    for offset, (old, new) in enumerate(zip(reversed(before), reversed(after), strict=False), start=1):
        if old != new or found[-offset] != UNKNOWN:
            break
        found[-offset] = axes[-offset]
    return tuple(found)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and records."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for item in vars(value).values() for tensor in tensors_in(item)]
    return []


def is_parameter(tensor: Tensor) -> bool:
    """Whether the tensor itself is a parameter."""
    return isinstance(tensor, torch.nn.Parameter)
