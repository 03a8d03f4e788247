"""The names of one function scope: how they are bound, and which of them must never be rebound to a quantized copy."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from fastforward.autoquant.local_imports import LocalImport, imports_of
from fastforward.autoquant.source import FunctionNode


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
        outer: The scope around it, for a function within a function.
        inline_only: Names that are never rebound.
        declared: Names that a ``global`` or ``nonlocal`` statement gives away.
        reads: ``id`` of a name that an operator reads -> the operand.
        imports: Names that an import statement in the body binds; ``None`` for one that is bound otherwise too.
        nested: ``id`` of a function within it -> that function's scope.
        functions: The scopes of those that have a name.
        statements: The nodes of the body that may give a tensor another name or change it.
    """

    node: FunctionNode
    outer: Optional["Frame"] = None
    locals: set[str] = field(default_factory=set)
    inline_only: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    operands: dict[str, Use] = field(default_factory=dict)
    reads: dict[int, ast.expr] = field(default_factory=dict)
    imports: dict[str, LocalImport | None] = field(default_factory=dict)
    nested: dict[int, "Frame"] = field(default_factory=dict)
    functions: dict[str, "Frame"] = field(default_factory=dict)
    statements: list[ast.AST] = field(default_factory=list)

    @property
    def body(self) -> list[Any]:
        """Its statements; of a lambda, the expression."""
        return self.node.body if isinstance(self.node.body, list) else [self.node.body]

    def bind(self, name: str) -> None:
        """Note a binding of ``name`` that is no import."""
        self.locals.add(name)
        self.imports[name] = None

    def bind_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Note the names that an import statement binds."""
        for name, what in imports_of(node).items():
            self.imports[name] = what if name not in self.locals else None
            self.locals.add(name)

    def rebinds(self, name: str) -> bool:
        """Whether a statement binds ``name``; an argument alone does not count."""
        return name in self.imports

    def owns(self, name: str) -> bool:
        """Whether ``name`` is a variable of this scope, not of one around it."""
        return name in self.locals and name not in self.declared


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


def scan(node: FunctionNode, outer: Frame | None = None) -> Frame:
    """Collect the names of a function and of those within it."""
    frame = Frame(node, outer)
    frame.locals.update(argument.arg for argument in parameters(node.args))
    for child in frame.body:
        _scan_node(child, frame)
    if isinstance(node, ast.Lambda):
        frame.inline_only |= frame.locals
    return frame


_NAMING: tuple[type[ast.AST], ...] = (
    *(ast.AnnAssign, ast.Assign, ast.AsyncFor, ast.AsyncWith, ast.AugAssign, ast.Call, ast.Delete, ast.For, ast.Match),
    *(ast.NamedExpr, ast.Return, ast.With, ast.Yield, ast.YieldFrom, ast.comprehension),
)


def _scan_node(node: ast.AST, frame: Frame) -> None:
    if isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Load):
            frame.bind(node.id)
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        _scan_function(node, frame)
        return
    if isinstance(node, ast.ClassDef):
        frame.bind(node.name)
        frame.inline_only |= _given_away(node)
        return
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        frame.inline_only.update(node.names)
        frame.declared.update(node.names)
    elif isinstance(node, ast.comprehension):
        frame.inline_only.update(inner.id for inner in ast.walk(node.target) if isinstance(inner, ast.Name))
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        frame.bind(node.name)
        frame.inline_only.add(node.name)
    elif isinstance(node, ast.MatchMapping) and node.rest:
        frame.bind(node.rest)
        frame.inline_only.add(node.rest)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        frame.bind_import(node)
    elif isinstance(node, ast.Compare):
        frame.inline_only.update(_identified(node))
    if isinstance(node, _NAMING):
        frame.statements.append(node)
    for child in ast.iter_child_nodes(node):
        _scan_node(child, frame)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        named = {target.id: frame.nested[id(node.value)] for target in node.targets if isinstance(target, ast.Name)}
        frame.functions.update(named)


def _scan_function(node: FunctionNode, frame: Frame) -> None:
    """Note a function within the function: its defaults and decorators belong to the scope around it."""
    around = [*node.args.defaults, *filter(None, node.args.kw_defaults), *getattr(node, "decorator_list", [])]
    for expression in around:
        _scan_node(expression, frame)
    inner = frame.nested[id(node)] = scan(node, frame)
    if not isinstance(node, ast.Lambda):
        frame.bind(node.name)
        frame.functions[node.name] = inner
        frame.inline_only |= _given_away(node)


def _given_away(node: ast.AST) -> set[str]:
    """Names that something within ``node`` declares ``nonlocal``."""
    return {name for inner in ast.walk(node) if isinstance(inner, ast.Nonlocal) for name in inner.names}


def _identified(node: ast.Compare) -> set[str]:
    """Names compared by identity with each other (``if key is value:``): quantized copies would compare differently."""
    if not any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
        return set()
    sides = [node.left, *node.comparators]
    names = {side.id for side in sides if isinstance(side, ast.Name)}
    return names if not any(isinstance(side, ast.Constant) for side in sides) else set()
