"""What rewritten code finds at its sites, and the form of a scope that compilers trace.

A compiler cannot look for things as eager execution does (``scope.py``): it can only compare callables. So it goes by
what eager execution noted at each call site.
"""

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from fastforward.autoquant.dynamic import apply
from fastforward.autoquant.overriding import in_place_of
from fastforward.exceptions import QuantizationError

if TYPE_CHECKING:
    from fastforward.autoquant.scope import Scope

STATIC, DYNAMIC, FUNCTION, METHOD, OBJECT, CONSTANT, MODULE, OWN_METHOD = range(8)


Known = tuple[int, Any, Any, "Scope | None"]
"""What eager execution found at a call site: how it was called, the callee, what is called instead, and its scope."""


class Sites:
    """The sites of one call path.

    Attributes:
        plan: For each site its active quantizer, or ``None`` while a stub stands there.
    """

    __slots__ = ()
    plan: list[Any]

    def q(self, index: int, value: Any) -> Any:
        """Quantize ``value`` at site ``index``."""
        quantizer = self.plan[index]
        return value if quantizer is None else apply(quantizer, value)

    def op(self, index: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call an operator that was found at run time, and quantize its result at site ``index``."""
        return self.q(index, function(*args, **kwargs))

    def visible(self, _: int, names: Any) -> Any:
        """``locals()`` or ``dir()`` without what rewriting added."""
        if isinstance(names, list):
            return [name for name in names if not name.startswith("_ff")]
        return {name: value for name, value in names.items() if not name.startswith("_ff")}


class CompiledScope(Sites):
    """``scope`` for compilers, without slots, which those before torch 2.7 cannot read."""

    def __init__(self, scope: "Scope") -> None:
        self.scope, self.plan = scope, scope.plan

    def dispatch(self, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """As in the scope."""
        return self.scope.dispatch(index, function)

    def callee(self, number: int, function: Any) -> Any:
        """What to call for ``function``: what eager execution found there."""
        if not is_dynamo_compiling():  # a function that goes on by itself after a graph break
            return self.scope.callee(number, function)
        if (ours := in_place_of(function)) is not None:
            return ours
        known, owner = self.scope.memo.get(number, ()), self.scope.owner
        if (
            not known
            and function is torch.backends.mha.get_fastpath_enabled
            and owner is not None
            and not owner._float_only
        ):
            return functools.partial(_given, False)  # as the scope finds out in an eager run
        for how, callee, what, _ in known:
            if how == CONSTANT:
                return functools.partial(_given, what)
            if how == METHOD:
                if len(known) == 1 or _is_method(function, callee):
                    return functools.partial(what, function.__self__)
            elif how == OWN_METHOD:  # compilers take `super().name` for no method
                if len(known) == 1 or _is_method(function, callee):
                    return functools.partial(what, self.scope.owner)
            elif how == OBJECT:
                if type(function) is callee:
                    return functools.partial(what, function)
            elif function is callee:
                return self._again(how, what, function)
        for how, callee, what, _ in known:
            if callee is None:
                return self._again(how, what, function)
        self._check(number, function, known)
        return function

    def _again(self, how: int, what: Any, function: Any) -> Callable[..., Any]:
        if how == STATIC:
            return functools.partial(self.op, what, function)
        return functools.partial(what.call, function) if how == DYNAMIC else what

    def _check(self, number: int, function: Any, known: tuple[Known, ...]) -> None:
        """Refuse to pass over quantizers."""
        names = [child.unit.original.co_name for *_, child in known if child is not None and child.is_active()]
        # Compilers cannot say of everything what its name is.
        if self.scope.is_pending() or (names and getattr(function, "__name__", "") in names):
            unit = self.scope.unit
            where = f"{unit.original.co_filename}:{unit.call_lines[number]}"
            msg = f"{where} calls what no eager run of the model called: run the model once before compiling it"
            raise QuantizationError(msg)


class QuietScope(CompiledScope):
    """``scope`` for compilers while no quantizer acts in it, nor in what it calls: its type is all they look at.

    What they read in tracing they check again before every call of the program.
    """

    def q(self, index: int, value: Any) -> Any:
        """The value as it is."""
        return value

    def op(self, index: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What the operator gives."""
        return function(*args, **kwargs)

    def callee(self, number: int, function: Any) -> Any:
        """The function as it is written: rewritten, it would do the same."""
        return function if is_dynamo_compiling() else self.scope.callee(number, function)


def _given(value: Any) -> Any:
    return value


def _is_method(function: Any, callee: Any) -> bool:
    """Whether ``function`` is the method ``callee`` of some instance, to a compiler; older ones cannot tell."""
    return isinstance(function, types.MethodType) and function.__func__ is callee
