"""The names of one function scope: how they are bound, and which of them must never be rebound to a quantized copy."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastforward.autoquant.local_imports import LocalImport, imports_of
from fastforward.autoquant.source import FunctionNode

# Methods of a tensor whose results may share its memory.
_VIEWS = frozenset(
    ["chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "movedim", "narrow", "permute"]
    + ["ravel", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split"]
    + ["transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"]
)
_TAKING_IN = frozenset(("append", "extend", "insert"))


class Definition(NamedTuple):
    """One binding of a local name: where, and the expression it is bound to (``None`` when that is not one)."""

    node: ast.AST
    value: ast.expr | None


class Use(NamedTuple):
    """The first operator that reads a name, and by which of its parameters."""

    operator: str
    argument: str


@dataclass
class Frame:
    """One function scope: its names, how they are bound, and which of them operators read.

    Attributes:
        inline_only: Names that are never rebound.
        changed: Those of them whose objects are changed in place.
        same: Names whose objects may be the same, share memory, or contain one another.
        imports: Names that an import statement in the body binds; ``None`` for one that is bound otherwise too.
    """

    node: FunctionNode
    locals: set[str] = field(default_factory=set)
    inline_only: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    same: list[set[str]] = field(default_factory=list)
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    operands: dict[str, Use] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)
    imports: dict[str, LocalImport | None] = field(default_factory=dict)

    def bind(self, name: str) -> None:
        """Note a binding of ``name`` that is no import."""
        self.locals.add(name)
        self.imports[name] = None

    def bind_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Note the names that an import statement binds."""
        for name, what in imports_of(node).items():
            self.imports[name] = what if name not in self.locals else None
            self.locals.add(name)


def parameters(arguments: ast.arguments) -> Iterator[ast.arg]:
    """The parameters of a function, in order."""
    yield from arguments.posonlyargs
    yield from arguments.args
    if arguments.vararg:
        yield arguments.vararg
    yield from arguments.kwonlyargs
    if arguments.kwarg:
        yield arguments.kwarg


def parameter_called(arguments: ast.arguments, name: str) -> ast.AST:
    """The parameter called ``name``."""
    return next(argument for argument in parameters(arguments) if argument.arg == name)


def scan(body: list[Any], frame: Frame) -> None:
    """Collect the local names of a function body, and those that must not be rebound to a quantized copy."""
    for child in body:
        _scan_node(child, frame)
    _spread(frame)


def _spread(frame: Frame) -> None:
    """What changes in place under one name changes under the others that it has, and none of them is rebound."""
    known = -1
    while known != len(frame.changed):
        known = len(frame.changed)
        for names in frame.same:
            if not names.isdisjoint(frame.changed):
                frame.changed |= names
    frame.inline_only |= frame.changed


def _same_objects(node: ast.AST) -> Iterator[set[str]]:
    """The names that ``node`` gives to objects which have names already, with those."""
    if isinstance(node, ast.Assign):
        yield _shared(node.targets, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
        yield _shared([node.target], node.value)
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        yield _shared([node.target], node.iter)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TAKING_IN:
        for argument in node.args:
            yield _shared([node.func.value], argument)


def _shared(targets: list[ast.expr], value: ast.expr | None) -> set[str]:
    held = set() if value is None else set(_held(value))
    named = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return held | named if held else set()


def _held(value: ast.expr) -> Iterator[str]:
    """Names whose tensor ``value`` is, contains or is a view of; calls of functions are taken to make new ones."""
    if isinstance(value, ast.Name):
        yield value.id
    elif isinstance(value, (ast.Subscript, ast.Starred, ast.NamedExpr)):
        yield from _held(value.value)
    elif isinstance(value, (ast.List, ast.Tuple, ast.Set)):
        for item in value.elts:
            yield from _held(item)
    elif isinstance(value, (ast.Dict, ast.BoolOp)):
        for item in value.values:
            yield from _held(item)
    elif isinstance(value, ast.IfExp):
        yield from _held(value.body)
        yield from _held(value.orelse)
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _VIEWS:
        yield from _held(value.func.value)


def _scan_node(node: ast.AST, frame: Frame) -> None:
    if isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Load):
            frame.bind(node.id)
        return
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        frame.inline_only.update(node.names)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        frame.bind(node.name)
        frame.inline_only.update(
            name for inner in ast.walk(node) if isinstance(inner, ast.Nonlocal) for name in inner.names
        )
        return
    elif isinstance(node, ast.Lambda):
        return
    elif isinstance(node, ast.comprehension):
        frame.inline_only.update(inner.id for inner in ast.walk(node.target) if isinstance(inner, ast.Name))
    elif isinstance(node, ast.AugAssign):
        frame.changed.update(_changed(node.target))
    elif isinstance(node, (ast.Assign, ast.Delete)):
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                frame.changed.update(_changed(target))
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        frame.bind(node.name)
        frame.inline_only.add(node.name)
    elif isinstance(node, ast.MatchMapping) and node.rest:
        frame.bind(node.rest)
        frame.inline_only.add(node.rest)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        frame.bind_import(node)
    elif isinstance(node, ast.Call):
        frame.changed.update(_changed_by_call(node))
    elif isinstance(node, ast.Compare):
        frame.inline_only.update(_identified(node))
    frame.same += _same_objects(node)
    for child in ast.iter_child_nodes(node):
        _scan_node(child, frame)


def _changed(target: ast.expr) -> set[str]:
    """The name whose object an assignment to ``target`` changes."""
    while isinstance(target, (ast.Subscript, ast.Attribute)):
        target = target.value
    return {target.id} if isinstance(target, ast.Name) else set()


def _identified(node: ast.Compare) -> set[str]:
    """Names compared by identity with each other (``if key is value:``): quantized copies would compare differently."""
    if not any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
        return set()
    sides = [node.left, *node.comparators]
    names = {side.id for side in sides if isinstance(side, ast.Name)}
    return names if not any(isinstance(side, ast.Constant) for side in sides) else set()


def _changed_by_call(node: ast.Call) -> set[str]:
    """Names whose tensor a call changes: ``x.add_(...)``, ``out=x``, ``relu(x, inplace=True)``."""
    changed: set[str] = set()
    callee = node.func
    if isinstance(callee, ast.Attribute) and callee.attr.endswith("_") and not callee.attr.endswith("__"):
        changed |= _changed(callee.value)
    for keyword in node.keywords:
        if keyword.arg == "out":
            changed |= _changed(keyword.value)
        elif keyword.arg == "inplace" and node.args:
            changed |= _changed(node.args[0])
    return changed


def works_in_place(node: ast.Call) -> bool:
    """``relu(x, inplace=True)``: the result is the first argument itself."""
    flags = [keyword.value for keyword in node.keywords if keyword.arg == "inplace"]
    return bool(flags and node.args) and not (isinstance(flags[0], ast.Constant) and not flags[0].value)
