"""What the names of a function are bound to: an AST in, for each name how its definitions take their kind out."""

import ast
from collections.abc import Callable
from typing import Any, TypeAlias

from fastforward.autoquant.kinds import Kind

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Definition: TypeAlias = tuple[str, Any]
"""How a definition takes its kind, and from what: ``("value", expression)``, ``("element", iterable)``, ..."""


class Definitions:
    """The definitions of a function and of everything nested in it, names taken together.

    Args:
        node: The function.

    Attributes:
        names: Name, or ``self.<attribute>`` where that is assigned -> its definitions.
        functions: The function and those nested in it.
        self_name: Name of the first parameter of a method, empty for a plain function.
    """

    def __init__(self, node: FunctionNode) -> None:
        self.names: dict[str, list[Definition]] = {}
        self.functions: list[FunctionNode] = []
        self.self_name = first_parameter(node)
        self._collect_function(node)

    def _collect_function(self, node: FunctionNode) -> None:
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            self._define(argument.arg, "annotation", argument.annotation)
        for collector in filter(None, (arguments.vararg, arguments.kwarg)):
            self._define(collector.arg, "kind", Kind.OBJECT)
        self.functions.append(node)
        for child in node.body if isinstance(node.body, list) else [node.body]:
            self._collect(child)

    def _collect(self, node: ast.AST) -> None:
        stack = [node]
        while stack:
            current = stack.pop()
            collector = _COLLECTORS.get(type(current))
            if collector is not None and collector(self, current):
                continue
            for name in current._fields:
                value = getattr(current, name, None)
                if isinstance(value, ast.AST):
                    stack.append(value)
                elif isinstance(value, list):
                    stack.extend(item for item in value if isinstance(item, ast.AST))

    def _define(self, name: str, how: str, what: Any) -> None:
        self.names.setdefault(name, []).append((how, what))

    def _bind(self, target: ast.AST, how: str, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._define(target.id, how, value)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, "kind", Kind.OBJECT)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._bind_parts(target.elts, how, value)
        elif (
            isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name)
            and target.value.id == self.self_name
        ):
            self._define(f"{self.self_name}.{target.attr}", how, value)

    def _bind_parts(self, targets: list[ast.expr], how: str, value: Any) -> None:
        if how == "value" and _matches(targets, value):
            for target, part in zip(targets, value.elts, strict=True):
                self._bind(target, "value", part)
            return
        parts = self._iterated_parts(value, len(targets)) if how == "element" else None
        for index, target in enumerate(targets):
            if parts is not None:
                self._bind(target, *parts[index])
            else:
                self._bind(target, "element of " + how, value)

    def _iterated_parts(self, iterable: ast.expr, count: int) -> list[tuple[str, Any]] | None:
        """What ``enumerate`` and ``zip`` yield, part by part."""
        if not isinstance(iterable, ast.Call) or not isinstance(iterable.func, ast.Name):
            return None
        if iterable.func.id == "enumerate" and count == 2 and iterable.args:
            return [("kind", Kind.INT), ("element", iterable.args[0])]
        if iterable.func.id == "zip" and count == len(iterable.args):
            return [("element", argument) for argument in iterable.args]
        return None

    def _collect_assign(self, node: ast.Assign) -> bool:
        for target in node.targets:
            self._bind(target, "value", node.value)
        return False

    def _collect_annotated(self, node: ast.AnnAssign) -> bool:
        self._bind(node.target, "annotated", node)
        return False

    def _collect_augmented(self, node: ast.AugAssign) -> bool:
        self._bind(node.target, "augmented", node)
        return False

    def _collect_walrus(self, node: ast.NamedExpr) -> bool:
        self._bind(node.target, "value", node.value)
        return False

    def _collect_loop(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> bool:
        self._bind(node.target, "element", node.iter)
        return False

    def _collect_with(self, node: ast.withitem) -> bool:
        if node.optional_vars is not None:
            self._bind(node.optional_vars, "kind", Kind.MAYBE)
        return False

    def _collect_named(self, node: Any) -> bool:
        for name in (getattr(node, "name", None), getattr(node, "rest", None)):
            if name is not None:
                self._define(name, "kind", Kind.OBJECT if isinstance(node, ast.ExceptHandler) else Kind.MAYBE)
        return False

    def _collect_scope_names(self, node: ast.Global | ast.Nonlocal) -> bool:
        for name in node.names:
            self._define(name, "kind", Kind.MAYBE)
        return False

    def _collect_import(self, node: ast.Import | ast.ImportFrom) -> bool:
        for alias in node.names:
            self._define((alias.asname or alias.name).partition(".")[0], "kind", Kind.MAYBE)
        return False

    def _collect_nested(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> bool:
        if not isinstance(node, ast.Lambda):
            self._define(node.name, "kind", Kind.OBJECT)
        self._collect_function(node)
        return True

    def _collect_class(self, node: ast.ClassDef) -> bool:
        self._define(node.name, "kind", Kind.OBJECT)
        return False


def first_parameter(node: FunctionNode) -> str:
    """``self`` or ``cls``, where that is a function's first parameter."""
    positional = [*node.args.posonlyargs, *node.args.args]
    return positional[0].arg if positional and positional[0].arg in ("self", "cls") else ""


def _matches(targets: list[ast.expr], value: Any) -> bool:
    """Whether ``value`` is a display with one element for each target."""
    if not isinstance(value, (ast.Tuple, ast.List)) or len(value.elts) != len(targets):
        return False
    return not any(isinstance(item, ast.Starred) for item in (*targets, *value.elts))


_COLLECTORS: dict[type, Callable[[Definitions, Any], bool]] = {
    ast.Assign: Definitions._collect_assign,
    ast.AnnAssign: Definitions._collect_annotated,
    ast.AugAssign: Definitions._collect_augmented,
    ast.NamedExpr: Definitions._collect_walrus,
    ast.For: Definitions._collect_loop,
    ast.AsyncFor: Definitions._collect_loop,
    ast.comprehension: Definitions._collect_loop,
    ast.withitem: Definitions._collect_with,
    ast.ExceptHandler: Definitions._collect_named,
    ast.MatchAs: Definitions._collect_named,
    ast.MatchStar: Definitions._collect_named,
    ast.MatchMapping: Definitions._collect_named,
    ast.Global: Definitions._collect_scope_names,
    ast.Nonlocal: Definitions._collect_scope_names,
    ast.Import: Definitions._collect_import,
    ast.ImportFrom: Definitions._collect_import,
    ast.FunctionDef: Definitions._collect_nested,
    ast.AsyncFunctionDef: Definitions._collect_nested,
    ast.Lambda: Definitions._collect_nested,
    ast.ClassDef: Definitions._collect_class,
}
