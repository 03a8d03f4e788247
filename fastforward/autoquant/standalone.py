"""Makes a function independent of the module and class it was written in: AST in, the same AST changed out.

Globals are spelled so that the generated module finds the same objects; ``super()``, ``__class__`` and private names,
which mean the class they were written in, are spelled out.
"""

import ast
import importlib.util
import inspect
import types
from collections.abc import Iterator
from typing import Any

from fastforward.autoquant.imports import Imports, dotted, is_builtin
from fastforward.autoquant.source import FunctionNode
from fastforward.exceptions import AutoquantError

_FUTURE_ANNOTATIONS = __import__("__future__").annotations.compiler_flag


def make_standalone(
    node: FunctionNode, function: types.FunctionType, written_in: type | None, imports: Imports
) -> FunctionNode:
    """Spell out what ``node`` takes from its surroundings.

    Args:
        node: A function's AST; it is changed.
        function: The live function.
        written_in: The class in whose body it was written, if any.
        imports: Collects what the generated module must import.

    Returns:
        ``node``.
    """
    rewriter = _Standalone(node, function, written_in, imports)
    new: FunctionNode = rewriter.visit(node)
    return new


class _Standalone(ast.NodeTransformer):
    def __init__(
        self, node: FunctionNode, function: types.FunctionType, written_in: type | None, imports: Imports
    ) -> None:
        self.function, self.written_in, self.imports = function, written_in, imports
        self.bound = bound_names(node)
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.first = arguments[0].arg if arguments else ""
        self.root = node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        node.id = self.mangled(node.id)
        if node.id == "__class__" and self.written_in is not None:
            return dotted(self.imports.object(self.written_in))
        if node.id in self.bound or not isinstance(node.ctx, ast.Load):
            return node
        return self.imports.expression(node.id, self.function.__globals__) or node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        node.attr = self.mangled(node.attr)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Call(self, node: ast.Call) -> ast.expr:
        bare = isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args
        if bare and self.written_in is not None and self.first:
            node.args = [dotted(self.imports.object(self.written_in)), ast.Name(self.first, ast.Load())]
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = self.annotation(node.annotation)
        return node

    def visit_FunctionDef(self, node: Any) -> Any:
        node.returns = self.annotation(node.returns)
        returns, node.returns = node.returns, None
        self.generic_visit(node)
        node.returns = returns
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        # Annotations of local names are never evaluated.
        node.target = self.visit(node.target)
        node.value = node.value and self.visit(node.value)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        package = self.function.__globals__.get("__package__") or ""
        if node.level and package:
            node.module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            node.level = 0
        return node

    def annotation(self, node: ast.expr | None) -> ast.expr | None:
        """An annotation that can be evaluated in the generated module; as text where that is not certain."""
        if node is None or isinstance(node, ast.Constant):
            return node
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        known = all(name in self.function.__globals__ or is_builtin(name) for name in names)
        if self.function.__code__.co_flags & _FUTURE_ANNOTATIONS or not known:
            return ast.Constant(ast.unparse(node))
        new: ast.expr = self.visit(node)
        return new

    def mangled(self, name: str) -> str:
        """A private name as the class it was written in has it."""
        if self.written_in is None or not name.startswith("__") or name.endswith("__"):
            return name
        return f"_{self.written_in.__name__.lstrip('_')}{name}"


def bound_names(node: ast.AST) -> set[str]:
    """Names that a function or anything nested in it binds."""
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            names.add(inner.id)
        elif isinstance(inner, ast.arg):
            names.add(inner.arg)
        elif isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and inner is not node:
            names.add(inner.name)
        elif isinstance(inner, ast.alias):
            names.add((inner.asname or inner.name).partition(".")[0])
        elif isinstance(inner, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and inner.name:
            names.add(inner.name)
        elif isinstance(inner, ast.MatchMapping) and inner.rest:
            names.add(inner.rest)
    return names


def kept_decorators(node: Any, outer: Any) -> list[ast.expr]:
    """The decorators that the rendered function needs.

    Args:
        node: The definition.
        outer: What the class holds under the method's name, with all decorators applied.

    A decorator that returned the function itself (it only documents or registers it) has done its work already. What a
    base class's ``__init_subclass__`` wraps around the methods of its subclasses is none: see `wrapped_by_base`.

    Raises:
        AutoquantError: Something else, such as a decorator of the class, has wrapped the method; text cannot repeat it.
    """
    wrappers = [wrapper for wrapper in _wrappers(outer) if not _is_of_base(wrapper)]
    if not wrappers:
        return []
    if not node.decorator_list:
        code = wrappers[0].__code__
        msg = f"{code.co_filename}:{code.co_firstlineno}: wraps {node.name} from outside and cannot be written as text"
        raise AutoquantError(msg)
    origins = {_origin(wrapper) for wrapper in wrappers}
    named = [decorator for decorator in node.decorator_list if _decorator_name(decorator) in origins]
    return named if len(named) == len(wrappers) else list(node.decorator_list)


def wrapped_by_base(outer: Any) -> list[str]:
    """File, line and name of what a base class's ``__init_subclass__`` has wrapped around a method: text lacks it."""
    codes = [wrapper.__code__ for wrapper in _wrappers(outer) if _is_of_base(wrapper)]
    return [f"{code.co_filename}:{code.co_firstlineno}: {code.co_qualname}" for code in codes]


def _wrappers(outer: Any) -> Iterator[Any]:
    """What decorators and the like have put around a function, outermost first."""
    while hasattr(outer, "__wrapped__"):
        yield outer
        outer = outer.__wrapped__


def _is_of_base(wrapper: Any) -> bool:
    return _origin(wrapper) == "__init_subclass__"


def _origin(wrapper: Any) -> str:
    code = getattr(wrapper, "__code__", None)
    qualified = getattr(code, "co_qualname", "") or getattr(type(wrapper), "__qualname__", "")
    return qualified.partition(".<locals>")[0].rpartition(".")[2]


def _decorator_name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return str(getattr(called, "attr", None) or getattr(called, "id", ""))


def innermost(raw: Any) -> Any:
    """The function that was written in the class body, without wrappers."""
    function: Any = raw.fget if isinstance(raw, property) else raw
    return inspect.unwrap(function)
