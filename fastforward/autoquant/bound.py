"""Which options are bound to which class or function: written by the decorator and the hook, read when it is quantized.

Nothing is imported here, so that a hooked import costs little more than a plain one.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastforward.autoquant.optable import OperatorTable
    from fastforward.autoquant.patterns import PatternRule

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """What rewriting depends on beside the source."""

    operator_table: "OperatorTable | None" = None
    replacement_patterns: "Sequence[PatternRule]" = ()
    skip: Iterable[Any] | None = None


_bound: "weakref.WeakKeyDictionary[Any, Options]" = weakref.WeakKeyDictionary()


def bind(obj: _T, options: Options) -> _T:
    """Bind options to a module class or function; its source is read when an instance is quantized."""
    _bound[obj] = options
    return obj


def bound_options(obj: Any) -> Options | None:
    """The options that the decorator or the hook bound to ``obj``, if any."""
    return _bound.get(obj)
