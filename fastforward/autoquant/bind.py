"""Options bound to classes and functions: what the decorator does, and what is made of it when a model is quantized.

The decorator reads and verifies the source while it is certainly the code that runs. The import hook leaves that for
later, because it would multiply the time that an import takes. Nothing is rewritten yet, since the module may still be
half imported.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from fastforward.autoquant.bound import Options, bind, bound_options
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.recompile import Engine
from fastforward.autoquant.source import locate
from fastforward.exceptions import AutoquantError

if TYPE_CHECKING:
    from fastforward.autoquant.patterns import PatternRule

_T = TypeVar("_T")
_engines: dict[tuple[Any, ...], Engine] = {}


def engine_for(
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    skip: Iterable[Any] | None = None,
) -> Engine:
    """The engine for these options; the same options give the same engine, and so the same companions."""
    names = _skip_names(skip)
    key = id(operator_table), tuple(replacement_patterns), names
    if key not in _engines:
        _engines[key] = Engine(operator_table, replacement_patterns, names)
    return _engines[key]


def bound_engine(obj: Any) -> Engine | None:
    """The engine that the decorator or the hook bound to ``obj``, if any."""
    options = bound_options(obj)
    return None if options is None else engine_for(options.operator_table, options.replacement_patterns, options.skip)


def prepare(
    obj: _T,
    *,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    skip: Iterable[Any] | None = None,
) -> _T:
    """Read and verify the source of a module class or function, and bind options to it.

    Args:
        obj: Subclass of ``torch.nn.Module``, or a Python function.
        operator_table: Operator table for this class; the bundled one if not given.
        replacement_patterns: Applied to the source first.
        skip: Names of methods and helpers, or the functions themselves, that stay as they are.

    Returns:
        ``obj`` itself.

    Raises:
        TypeError: ``obj`` is neither a class nor a function.
        AutoquantError: It has no Python source.
        SourceMismatchError: The source found is not the code that runs.
    """
    function = _source_of(obj)
    if function is not None:
        locate(function)
    return bind(obj, Options(operator_table, replacement_patterns, skip))


def _source_of(obj: Any) -> types.FunctionType | None:
    if isinstance(obj, type):
        if not issubclass(obj, torch.nn.Module):
            name = f"{obj.__module__}.{obj.__qualname__}"
            msg = f"quantizable: {name} is no torch.nn.Module; decorate a module class or a function"
            raise TypeError(msg)
        forward = obj.forward
        if getattr(forward, "__name__", "") == "_forward_unimplemented":
            return None
        if not isinstance(forward, types.FunctionType):
            name = f"{obj.__module__}.{obj.__qualname__}"
            msg = f"quantizable: {name}.forward is a {type(forward).__name__}: no Python source"
            raise AutoquantError(msg)
        return forward
    if not isinstance(obj, types.FunctionType):
        kind = "builtin" if isinstance(obj, types.BuiltinFunctionType) else type(obj).__name__
        if callable(obj):
            msg = f"quantizable: {getattr(obj, '__qualname__', obj)!r} is a {kind} and has no Python source to rewrite"
            raise AutoquantError(msg)
        msg = f"quantizable: expected a module class or a function, got {kind}"
        raise TypeError(msg)
    if obj.__name__ == "<lambda>":
        place = f"{obj.__code__.co_filename}:{obj.__code__.co_firstlineno}"
        msg = f"quantizable: {place} is a lambda; give it a name with def"
        raise AutoquantError(msg)
    return obj


@overload
def quantizable(obj: _T, /) -> _T: ...
@overload
def quantizable(
    *,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    skip: Iterable[Any] | None = None,
) -> Callable[[_T], _T]: ...
def quantizable(
    obj: Any = None,
    /,
    *,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    skip: Iterable[Any] | None = None,
) -> Any:
    """Mark a module class or a function as quantizable, and bind options to it.

    The class stays a float class: its instances are quantized by :func:`fastforward.quantize_model`,
    :func:`fastforward.quantize` or the toggle, which then use these options. A function is quantized where a quantized
    module calls it, or by :func:`fastforward.quantized`.

    Args:
        obj: The class or function, when used as a plain decorator.
        operator_table: Operator table for this class; the bundled one if not given.
        replacement_patterns: :class:`~fastforward.autoquant.PatternRule` objects, applied to the source first.
        skip: Names of methods and helpers, or the functions themselves, that stay as they are.

    Returns:
        The same object (or a decorator, when called with options only).

    Raises:
        TypeError: Neither a module class nor a function.
        AutoquantError: No Python source: a builtin, a lambda, a class whose forward is not Python.
        SourceMismatchError: The file on disk is not the code that runs.

    Example:
        >>> import fastforward as ff, torch
        >>> @ff.quantizable
        ... class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
    """
    options: dict[str, Any] = {
        "operator_table": operator_table,
        "replacement_patterns": replacement_patterns,
        "skip": skip,
    }
    if obj is None:
        return lambda decorated: prepare(decorated, **options)
    return prepare(obj, **options)


def _skip_names(skip: Iterable[Any] | None) -> frozenset[str]:
    if skip is None:
        return frozenset()
    return frozenset(item if isinstance(item, str) else item.__name__ for item in skip)
