"""A marked function in, the tutorial's text of it out (as an AST): stubs called by name, operators as functionals.

=========================  ==================================================================
source                     text
=========================  ==================================================================
definition of ``x``        ``x = self.quantizer_x(x)`` right after it
operand ``self.weight``    ``self_weight = self.quantizer_self_weight(self.weight)`` before the statement
operand ``helper(x)``      ``_tmp_1 = quantized_helper(x, ...)``, ``_tmp_1 = self.quantizer__tmp_1(_tmp_1)`` before it
``a + b``                  ``fastforward.nn.functional.add(a, b, output_quantizer=self.quantizer_add)``
``helper(x)``              ``quantized_helper(x, quantizer_y=self.quantizer_helper_y, ...)``
=========================  ==================================================================

A part of a statement moves in front of it only where nothing that it could observe is evaluated before.
"""

import ast
from collections.abc import Callable
from typing import Any

import torch

from fastforward.autoquant.helpers import Callee, TextUnit
from fastforward.autoquant.imports import Imports, attribute, dotted, is_importable
from fastforward.autoquant.marks import CallMark
from fastforward.autoquant.optable import Operator, default_table, resolve
from fastforward.autoquant.sites import Site
from fastforward.autoquant.source import FunctionNode

Reference = Callable[[str], ast.expr]
_CALM = (ast.Name, ast.Constant, ast.Attribute, ast.expr_context, ast.operator, ast.keyword, ast.Starred)


