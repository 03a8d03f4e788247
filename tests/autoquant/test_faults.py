"""Faults planted in the rewriter, one at a time: the comparison of programs must see each of them."""

import ast
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastforward.autoquant import frames, marks, rewrite
from fastforward.autoquant.aliases import Aliases
from fastforward.autoquant.callees import Callees
from fastforward.autoquant.recompile import Engine
from fastforward.autoquant.scope import Scope
from fastforward.exceptions import QuantizationWarning
from tests.autoquant.construct_table import CASES, source
from tests.autoquant.programs import compare, copying
from tests.autoquant.test_constructs import _arguments

Patch = pytest.MonkeyPatch
Rewriter = rewrite._Rewriter


def _forget(owner: Any, rule: str) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, rule, lambda *_: set())


def _bind_changed(
    change: Callable[[types.FunctionType, types.FunctionType], types.FunctionType],
) -> Callable[[Patch], None]:
    original = Engine.bind
    return lambda patch: patch.setattr(Engine, "bind", lambda self, f, scope: change(f, original(self, f, scope)))


def _with_closure_of_nones(_: types.FunctionType, made: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType(None) for _ in made.__closure__ or ())
    copy = types.FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, cells or None)
    copy.__kwdefaults__ = made.__kwdefaults__
    copy.__dict__.update(made.__dict__)
    return copy


def _without_defaults(_: types.FunctionType, made: types.FunctionType) -> types.FunctionType:
    made.__defaults__ = None
    return made


def _without_keyword_defaults(_: types.FunctionType, made: types.FunctionType) -> types.FunctionType:
    made.__kwdefaults__ = {name: value for name, value in (made.__kwdefaults__ or {}).items() if name == rewrite.SCOPE}
    return made


