"""Replacement patterns: an AST in, the same AST with matching statements or expressions replaced out.

A pattern and its replacement are each one Python statement or expression. ``{name}`` is a capture, usable wherever a
name is legal (an expression, an attribute, an argument's name): ``torch.nn.functional.{func}({a}, {b})``.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastforward.autoquant.source import clone
from fastforward.exceptions import AutoquantError

_CAPTURE = re.compile(r"\{([^\W\d]\w*)\}")
_MARK = "_ff_capture_"
_IGNORED = frozenset({"ctx", "type_comment", "kind"})
_MAX_STEPS = 100
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class PatternRule:
    """Rewrites everything that has the shape of ``pattern`` into ``replacement``.

    Whitespace and comments do not matter; arguments match by position and exactly.

    Args:
        pattern: The pattern's AST, captures marked; see `from_str`.
        replacement: The replacement's AST.
        on: Dotted scope, ``pkg.mod.Class.func``: only code in it or nested in it is rewritten.
    """

    pattern: ast.AST
    replacement: ast.AST
    on: str | None = None
    text: str = field(default="", compare=False)

    @classmethod
    def from_str(cls, pattern: str, replacement: str, on: str | None = None) -> "PatternRule":
        """Parse a rule.

        Args:
            pattern: One statement or expression with captures.
            replacement: Likewise; it may use each capture any number of times.
            on: See the class.

        Raises:
            ValueError: A text is not one statement or expression, a capture stands twice in the pattern, or the two
                are of different kinds.
            KeyError: The replacement uses a capture that the pattern lacks.

        Example:
            >>> rule = PatternRule.from_str("torch.relu({x})", "mine.relu({x})")
        """
        captures = _CAPTURE.findall(pattern)
        for name in captures:
            if captures.count(name) > 1:
                msg = f"pattern {pattern!r}: capture {{{name}}} stands in it more than once"
                raise ValueError(msg)
        for name in _CAPTURE.findall(replacement):
            if name not in captures:
                msg = f"replacement {replacement!r}: there is no capture {{{name}}} in pattern {pattern!r}"
                raise KeyError(msg)
        shape, result = _parse(pattern, "pattern"), _parse(replacement, "replacement")
        if isinstance(shape, ast.expr) != isinstance(result, ast.expr):
            msg = f"pattern {pattern!r} and replacement {replacement!r} must both be expressions, or both statements"
            raise ValueError(msg)
        return cls(shape, result, on, f"{pattern} -> {replacement}")

    def apply(self, node: ast.AST, scope: str = "") -> ast.AST:
        """Rewrite every match in ``node``.

        Args:
            node: Any AST; it is changed.
            scope: Qualified name of the scope that ``node`` stands in, for ``on``.

        Returns:
            ``node``, or what replaces it.
        """
        return apply_rules([self], node, scope)

    def names(self) -> frozenset[str]:
        """The names that the replacement brings along, captures left out: ``mine`` in ``mine.relu({x})``."""
        nodes = (node for node in ast.walk(self.replacement) if isinstance(node, ast.Name))
        return frozenset(node.id for node in nodes if not node.id.startswith(_MARK))


def apply_rules(rules: Sequence[PatternRule], node: ast.AST, scope: str = "") -> ast.AST:
    """Rewrite ``node`` by ``rules``, tried in order and again from the first after each success.

    Args:
        rules: The rules.
        node: Any AST; it is changed.
        scope: Qualified name of the scope that ``node`` stands in.

    Raises:
        AutoquantError: The rules do not come to an end on some piece of code.
    """
    if not rules:
        return node
    new = _Applier(rules, scope).visit(node)
    assert isinstance(new, ast.AST)
    return ast.fix_missing_locations(new)


class _Applier(ast.NodeTransformer):
    """Works from the leaves up, so that captures hold what their own rules made of them."""

    def __init__(self, rules: Sequence[PatternRule], scope: str) -> None:
        self.rules = rules
        self.scope = [scope] if scope else []

    def visit(self, node: ast.AST) -> Any:
        inner = isinstance(node, _SCOPES)
        if inner:
            self.scope.append(node.name)  # type: ignore[attr-defined]
        new = self.generic_visit(node)
        if inner:
            self.scope.pop()
        return self._rewritten(new) if isinstance(new, (ast.stmt, ast.expr)) else new

    def _rewritten(self, node: ast.AST) -> ast.AST:
        seen = {ast.dump(node)}
        for _ in range(_MAX_STEPS):
            new = self._step(node)
            if new is None or ast.dump(new) in seen:
                return node
            seen.add(ast.dump(new))
            node = new
        texts = "; ".join(rule.text for rule in self.rules)
        where = f"{'.'.join(self.scope)}:{getattr(node, 'lineno', '?')}"
        msg = f"{where}: replacement patterns do not come to an end: {texts}"
        raise AutoquantError(msg)

    def _step(self, node: ast.AST) -> ast.AST | None:
        for rule in self.rules:
            if not self._in_scope(rule.on):
                continue
            captures: dict[str, Any] = {}
            if _matches(rule.pattern, node, captures) and _nameable(rule, captures):
                return _filled(rule, captures, node)
        return None

    def _in_scope(self, on: str | None) -> bool:
        return on is None or f"{'.'.join(self.scope)}.".startswith(f"{on}.")


def _parse(text: str, what: str) -> ast.AST:
    try:
        body = ast.parse(_CAPTURE.sub(rf"{_MARK}\1", text)).body
    except SyntaxError as error:
        msg = f"{what} {text!r} is not Python: {error.msg}"
        raise ValueError(msg) from error
    if len(body) != 1:
        msg = f"{what} {text!r} must be exactly one statement or expression, not {len(body)}"
        raise ValueError(msg)
    return body[0].value if isinstance(body[0], ast.Expr) else body[0]


def _matches(pattern: Any, node: Any, captures: dict[str, Any]) -> bool:
    if isinstance(pattern, ast.Name) and pattern.id.startswith(_MARK):
        captures[pattern.id] = node
        return isinstance(node, ast.expr)
    if isinstance(pattern, str) and pattern.startswith(_MARK):
        captures[pattern] = node
        return isinstance(node, str)
    if isinstance(pattern, ast.AST):
        return type(pattern) is type(node) and all(
            _matches(getattr(pattern, name, None), getattr(node, name, None), captures) for name in _fields(pattern)
        )
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_matches(one, other, captures) for one, other in zip(pattern, node, strict=True))
        )
    return type(pattern) is type(node) and bool(pattern == node)


def _nameable(rule: PatternRule, captures: dict[str, Any]) -> bool:
    """Whether every capture that the replacement uses as a bare name (an attribute, say) holds one."""
    return all(isinstance(captures[name], (str, ast.Name)) for name in _name_positions(rule.replacement))


def _name_positions(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Name):
            values = (value for _, value in ast.iter_fields(inner))
            yield from (value for value in values if isinstance(value, str) and value.startswith(_MARK))


def _fields(node: ast.AST) -> Iterator[str]:
    return (name for name in node._fields if name not in _IGNORED)


def _filled(rule: PatternRule, captures: dict[str, Any], place: ast.AST) -> ast.AST:
    new = _Filler(captures, place).visit(clone(rule.replacement))
    assert isinstance(new, ast.AST)
    return new


class _Filler(ast.NodeTransformer):
    """Puts captures into a copy of the replacement; new nodes stand where the match stood."""

    def __init__(self, captures: dict[str, Any], place: ast.AST) -> None:
        self.captures, self.place = captures, place

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name) and node.id in self.captures:
            return self._expression(self.captures[node.id], node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, str) and value in self.captures:
                captured = self.captures[value]
                setattr(node, name, captured if isinstance(captured, str) else captured.id)
        if "lineno" in node._attributes:
            ast.copy_location(node, self.place)
        return self.generic_visit(node)

    def _expression(self, captured: Any, node: ast.Name) -> ast.AST:
        if isinstance(captured, str):
            return ast.copy_location(ast.Name(captured, node.ctx), self.place)
        new = clone(captured)
        if hasattr(new, "ctx"):
            new.ctx = node.ctx
        assert isinstance(new, ast.AST)
        return new