class TextRewriter(ast.NodeTransformer):
    """Turns one unit's node into text form; used once.

    Args:
        unit: The unit; its node is changed.
        reference: Name of a quantizer -> the expression for it (``self.quantizer_x`` or ``quantizer_x``).
        callee: Callee -> the expression that calls its quantized form, or None to call it as before.
        imports: Where names that the text needs are imported.
    """

    def __init__(
        self,
        unit: TextUnit,
        reference: Reference,
        callee: Callable[[Callee], ast.expr | None],
        imports: Imports,
    ) -> None:
        self.unit, self.marks = unit, unit.marks
        self.reference, self.callee, self.imports = reference, callee, imports
        self.before: list[ast.stmt] = []
        self.movable = False
        self.moved: dict[str, str] = {}
        self.taken = {node.id for node in ast.walk(unit.node) if isinstance(node, ast.Name)}

    def run(self) -> FunctionNode:
        """Rewrite the unit's node and return it."""
        node: FunctionNode = self.function(self.unit.node)
        return node

    # ---------------------------------------------------------------- statements
    def function(self, node: Any) -> Any:
        """Rewrite the body of a function; its arguments' quantizers come first."""
        if isinstance(node, ast.Lambda):
            node.body = self.fixed(node.body)
            return node
        body = self.block(node.body)
        at = int(ast.get_docstring(node, clean=False) is not None)
        body[at:at] = self.rebinding(node.args)
        node.body = body
        return node

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Rewrite a list of statements."""
        return [new for statement in statements for new in self.statement(statement)]

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        """A rewritten statement, with what comes before and after it."""
        outer = self.before, self.movable, self.moved
        self.before, self.movable, self.moved = [], True, {}
        after = self.after(node)
        new = self.visit(node)
        before = self.before
        self.before, self.movable, self.moved = outer
        return [*before, new, *after]

    def after(self, node: ast.stmt) -> list[ast.stmt]:
        """What quantizes the names that a simple statement binds."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            site = self.marks.inline.get(id(node.value))
            if isinstance(target, ast.Name) and site is not None and site.base == target.id:
                del self.marks.inline[id(node.value)]
                return [_assign(target.id, self.quantized(site, ast.Name(target.id, ast.Load())))]
        return self.rebinding(node) if isinstance(node, ast.Assign) else []

    def rebinding(self, definition: ast.AST) -> list[ast.stmt]:
        """``name = quantizer(name)`` for each name that a definition binds."""
        pairs = sorted(self.marks.rebind.get(id(definition), ()), key=lambda pair: pair[1].index)
        return [_assign(name, self.quantized(site, ast.Name(name, ast.Load()))) for name, site in pairs]

    def visit_FunctionDef(self, node: Any) -> Any:
        node.decorator_list = [self.fixed(decorator) for decorator in node.decorator_list]
        node.args.defaults = [self.fixed(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.fixed(default) for default in node.args.kw_defaults]
        return self.function(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        node.args.defaults = [self.fixed(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.fixed(default) for default in node.args.kw_defaults]
        return self.function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = self.block(node.body)
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        node.test = self.visit(node.test)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        return node

    def visit_While(self, node: ast.While) -> ast.While:
        node.test = self.fixed(node.test)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        return node

    def visit_For(self, node: Any) -> Any:
        node.iter = self.visit(node.iter)
        node.target = self.fixed(node.target)
        node.body = [*self.rebinding(node), *self.block(node.body)]
        node.orelse = self.block(node.orelse)
        return node

    def visit_With(self, node: Any) -> Any:
        for item in node.items:
            item.context_expr = self.visit(item.context_expr)
            self.movable = False
            item.optional_vars = item.optional_vars and self.fixed(item.optional_vars)
        node.body = [*self.rebinding(node), *self.block(node.body)]
        return node

    visit_AsyncFor, visit_AsyncWith = visit_For, visit_With

    def visit_Try(self, node: Any) -> Any:
        for handler in node.handlers:
            handler.type = handler.type and self.fixed(handler.type)
            handler.body = self.block(handler.body)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        node.finalbody = self.block(node.finalbody)
        return node

    visit_TryStar = visit_Try

    def visit_Match(self, node: Any) -> Any:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            case.guard = case.guard and self.fixed(case.guard)
            case.body = self.block(case.body)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        node.value = self.visit(node.value)
        node.targets = [self.fixed(target) for target in node.targets]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.value = node.value and self.visit(node.value)
        node.target = self.fixed(node.target)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AugAssign:
        self.movable = False  # the target is read first
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        return node

    # ---------------------------------------------------------------- expressions
    def visit(self, node: ast.AST) -> Any:
        """Rewrite a node; an operand gets its quantizer."""
        site = self.marks.inline.get(id(node))
        if site is not None and isinstance(node, ast.expr):
            return self.operand(node, site)
        new = super().visit(node)
        if isinstance(node, ast.expr) and not isinstance(node, _CALM):
            self.movable = False
        return new

    def fixed(self, node: Any) -> Any:
        """Rewrite an expression whose parts must stay where they are."""
        outer, self.movable = self.movable, False
        new = self.visit(node)
        self.movable = outer
        return new

    def operand(self, node: ast.expr, site: Site) -> ast.expr:
        """The quantized operand: a local read or temporary in front of the statement where that is the same."""
        movable = self.movable
        if movable and isinstance(node, ast.Attribute) and _is_read(node):
            return ast.Name(self.read(node, site), ast.Load())
        if movable and isinstance(node, ast.Call) and site.base == "_tmp":
            return ast.Name(self.temporary(node, site), ast.Load())
        new = super().visit(node)
        self.movable = False
        return self.quantized(site, new)

    def read(self, node: ast.Attribute, site: Site) -> str:
        """``self_weight = quantizer(self.weight)`` in front of the statement; returns the name."""
        if site.name not in self.moved:
            name = self.moved[site.name] = self.fresh(site.base)
            self.before.append(_assign(name, self.quantized(site, node)))
        return self.moved[site.name]

    def temporary(self, node: ast.Call, site: Site) -> str:
        """``_tmp = call(...)``, ``_tmp = quantizer(_tmp)`` in front of the statement; returns the name."""
        call = super().visit(node)
        name = self.fresh(site.name.removeprefix("quantizer_"))
        self.before += [_assign(name, call), _assign(name, self.quantized(site, ast.Name(name, ast.Load())))]
        self.movable = True
        return name

    def fresh(self, name: str) -> str:
        """``name``, unless the function uses it for something else."""
        while name in self.taken:
            name += "_"
        return name

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.BoolOp:
        node.values = [self.visit(node.values[0]), *(self.fixed(value) for value in node.values[1:])]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.IfExp:
        node.test = self.visit(node.test)
        node.body, node.orelse = self.fixed(node.body), self.fixed(node.orelse)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        node.left = self.visit(node.left)
        node.comparators = [self.visit(node.comparators[0]), *(self.fixed(value) for value in node.comparators[1:])]
        return node

    def visit_ListComp(self, node: Any) -> Any:
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        outer, self.movable = self.movable, False
        for generator in node.generators:
            if generator is not first:
                generator.iter = self.visit(generator.iter)
            generator.target = self.visit(generator.target)
            generator.ifs = [self.visit(condition) for condition in generator.ifs]
        for name in ("key", "value", "elt"):
            if hasattr(node, name):
                setattr(node, name, self.visit(getattr(node, name)))
        self.movable = outer
        return node

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        site = self.marks.outputs.get(id(node))
        self.generic_visit(node)
        if site is None:
            return node
        operator = self.unit.table.find_binary(type(node.op).__name__)
        return self.functional(operator, site, [node.left, node.right], [], node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        site = self.marks.outputs.get(id(node))
        self.generic_visit(node)
        if site is None:
            return node
        operator = self.unit.table.find_binary(type(node.op).__name__)
        return self.functional(operator, site, [node.operand], [], node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        mark = self.marks.calls.get(id(node))
        known = self.unit.calls.get(id(node))
        target = self.unit.resolve(node.func)
        self.generic_visit(node)
        if known is not None:
            return self.helper_call(node, known)
        if target is torch.backends.mha.get_fastpath_enabled and self.unit.self_name:
            return ast.Call(dotted("fastforward.nn.fastpath_enabled"), [ast.Name(self.unit.self_name, ast.Load())], [])
        if mark is None or mark.site is None or mark.operator is None:
            return node
        if mark.kind == "operator" and _same_arguments(mark, target, node):
            return self.functional(mark.operator, mark.site, node.args, node.keywords, node)
        return self.quantized(mark.site, node)

    # ---------------------------------------------------------------- what is written
    def quantized(self, site: Site, value: ast.expr) -> ast.expr:
        """``quantizer(value)``."""
        return ast.Call(self.reference(site.name), [value], [])

    def functional(
        self,
        operator: Operator | None,
        site: Site,
        args: list[ast.expr],
        keywords: list[ast.keyword],
        plain: ast.expr,
    ) -> ast.expr:
        """The operator's functional with its output quantizer; ``quantizer(plain)`` if it has none."""
        function = None if operator is None else self.functional_name(operator)
        if function is None:
            return self.quantized(site, plain)
        output = ast.keyword("output_quantizer", self.reference(site.name))
        return ast.Call(function, args, [*keywords, output])

    def functional_name(self, operator: Operator) -> ast.expr | None:
        """How the text spells what runs instead of ``operator``."""
        dispatch = operator.dispatch_op
        if callable(dispatch):
            return (
                attribute(dispatch.__module__, dispatch.__qualname__, self.imports) if is_importable(dispatch) else None
            )
        known = default_table().find_name(operator.fallback)
        if dispatch is None and (known is None or known.identifier != operator.identifier):
            return None
        return dotted(f"fastforward.nn.functional.{dispatch or operator.identifier}")

    def helper_call(self, node: ast.Call, callee: Callee) -> ast.expr:
        """The call of a helper's quantized form, with its quantizers."""
        function = self.callee(callee)
        if function is None:
            return node
        if callee.how == "super":
            node.args.insert(0, ast.Name(self.unit.self_name, ast.Load()))
        threaded = [
            ast.keyword(inner.name, self.reference(callee.name(inner.name))) for inner in callee.unit.quantizers()
        ]
        return ast.Call(function, node.args, [*node.keywords, *threaded])


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value, None)


def _is_read(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _same_arguments(mark: CallMark, target: Any, node: ast.Call) -> bool:
    """Whether the functional takes the call's arguments as they are, and does nothing in place."""
    assert mark.operator is not None
    name = getattr(target, "__name__", "")
    if name.endswith("_") or any(keyword.arg in ("out", "inplace") for keyword in node.keywords):
        return False
    # Aliases take the first operands alike; `round` and the like take a number of digits second.
    alike = 1 if getattr(target, "__module__", "") == "builtins" and name != "pow" else 2
    return target is resolve(mark.operator.fallback) or len(node.args) <= alike
