"""The transformer: a marked function in, the function that runs out. Pure: AST in, AST out.

What it writes, with ``_ff`` being the scope of the call path (see ``scope.py``) and ``k`` the number of a site or call:

=========================  ==========================================
source                     rewritten
=========================  ==========================================
operand ``x``              ``_ff.q(k, x)``
definition ``x = ...``     ``x = _ff.q(k, ...)``, or ``x = _ff.q(k, x)`` right after it
``a + b``                  ``_ff.add(k, a, b)``
``x += y``                 ``x = _ff.iadd(k, x, y)``
``F.linear(x, w)``         ``_ff.op(k, F.linear, x, w)``
``helper(x)``              ``_ff.call(n, helper, x)``
=========================  ==========================================

Every new node has the position of the one it replaces: tracebacks, breakpoints and coverage stay on the user's lines.
"""

import ast
from typing import Any, TypeVar

from fastforward.autoquant.marks import Marks
from fastforward.autoquant.sites import Site
from fastforward.autoquant.source import FunctionNode

SCOPE = "_ff"
NO_SITE = -1

BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mult": "mul",
    "Div": "truediv",
    "FloorDiv": "floordiv",
    "Mod": "mod",
    "Pow": "pow",
    "MatMult": "matmul",
    "BitAnd": "and_",
    "BitOr": "or_",
    "BitXor": "xor",
    "LShift": "lshift",
    "RShift": "rshift",
}
UNARY = {"USub": "neg", "UAdd": "pos", "Invert": "invert"}

_Node = TypeVar("_Node", bound=ast.AST)


def rewrite(node: FunctionNode, marks: Marks) -> FunctionNode:
    """Turn a marked function into the one that runs, with ``_ff`` as one more keyword-only argument.

    Args:
        node: The function that was marked; it is changed, so pass a clone.
        marks: What :func:`~fastforward.autoquant.marks.mark` found in ``node``.

    Returns:
        ``node``.
    """
    _Rewriter(marks).function(node)
    _receive_scope(node)
    return node


class _Rewriter(ast.NodeTransformer):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def function(self, node: FunctionNode) -> FunctionNode:
        """Rewrite the body of ``node`` (its arguments' defaults belong to the enclosing scope)."""
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
            return node
        node.body = [statement for old in node.body for statement in self.statements(old)]
        at = _docstring_length(node.body)
        node.body[at:at] = self.rebinding(node.args, _first_executed(node.body[at:] or node.body))
        return node

    def statements(self, node: ast.stmt) -> list[ast.stmt]:
        """A rewritten statement, and what follows it."""
        is_binding = isinstance(node, ast.Assign)
        after = self.rebinding(node, node) if is_binding else []
        return [self.visit(node), *after]

    def rebinding(self, definition: ast.AST, place: ast.AST) -> list[ast.stmt]:
        """``name = _ff.q(k, name)`` for the names that ``definition`` binds."""
        return [
            ast.copy_location(
                ast.Assign(
                    targets=[_at(place, ast.Name(name, ast.Store()))],
                    value=_scope_call(place, "q", site.index, _at(place, ast.Name(name, ast.Load()))),
                    type_comment=None,
                ),
                place,
            )
            for name, site in self.marks.rebind.get(id(definition), ())
        ]

    # -------------------------------------------------------------- statements
    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Walk through ``node``; statement lists may grow, an expression may get its quantizer."""
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                value[:] = self._list(value)
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def _list(self, items: list[Any]) -> list[Any]:
        new: list[Any] = []
        for item in items:
            if isinstance(item, ast.stmt):
                new += self.statements(item)
            else:
                new.append(self.visit(item) if isinstance(item, ast.AST) else item)
        return new

    def visit(self, node: _Node) -> Any:
        """Rewrite ``node`` and put its quantizer around it, if it has one."""
        site = self.marks.inline.get(id(node))
        method = getattr(self, f"visit_{type(node).__name__}", self.generic_visit)
        new: Any = method(node)
        return new if site is None else _scope_call(node, "q", site.index, new)

    def visit_FunctionDef(self, node: Any) -> Any:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.visit(default) for default in node.args.kw_defaults]
        return self.function(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.visit(default) for default in node.args.kw_defaults]
        return self.function(node)

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body[:0] = self.rebinding(node, _evaluated_first(node.body[0]))
        return node

    visit_AsyncFor = visit_With = visit_AsyncWith = visit_For

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        marked = id(node) in self.marks.outputs
        self.generic_visit(node)
        if not marked:
            return node
        load, store = _twice(node.target)
        name = f"i{BINARY[type(node.op).__name__].rstrip('_')}"
        value = _scope_call(node, name, NO_SITE, load, node.value)
        return ast.copy_location(ast.Assign(targets=[store], value=value, type_comment=None), node)

    # -------------------------------------------------------------- expressions
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Left as it is: see ``marks.py``."""
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Left as it is: what is raised is no operand."""
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        marked, site = id(node) in self.marks.outputs, self.marks.outputs.get(id(node))
        self.generic_visit(node)
        if not marked:
            return node
        return _scope_call(node, BINARY[type(node.op).__name__], _number(site), node.left, node.right)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        marked, site = id(node) in self.marks.outputs, self.marks.outputs.get(id(node))
        self.generic_visit(node)
        if not marked:
            return node
        return _scope_call(node, UNARY[type(node.op).__name__], _number(site), node.operand)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        mark = self.marks.calls.get(id(node))
        self.generic_visit(node)
        if mark is None:
            return node
        if mark.kind == "locals":
            return _scope_call(node, "visible", mark.number, node)
        if mark.kind == "operator":
            if mark.site is None:
                return node
            custom = mark.operator is not None and mark.operator.dispatch_op is not None
            return _wrap_call(node, "dispatch" if custom else "op", mark.site.index)
        return _wrap_call(node, "call", mark.number)


def _number(site: Site | None) -> int:
    return NO_SITE if site is None else site.index


def _at(place: ast.AST, node: _Node) -> _Node:
    return ast.copy_location(node, place)


def _scope_attribute(place: ast.AST, name: str, line: int | None = None) -> ast.expr:
    """``_ff.name``. A method call gets the last line of its attribute, so that decides the traceback's line."""
    node: ast.Attribute = _at(place, ast.Attribute(_at(place, ast.Name(SCOPE, ast.Load())), name, ast.Load()))
    if line is not None or hasattr(node, "lineno"):
        node.end_lineno, node.end_col_offset = line or node.lineno, max(node.col_offset, len(name))
    return node


