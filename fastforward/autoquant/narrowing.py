"""Where ``isinstance`` and ``is None`` tests settle what a name is: AST in, kinds of single reads of names out."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from fastforward.autoquant import kinds
from fastforward.autoquant.kinds import Kind

_JUMPS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def narrowed_names(node: ast.AST, resolve: Callable[[ast.expr], Any]) -> dict[int, Kind]:
    """The reads of names inside ``node`` that a test settles.

    Args:
        node: A function; nested functions are left to their own call, for they run at another time.
        resolve: Expression -> the live object it means, or None.

    Returns:
        ``id`` of an `ast.Name` node -> its kind.
    """
    found: dict[int, Kind] = {}
    stack = list(ast.iter_child_nodes(node))
    while stack:
        current = stack.pop()
        if isinstance(current, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(current, (ast.If, ast.IfExp)):
            _narrow_branches(current, resolve, found)
        body = getattr(current, "body", None)
        if isinstance(body, list):
            _narrow_rest(body, resolve, found)
        stack.extend(ast.iter_child_nodes(current))
    if isinstance(getattr(node, "body", None), list):
        _narrow_rest(node.body, resolve, found)  # type: ignore[attr-defined]
    return found


def _narrow_branches(node: ast.If | ast.IfExp, resolve: Callable[[ast.expr], Any], found: dict[int, Kind]) -> None:
    for name, kind, holds in _facts(node.test, resolve):
        branch = node.body if holds else node.orelse
        _narrow(branch if isinstance(branch, list) else [branch], name, kind, found)


def _narrow_rest(body: list[ast.AST], resolve: Callable[[ast.expr], Any], found: dict[int, Kind]) -> None:
    """``if isinstance(x, torch.Tensor): return ...`` settles the statements after it."""
    for index, statement in enumerate(body):
        if isinstance(statement, ast.If) and not statement.orelse and isinstance(statement.body[-1], _JUMPS):
            for name, kind, holds in _facts(statement.test, resolve):
                if not holds:
                    _narrow(body[index + 1 :], name, kind, found)


def _narrow(body: list[Any], name: str, kind: Kind, found: dict[int, Kind]) -> None:
    reads = []
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == name:
                if not isinstance(node.ctx, ast.Load):
                    return  # assigned again: the test says nothing about what comes after
                reads.append(id(node))
    found.update(dict.fromkeys(reads, kind))


def _facts(test: ast.expr, resolve: Callable[[ast.expr], Any]) -> Iterator[tuple[str, Kind, bool]]:
    """What a test settles: (name, its kind, whether it has it where the test holds or where it fails)."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from ((name, kind, not holds) for name, kind, holds in _facts(test.operand, resolve))
    elif isinstance(test, ast.BoolOp):
        wanted = isinstance(test.op, ast.And)
        for part in test.values:
            yield from (fact for fact in _facts(part, resolve) if fact[2] is wanted)
    elif isinstance(test, ast.Compare):
        yield from _none_facts(test)
    elif isinstance(test, ast.Call) and test.args and isinstance(test.args[0], ast.Name):
        yield from _type_facts(test, test.args[0].id, resolve)


def _none_facts(test: ast.Compare) -> Iterator[tuple[str, Kind, bool]]:
    is_none = len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
    if is_none and isinstance(test.left, ast.Name) and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
        yield test.left.id, Kind.PLAIN, isinstance(test.ops[0], ast.Is)


def _type_facts(test: ast.Call, name: str, resolve: Callable[[ast.expr], Any]) -> Iterator[tuple[str, Kind, bool]]:
    callee = test.func.attr if isinstance(test.func, ast.Attribute) else getattr(test.func, "id", "")
    if callee == "is_tensor":
        yield name, Kind.OBJECT, False
    elif callee == "isinstance" and len(test.args) == 2:
        classes = test.args[1].elts if isinstance(test.args[1], ast.Tuple) else [test.args[1]]
        kind = kinds.join(kinds.of_annotation(member, resolve) for member in classes)
        if kind not in (Kind.MAYBE, Kind.BOTTOM):
            yield name, kind, True
        if any(_is_tensor_class(member) for member in classes):
            yield name, Kind.OBJECT, False


def _is_tensor_class(node: ast.expr) -> bool:
    return isinstance(node, (ast.Attribute, ast.Name)) and (getattr(node, "attr", None) or node.id) == "Tensor"  # type: ignore[union-attr]
