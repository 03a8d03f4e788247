"""Calls that the text form leaves as they are although execution would follow them: a call in, the reason out.

The text names the quantized form of a callee, so it needs the callee when it is written. What a registry, a closure or
an attribute of the instance holds is known only at run time, and may be another thing in the next instance. Modules are
no such case: they have quantized classes of their own.
"""

import ast
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from fastforward.autoquant import known_names
from fastforward.autoquant.marks import Resolver
from fastforward.autoquant.unknown import arguments

_CHILDREN = frozenset({"children", "modules", "named_children", "named_modules", "items", "values"})
_MISSING = object()


class Unresolved:
    """Says of the calls of one function whose callee is unknown why they stay as they are.

    Args:
        node: The function's AST.
        me: What the function calls the instance it runs on; empty for a plain function.
        instances: The instances, as far as they are known.
        resolve: Name or attribute chain -> the object it means.
        may_be_tensor: Expression -> whether it can be a tensor.
    """

    def __init__(
        self,
        node: ast.AST,
        me: str,
        instances: Collection[torch.nn.Module],
        resolve: Resolver,
        may_be_tensor: Callable[[ast.expr], bool],
    ) -> None:
        self.me, self.instances, self.resolve, self.may_be_tensor = me, instances, resolve, may_be_tensor
        self.modules: set[str] = set()
        bindings = list(_bindings(node))
        known = -1
        while known != len(self.modules):
            known = len(self.modules)
            for target, value in bindings:
                if self._gives_modules(value):
                    self.modules |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}

    def reason(self, call: ast.Call) -> str:
        """The reason; empty if nothing is lost."""
        callee = call.func
        if isinstance(callee, ast.Attribute) and hasattr(torch.Tensor, callee.attr):
            return ""  # the table of operators has decided about it
        if not any(map(self.may_be_tensor, arguments(call))) or self._is_module(callee):
            return ""
        return "the callee is known only at run time"

    def _is_module(self, expression: ast.expr) -> bool:
        """Whether ``expression`` is a module, a part of a container of modules, or a method of one."""
        if isinstance(expression, ast.Name) and expression.id in self.modules:
            return True
        if isinstance(expression, ast.Call):
            return self._gives_modules(expression)
        if not isinstance(expression, (ast.Attribute, ast.Subscript)):
            return False
        return self._is_stored(expression) or self._is_module(expression.value)

    def _is_stored(self, expression: ast.expr) -> bool:
        """Whether ``self.a.b`` is a module wherever it is something, in all instances."""
        path = _path(expression, self.me)
        found = [_below(instance, path) for instance in self.instances] if path is not None else []
        return len(found) > 0 and all(value is None or isinstance(value, torch.nn.Module) for value in found)

    def _gives_modules(self, value: ast.expr) -> bool:
        """Whether what is bound to ``value``, or runs over it, is a module."""
        if isinstance(value, ast.Call):
            callee = value.func
            if isinstance(callee, ast.Attribute) and callee.attr in _CHILDREN:
                return self._gives_modules(callee.value)
            if isinstance(callee, ast.Name) and callee.id in known_names.CONTAINER_CALLS:
                return any(map(self._gives_modules, value.args))
            made = self.resolve(callee)
            return isinstance(made, type) and issubclass(made, torch.nn.Module)
        if isinstance(value, (ast.Tuple, ast.List)):
            return any(map(self._gives_modules, value.elts))
        if isinstance(value, ast.Subscript):
            return self._gives_modules(value.value)
        return self._is_module(value) or self._is_stored(value)


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.For, ast.AsyncFor, ast.comprehension)):
            yield inner.target, inner.iter
        elif isinstance(inner, ast.Assign):
            yield inner.targets[0], inner.value


def _path(expression: ast.expr, me: str) -> list[str] | None:
    """``["a", "b"]`` of ``me.a.b``; None for what is not below ``me``."""
    names: list[str] = []
    while isinstance(expression, ast.Attribute):
        names.append(expression.attr)
        expression = expression.value
    return names[::-1] if me and isinstance(expression, ast.Name) and expression.id == me else None


def _below(value: Any, path: list[str]) -> Any:
    """``value.a.b``; None where there is no such thing, and ``_MISSING`` where only code of the user could tell."""
    for name in path:
        held = getattr(value, "__dict__", {})
        plain = getattr(type(value), "__getattr__", None) in (None, torch.nn.Module.__getattr__)
        value = held.get("_modules", {}).get(name, held.get(name, None if plain else _MISSING))
    return value
