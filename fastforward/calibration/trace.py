"""What is known about one tensor during a recorded run, and how data movement carries it on."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastforward.nn.quantizer import Quantizer

UNKNOWN = -1
"""An axis that cannot be followed back."""

# Movements that leave every element where it is.
_IDENTITY = frozenset(
    [
        "contiguous",
        "clone",
        "detach",
        "detach_",
        "alias",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "cpu",
        "cuda",
        "requires_grad_",
        "data",
        "__deepcopy__",
        "lift_fresh",
        "real",
        "pin_memory",
    ]
)
# Data movement that the operator table does not list, because it is no call in the source.
UNLISTED_MOVES = frozenset({"__getitem__", "T", "mT", "H", "mH", "data", "alias", "detach_", "swapaxes", "swapdims"})

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A tensor went through a stub or quantizer.

    Attributes:
        quantizer: The stub or quantizer.
        context: Whose code called it: the scope of a rewritten function, or a hand-written module.
        axes: For each axis of the tensor, the axis of the tensor that the quantizer saw; ``UNKNOWN`` where
            that is lost.
        shape: Shape of the tensor that the quantizer saw.
    """

    quantizer: Quantizer
    context: object
    axes: tuple[int, ...]
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """How the axes of a value lie in what was computed, before any movement.

    Attributes:
        axes: For each axis of the value, the axis of what was computed; ``UNKNOWN`` where that is lost.
        dims: How many axes that has.
    """

    axes: tuple[int, ...]
    dims: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """Where a tensor comes from.

    Attributes:
        value: Number of the value; stubs, casts and copies keep it, anything that moves elements gives a new one.
        root: Number of the value that was computed, before any movement.
        passages: The stubs and quantizers it went through since, oldest first.
        parameter: Whether it depends on parameters alone.
        producer: Number of the site that computed it.
        layout: How its axes lie in what was computed.
    """

    value: int
    root: int
    passages: tuple[Passage, ...] = ()
    parameter: bool = False
    producer: int | None = None
    layout: Layout = Layout((), 0)

    def governing(self, alive: Callable[[object], bool]) -> Passage | None:
        """The passage that an operator in the running code reads from: the last quantizer, or else the last stub.

        A stub returns the object it was given. So a tensor carries the stubs of every function it was handed to, and
        those of functions that have returned say nothing about later uses. The last stub of code that is still
        running counts; without one, that of the function that made the tensor.
        """
        if not self.passages:
            return None
        for passage in reversed(self.passages):
            if not passage.quantizer.is_stub():
                return passage
        for passage in reversed(self.passages):
            if alive(passage.context):
                return passage
        maker = self.passages[0].context
        own = [passage for passage in self.passages if passage.context is maker]
        return own[-1]


def fresh(tensor: Tensor, *, parameter: bool = False, producer: int | None = None) -> Trace:
    """The trace of a value seen for the first time."""
    number = next(_numbers)
    return Trace(number, number, (), parameter, producer, Layout(tuple(range(tensor.dim())), tensor.dim()))


def passed(trace: Trace, quantizer: Quantizer, context: object, out: Tensor, *, same: bool) -> Trace:
    """The trace of what a stub or quantizer returned; ``same`` says that it is the object it was given."""
    shape = tuple(out.shape)
    passage = Passage(quantizer, context, tuple(range(len(shape))), shape)
    kept = tuple(p for p in trace.passages if p.quantizer is not quantizer) if same else ()
    return dataclasses.replace(trace, passages=(*kept, passage))


def moved(
    trace: Trace, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor, out: Tensor
) -> Trace:
    """The trace of ``out``, which the movement called ``name`` made of ``source``."""
    if name in _IDENTITY:
        return trace
    passages = tuple(
        dataclasses.replace(passage, axes=_axes(passage.axes, name, args, kwargs, source, out))
        for passage in trace.passages
    )
    layout = Layout(_axes(trace.layout.axes, name, args, kwargs, source, out), trace.layout.dims)
    return dataclasses.replace(trace, value=next(_numbers), passages=passages, layout=layout)


def _axes(
    axes: tuple[int, ...], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor, out: Tensor
) -> tuple[int, ...]:
    order = _permutation(name, args[1:], kwargs, source.dim())
    if order is not None:
        return tuple(axes[axis] for axis in order)
    keeps = ("flip", "narrow", "split", "chunk", "tensor_split", "__getitem__", "index_select", "split_with_sizes")
    if name in keeps and source.dim() == out.dim():  # indexing may add and remove axes
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
