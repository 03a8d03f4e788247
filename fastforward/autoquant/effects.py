"""What live functions do with their arguments: a function in, its :class:`Effects` out, found from its source once.

Methods are looked up in the class around, as it stands in its module; ``self.layer(...)`` in what the class's
``__init__`` makes.
"""

import ast
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastforward.autoquant.aliases import Aliases
from fastforward.autoquant.callees import UNKNOWN, Callees, Effects
from fastforward.autoquant.changing import may_change
from fastforward.autoquant.frames import scan
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.source import likely

Resolver = Callable[[ast.expr], Any]
_INPUT = ast.arguments([], [ast.arg("input")], None, [], [], None, [])
_IN_PLACE = Effects(_INPUT, frozenset(["input"]), frozenset(["input"]))
_HANDED_BACK = Effects(_INPUT, returned=frozenset(["input"]))
# Layers of torch that hand their input back where they have nothing to do (outside training).
_IDLE = (torch.nn.Identity, torch.nn.modules.dropout._DropoutNd)


class EffectsOf:
    """Finds and keeps the effects of functions.

    Args:
        table: The operator table.
        is_helper: Whether a function is one that is rewritten when reached; others are not looked into.
        resolver: Makes the lookup of names in a function.
    """

    def __init__(
        self,
        table: OperatorTable,
        is_helper: Callable[[types.FunctionType], bool],
        resolver: Callable[[types.FunctionType], Resolver],
    ) -> None:
        self.table, self.is_helper, self.resolver = table, is_helper, resolver
        self._known: dict[int, tuple[types.CodeType, Effects | None]] = {}

    def __call__(self, function: Any, only_changes: bool = False) -> Effects | None:
        """The effects of ``function``; ``None`` if it is not looked into, or changes nothing and only that counts."""
        function = inspect.unwrap(function) if callable(function) else None
        if not isinstance(function, types.FunctionType) or not self.is_helper(function):
            return None
        code = function.__code__
        if id(code) not in self._known:
            if only_changes and not may_change(function, self.is_helper):
                return None
            self._known[id(code)] = code, None  # where it calls itself
            self._known[id(code)] = code, self._find(function)
        return self._known[id(code)][1]

    def _find(self, function: types.FunctionType) -> Effects | None:
        found = likely(function)
        if found is None:
            return None
        resolve = self.resolver(function)
        return Aliases(scan(found.node), Callees(self.table, resolve, self, self.methods(found.chain, resolve))).effects

    def methods(self, chain: Sequence[ast.AST], resolve: Resolver) -> Callable[[str, bool, bool], Effects | None]:
        """The effects of ``self.name`` and ``super().name`` in the class in whose body a function stands."""
        cls = _class_around(chain, resolve)
        if cls is None:
            return lambda _, __, ___: None
        return functools.partial(self._of_attribute, cls)

    def _of_attribute(self, cls: type, name: str, above: bool, only_changes: bool) -> Effects | None:
        for owner in cls.__mro__[above:]:
            if name in vars(owner):
                raw = vars(owner)[name]
                found = self(getattr(raw, "__func__", raw), only_changes)
                return None if found is None else found._replace(given=not isinstance(raw, staticmethod))
        return None if above else self._of_layer(cls, name, only_changes)

    def _of_layer(self, cls: type, name: str, only_changes: bool) -> Effects | None:
        """The effects of calling a layer: of the first that may change its input, if there are several."""
        found = [self._of_made(made, call, only_changes) for made, call in self._made(cls, name)]
        return next((effects for effects in found if effects is not None and effects.changed), next(iter(found), None))

    def _of_made(self, made: type[torch.nn.Module], call: ast.Call, only_changes: bool) -> Effects | None:
        if _made_in_place(made, call):
            return _IN_PLACE
        if issubclass(made, _IDLE):
            return _HANDED_BACK
        forward = made.forward
        if made.__module__.startswith("torch.") or not isinstance(forward, types.FunctionType):
            return None
        found = self(forward, only_changes)
        return None if found is None else found._replace(given=1)

    def _made(self, cls: type, name: str) -> Iterator[tuple[type[torch.nn.Module], ast.Call]]:
        """The layers that ``__init__``, of a class or one above it, assigns to ``self.name``: class and call."""
        for owner in cls.__mro__:
            init = vars(owner).get("__init__")
            if (
                not isinstance(init, types.FunctionType)
                or name not in init.__code__.co_names
                or not self.is_helper(init)
            ):
                continue
            found = likely(init)
            for call in _assigned_calls(found.node, name) if found is not None else ():
                target = self.resolver(init)(call.func)
                if isinstance(target, type) and issubclass(target, torch.nn.Module):
                    yield target, call


def _assigned_calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    """The calls of ``self.name = f(...)`` in ``node``."""
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Assign) or not isinstance(inner.value, ast.Call):
            continue
        if any(isinstance(target, ast.Attribute) and target.attr == name for target in inner.targets):
            yield inner.value


def _made_in_place(made: type, call: ast.Call) -> bool:
    """``ReLU(inplace=True)``, ``ReLU(True)``."""
    names = list(inspect.signature(made).parameters)
    if "inplace" not in names:
        return False
    flags = [keyword.value for keyword in call.keywords if keyword.arg == "inplace"]
    flags += call.args[names.index("inplace") :][:1]
    return any(isinstance(flag, ast.Constant) and flag.value is True for flag in flags)


def _class_around(chain: Sequence[ast.AST], resolve: Resolver) -> type | None:
    """The live class in whose body a function stands, if it is one of its module."""
    expression: ast.expr | None = None
    for owner in chain:
        if not isinstance(owner, ast.ClassDef):
            return None
        load = ast.Load()
        expression = ast.Name(owner.name, load) if expression is None else ast.Attribute(expression, owner.name, load)
    found = UNKNOWN if expression is None else resolve(expression)
    return found if isinstance(found, type) else None
