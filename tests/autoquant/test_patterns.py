"""Replacement patterns: tables of source, rules and the source that comes out."""

# ruff: noqa: E501 - a case per line reads best

import ast

import pytest

from fastforward.autoquant.patterns import PatternRule, apply_rules
from fastforward.exceptions import AutoquantError

CASES = {
    "call": ("torch.relu({x})", "mine.relu({x})", "y = torch.relu(a + b)", "y = mine.relu(a + b)"),
    "attribute capture": ("F.{f}({a}, {b})", "mine.{f}({a}, {b})", "F.conv2d(x, w)", "mine.conv2d(x, w)"),
    "exact arguments": ("F.{f}({a}, {b})", "mine.{f}({a}, {b})", "F.conv2d(x, w, b)", "F.conv2d(x, w, b)"),
    "keyword": ("f({a}, dim={d})", "g({d}, {a})", "f(x, dim=-1)", "g(-1, x)"),
    "other keyword": ("f({a}, dim={d})", "g({d}, {a})", "f(x, axis=-1)", "f(x, axis=-1)"),
    "operator": ("{a} @ {b}", "torch.matmul({a}, {b})", "(x @ y) @ z", "torch.matmul(torch.matmul(x, y), z)"),
    "capture used twice": ("square({a})", "{a} * {a}", "square(x)", "x * x"),
    "name from attribute": ("o.{f}({a})", "{f}({a})", "o.go(x)", "go(x)"),
    "attribute from name": ("{f}({a})", "o.{f}({a})", "go(x)", "o.go(x)"),
    "statement": ("{x} = old({y})", "{x} = new({y})", "z = old(1)", "z = new(1)"),
    "assignment target": ("{x} += {y}", "{x} = {x} + {y}", "z += 1", "z = z + 1"),
    "inside a function": ("a({x})", "b({x})", "def f():\n    return [a(i) for i in a(3)]", "def f():\n    return [b(i) for i in b(3)]"),
    "whitespace": ("f( {a} ,{b} )", "g({b}, {a})", "f(1,\n  2)", "g(2, 1)"),
    "constant": ("f({a}, 1)", "one({a})", "f(x, 1), f(x, True), f(x, 1.0)", "one(x), f(x, True), f(x, 1.0)"),
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "replacement", "source", "expected"), CASES.values(), ids=CASES)
def test_rule(pattern: str, replacement: str, source: str, expected: str) -> None:
    rule = PatternRule.from_str(pattern=pattern, replacement=replacement)
    assert ast.unparse(rule.apply(ast.parse(source))) == ast.unparse(ast.parse(expected))


def test_rules_are_tried_in_order_and_again_after_each_success() -> None:
    rules = [PatternRule.from_str("a({x})", "b({x})"), PatternRule.from_str("b({x})", "c({x})")]
    assert ast.unparse(apply_rules(rules, ast.parse("a(a(1))"))) == "c(c(1))"
    assert ast.unparse(apply_rules(rules[::-1], ast.parse("a(1)"))) == "c(1)"


def test_a_cycle_ends() -> None:
    rules = [PatternRule.from_str("a({x})", "b({x})"), PatternRule.from_str("b({x})", "a({x})")]
    assert ast.unparse(apply_rules(rules, ast.parse("a(1)"))) == "b(1)"


def test_endless_growth_is_an_error() -> None:
    rule = PatternRule.from_str("a({x})", "a(a({x}))")
    with pytest.raises(AutoquantError, match="do not come to an end"):
        rule.apply(ast.parse("a(1)"))


@pytest.mark.parametrize(
    ("on", "count"), [(None, 3), ("m.C.f", 1), ("m.C", 2), ("m", 3), ("m.C.ff", 0), ("m.C.f.g", 0)]
)
def test_on_restricts_to_a_scope(on: str | None, count: int) -> None:
    source = "a(0)\nclass C:\n    def f(self):\n        return a(1)\n    def h(self):\n        return a(2)\n"
    rule = PatternRule.from_str("a({x})", "b({x})", on=on)
    assert ast.unparse(rule.apply(ast.parse(source), "m")).count("b(") == count


def test_a_prefix_is_a_whole_name() -> None:
    rule = PatternRule.from_str("a({x})", "b({x})", on="m.C.f")
    assert "b(" not in ast.unparse(rule.apply(ast.parse("def forward():\n    a(1)"), "m.C"))


@pytest.mark.parametrize(
    ("pattern", "replacement", "error"),
    [
        ("{a} + {a}", "{a}", ValueError),
        ("{a}", "{b}", KeyError),
        ("x = 1; y = 2", "z", ValueError),
        ("x +", "z", ValueError),
        ("", "z", ValueError),
        ("f({a})", "x = {a}", ValueError),
    ],
)
def test_wrong_rules(pattern: str, replacement: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        PatternRule.from_str(pattern, replacement)


def test_what_is_used_as_a_name_matches_names_only() -> None:
    rule = PatternRule.from_str("f({a})", "o.{a}")
    assert ast.unparse(rule.apply(ast.parse("f(1 + 2), f(x)"))) == "(f(1 + 2), o.x)"


def test_lines_stay() -> None:
    rule = PatternRule.from_str("a({x})", "b(c({x}))")
    tree = rule.apply(ast.parse("\n\na(1)"))
    assert {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")} == {3}


def test_names_that_a_replacement_brings() -> None:
    assert PatternRule.from_str("f({a})", "my_own.g({a}, other)").names() == {"my_own", "other"}