def _visitor(kind: str, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """After the rewriter has visited a node of ``kind``, change it."""
    original = getattr(Rewriter, f"visit_{kind}", Rewriter.generic_visit)

    def visit(self: Any, node: Any) -> Any:
        return ast.fix_missing_locations(ast.copy_location(change(original(self, node)), node))

    return lambda patch: patch.setattr(Rewriter, f"visit_{kind}", visit, raising=False)


def _emptied(field: str) -> Callable[[Any], Any]:
    def change(node: Any) -> Any:
        setattr(node, field, [])
        return node

    return change


def _operands_swapped(node: Any) -> Any:
    sides = node.args[1] if isinstance(node, ast.Call) else node
    sides.left, sides.right = sides.right, sides.left
    return node


def _values_reversed(node: ast.BoolOp) -> ast.AST:
    node.values.reverse()
    return node


def _both_branches(node: ast.IfExp) -> ast.AST:
    return ast.Subscript(ast.Tuple([node.body, node.orelse], ast.Load()), ast.UnaryOp(ast.Not(), node.test), ast.Load())


def _right_to_left(node: ast.Compare) -> ast.AST:
    values = [node.left, *node.comparators]
    if len(values) == 2 or not all(isinstance(value, ast.Call) for value in values):
        return node
    pairs = [ast.Compare(a, [o], [b]) for a, o, b in zip(values, node.ops, values[1:], strict=False)]
    return ast.BoolOp(ast.And(), list(pairs))


def _twice(node: ast.expr) -> ast.expr:
    return ast.Subscript(ast.Tuple([node, node], ast.Load()), ast.Constant(1), ast.Load())


def _anew(node: ast.AugAssign) -> ast.Assign:
    load = ast.parse(ast.unparse(node.target), mode="eval").body
    return ast.Assign([node.target], ast.BinOp(load, node.op, node.value))


def _rebound_before(patch: Patch) -> None:
    def statements(self: Any, node: ast.stmt) -> list[ast.stmt]:
        after = self.rebinding(node, node) if isinstance(node, ast.Assign) else []
        return [*after, self.visit(node)]

    patch.setattr(Rewriter, "statements", statements)


def _on_the_first_line(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        if isinstance(inner, ast.expr):
            inner.lineno = inner.end_lineno = 1
            inner.col_offset = inner.end_col_offset = 0
    return node


def _swallowing(patch: Patch) -> None:
    original = Scope.callee

    def callee(self: Scope, number: int, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, number, function)(*args, **kwargs)
            except RuntimeError:
                return None

        return call

    patch.setattr(Scope, "callee", callee)


def _drawing(patch: Patch) -> None:
    original = Scope.q

    def q(self: Scope, index: int, value: Any) -> Any:
        torch.rand(1)
        return original(self, index, value)

    patch.setattr(Scope, "q", q)


def _undecorated(patch: Patch) -> None:
    original = Scope._function

    def function(self: Scope, number: int, called: Any, args: Any, kwargs: Any) -> Any:
        return original(self, number, getattr(called, "__wrapped__", called), args, kwargs)

    patch.setattr(Scope, "_function", function)


def _tensors_only(patch: Patch) -> None:
    patch.setattr(Scope, "q", lambda self, index, value: torch.as_tensor(value))


def _nothing_hidden(patch: Patch) -> None:
    patch.setattr(Scope, "visible", lambda self, number, names: names)


FAULTS: dict[str, tuple[Callable[[Patch], None], str, Any]] = {
    "augmented assignment is no mutation": (
        _forget(Aliases, "_at_AugAssign"),
        "helpers that change their argument",
        copying,
    ),
    "calls are no mutation": (_forget(Callees, "changed"), "helpers that change their argument", copying),
    "identity is not looked at": (_forget(frames, "_identified"), "identity", copying),
    "a copy is changed in place": (
        lambda patch: patch.setattr(marks, "works_in_place", lambda node: False),
        "helpers that change their argument",
        copying,
    ),
    "an augmented assignment makes a new object": (
        _visitor("AugAssign", _anew),
        "augmented keeps the object",
        None,
    ),
    "super() and closures see other cells": (_bind_changed(_with_closure_of_nones), "super", None),
    "defaults are lost": (_bind_changed(_without_defaults), "helper called twice", None),
    "keyword-only defaults are lost": (_bind_changed(_without_keyword_defaults), "forward with keyword only", None),
    "operands are evaluated in another order": (_visitor("BinOp", _operands_swapped), "order of operands", None),
    "calls are evaluated twice": (_visitor("Call", _twice), "order of call arguments", None),
    "the target of an augmented assignment is evaluated twice": (
        _visitor("AugAssign", _anew),
        "augmented subscript of a call",
        None,
    ),
    "a name is rebound before it is bound": (_rebound_before, "unpack", None),
    "lines are lost": (_visitor("Call", _on_the_first_line), "traceback in a helper", None),
    "exceptions are swallowed": (_swallowing, "traceback in a helper", None),
    "a random number is drawn": (_drawing, "dropout", None),
    "decorators are skipped": (_undecorated, "no_grad helper", None),
    "operators take tensors only": (_tensors_only, "overloads", None),
    "locals() shows the scope": (_nothing_hidden, "locals", None),
    "boolean operators do not stop early": (_visitor("BoolOp", _values_reversed), "boolean operators", None),
    "both branches are evaluated": (_visitor("IfExp", _both_branches), "conditional expression", None),
    "a comparison evaluates its middle twice": (_visitor("Compare", _right_to_left), "comparison chain", None),
    "the else of a loop is dropped": (_visitor("For", _emptied("orelse")), "for and else", None),
    "finally is dropped": (_visitor("Try", _emptied("finalbody")), "try and except", None),
    "handlers are dropped": (
        _visitor("Try", lambda node: ast.If(ast.Constant(True), node.body, [])),
        "try and except",
        None,
    ),
}


def _seen(case: str, make: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        try:
            return compare(source(CASES[case]), _arguments, make=make, exact=make is None)
        except Exception as error:  # noqa: BLE001 - a rewriter that breaks is seen too
            return [f"raised {type(error).__name__}: {error}"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: Patch) -> None:
    plant, case, make = FAULTS[fault]
    assert _seen(case, make) == []
    plant(monkeypatch)
    assert _seen(case, make) != []


def test_there_are_twenty() -> None:
    assert len(FAULTS) >= 20