def _scope_call(place: ast.AST, method: str, number: int, *arguments: ast.expr) -> ast.expr:
    return _at(place, ast.Call(_scope_attribute(place, method), [_constant(place, number), *arguments], []))


def _constant(place: ast.AST, number: int) -> ast.expr:
    return _at(place, ast.Constant(number))


def _wrap_call(node: ast.Call, method: str, number: int) -> ast.expr:
    arguments = [_constant(node, number), node.func, *node.args]
    line = node.func.end_lineno if isinstance(node.func, ast.Attribute) else None
    return _at(node, ast.Call(_scope_attribute(node, method, line), arguments, node.keywords))


def _twice(target: ast.expr) -> tuple[ast.expr, ast.expr]:
    """Expressions that read and that store ``target``, evaluating its parts once, while reading."""
    if isinstance(target, ast.Name):
        return _at(target, ast.Name(target.id, ast.Load())), target
    assert isinstance(target, (ast.Attribute, ast.Subscript))
    read_base, store_base = _kept(target.value, "_ff_base")
    if isinstance(target, ast.Attribute):
        return (
            _at(target, ast.Attribute(read_base, target.attr, ast.Load())),
            _at(target, ast.Attribute(store_base, target.attr, ast.Store())),
        )
    read_key, store_key = _kept(_slice_as_call(target.slice), "_ff_key")
    return (
        _at(target, ast.Subscript(read_base, read_key, ast.Load())),
        _at(target, ast.Subscript(store_base, store_key, ast.Store())),
    )


def _kept(expression: ast.expr, name: str) -> tuple[ast.expr, ast.expr]:
    """``(name := expression)`` and ``name``; constants and names need no keeping."""
    if isinstance(expression, (ast.Constant, ast.Name)):
        return expression, _at(expression, type(expression)(**expression.__dict__))
    store = _at(expression, ast.Name(name, ast.Store()))
    kept = _at(expression, ast.NamedExpr(store, expression))
    return kept, _at(expression, ast.Name(name, ast.Load()))


def _slice_as_call(key: ast.expr) -> ast.expr:
    """``a:b`` as ``_ff.slice(a, b, None)``, so that it can be bound to a name."""
    if isinstance(key, ast.Tuple):
        return _at(key, ast.Tuple([_slice_as_call(element) for element in key.elts], ast.Load()))
    if not isinstance(key, ast.Slice):
        return key
    parts = [part if part is not None else _at(key, ast.Constant(None)) for part in (key.lower, key.upper, key.step)]
    return _at(key, ast.Call(_scope_attribute(key, "slice"), parts, []))


def _docstring_length(body: list[ast.stmt]) -> int:
    first = body[0]
    has = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return int(has)


def _first_executed(body: list[ast.stmt]) -> ast.AST:
    """What is executed first in the first statement that is more than a declaration."""
    executed = (statement for statement in body if not isinstance(statement, (ast.Global, ast.Nonlocal)))
    return _evaluated_first(next(executed, body[-1]))


def _evaluated_first(statement: ast.stmt) -> ast.AST:
    """The part of ``statement`` on whose line it begins to run: nothing runs on that of ``if (`` or ``with (``."""
    if isinstance(statement, (ast.If, ast.While, ast.Assert)):
        return statement.test
    if isinstance(statement, (ast.For, ast.AsyncFor)):
        return statement.iter
    if isinstance(statement, (ast.With, ast.AsyncWith)):
        return statement.items[0].context_expr
    return statement.subject if isinstance(statement, ast.Match) else statement


def _receive_scope(node: FunctionNode) -> None:
    """Add the keyword-only argument ``_ff``; a method looks its instance's scope up first."""
    arguments = node.args
    arguments.kwonlyargs.append(_at(node, ast.arg(SCOPE)))
    arguments.kw_defaults.append(None)
    if isinstance(node, ast.Lambda):
        return
    at = _docstring_length(node.body)
    place = _first_executed(node.body[at:] or node.body)
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional:
        me: ast.expr = _at(place, ast.Name(positional[0].arg, ast.Load()))
    elif arguments.vararg:
        me = _at(place, ast.Starred(_at(place, ast.Name(arguments.vararg.arg, ast.Load())), ast.Load()))
    else:
        return
    enter = _at(place, ast.Call(_scope_attribute(place, "enter"), [me], []))
    store = _at(place, ast.Name(SCOPE, ast.Store()))
    node.body.insert(at, ast.copy_location(ast.Assign(targets=[store], value=enter, type_comment=None), place))
