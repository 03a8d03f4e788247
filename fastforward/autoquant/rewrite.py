"""The transformer: a marked function in, the function that runs out. Pure: AST in, AST out.

What it writes, with ``_ff`` being the scope of the call path (see ``scope.py``) and ``k`` the number of a site or call:

=========================  ==========================================
source                     rewritten
=========================  ==========================================
operand ``x``              ``_ff.q(k, x)``
definition ``x = ...``     ``x = _ff.q(k, ...)``, or ``x = _ff.q(k, x)`` right after it
``a + b``                  ``_ff.q(k, a + b)``
``F.linear(x, w)``         ``_ff.q(k, F.linear(x, w))``
``helper(x)``              ``_ff.callee(n, helper)(x)``
=========================  ==========================================

Operators and calls stay the user's own: no frame comes between, and nothing else holds the operands while they run.
Every new node has the position of the one it replaces: tracebacks, breakpoints and coverage stay on the user's lines.
"""

import ast
import sys
from typing import Any, TypeVar

from fastforward.autoquant.marks import Marks
from fastforward.autoquant.source import FunctionNode

SCOPE = "_ff"
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

    # -------------------------------------------------------------- expressions
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Left as it is: see ``marks.py``."""
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Left as it is: what is raised is no operand."""
        return node

    def visit_BinOp(self, node: ast.BinOp | ast.UnaryOp) -> ast.AST:
        site = self.marks.outputs.get(id(node))
        self.generic_visit(node)
        return node if site is None else _scope_call(node, "q", site.index, node)

    visit_UnaryOp = visit_BinOp

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
            if mark.operator is not None and mark.operator.dispatch_op is not None:
                return _resolved(node, "dispatch", mark.site.index)
            return _scope_call(node, "q", mark.site.index, node)
        return _resolved(node, "callee", mark.number)


def _at(place: ast.AST, node: _Node) -> _Node:
    return ast.copy_location(node, place)


def _scope_attribute(place: ast.AST, name: str) -> ast.expr:
    """``_ff.name``. A method call gets the last line of its attribute, so that decides the traceback's line."""
    node: ast.Attribute = _at(place, ast.Attribute(_at(place, ast.Name(SCOPE, ast.Load())), name, ast.Load()))
    if hasattr(node, "lineno"):
        node.end_lineno, node.end_col_offset = node.lineno, max(node.col_offset, len(name))
    return node


def _scope_call(place: ast.AST, method: str, number: int, *arguments: ast.expr) -> ast.expr:
    return _at(place, ast.Call(_scope_attribute(place, method), [_constant(place, number), *arguments], []))


def _constant(place: ast.AST, number: int) -> ast.expr:
    return _at(place, ast.Constant(number))


def _resolved(node: ast.Call, method: str, number: int) -> ast.expr:
    """``node`` with ``_ff.method(number, callee)`` in place of its callee."""
    callee = node.func
    node.func = _scope_call(callee, method, number, callee)
    if isinstance(callee, ast.Attribute) and _is_method_call(node) and callee.end_lineno is not None:
        # What the compiler does for a method call, which this was: it stands where the attribute's name does.
        node.lineno = callee.end_lineno
        node.col_offset = max((callee.end_col_offset or 0) - len(callee.attr.encode()), 0)
    return node


def _is_method_call(node: ast.Call) -> bool:
    """Whether Python calls an attribute without making the bound method first."""
    if any(isinstance(argument, ast.Starred) for argument in node.args):
        return False
    if sys.version_info < (3, 11):
        return not node.keywords
    return all(keyword.arg is not None for keyword in node.keywords)


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
    """Add the keyword-only argument ``_ff``; first of all a method looks its instance's scope up."""
    arguments = node.args
    arguments.kwonlyargs.append(_at(node, ast.arg(SCOPE)))
    arguments.kw_defaults.append(None)
    if isinstance(node, ast.Lambda):
        body = node.body
        entered = _at(body, ast.NamedExpr(_at(body, ast.Name(SCOPE, ast.Store())), _entering(body, arguments)))
        both = _at(body, ast.Tuple([entered, body], ast.Load()))
        node.body = _at(body, ast.Subscript(both, _constant(body, 1), ast.Load()))
        return
    at = _docstring_length(node.body)
    place = _first_executed(node.body[at:] or node.body)
    store = _at(place, ast.Name(SCOPE, ast.Store()))
    statement = ast.Assign(targets=[store], value=_entering(place, arguments), type_comment=None)
    node.body.insert(at, ast.copy_location(statement, place))


def _entering(place: ast.AST, arguments: ast.arguments) -> ast.expr:
    """``_ff.enter(self)``, with whatever the first argument is called."""
    me: list[ast.expr] = []
    if positional := [*arguments.posonlyargs, *arguments.args]:
        me = [_at(place, ast.Name(positional[0].arg, ast.Load()))]
    elif arguments.vararg:
        me = [_at(place, ast.Starred(_at(place, ast.Name(arguments.vararg.arg, ast.Load())), ast.Load()))]
    return _at(place, ast.Call(_scope_attribute(place, "enter"), me, []))
