"""Rendering: the text parses to the AST it came from, whatever the syntax, and long lines are broken at brackets."""

import ast
import sys

import pytest

from fastforward.autoquant.layout import LIMIT, wrap_code
from fastforward.autoquant.render import Renderer, render, same_code

LONG = "argument_with_a_long_name"
SOURCES = {
    "match": "match x:\n    case [1, *rest] if rest:\n        pass\n    case {'a': b, **c}:\n        pass",
    "except star": "try:\n    pass\nexcept* ValueError as error:\n    pass",
    "f-string with a dict": "f'{ {1: 2}[1] }'",
    "f-string with quotes": """f"{x['a']!r:>{width}} \\n 'quoted'" """,
    "debug f-string": "f'{x=}'",
    "bytes and raw": "b'\\x00', r'\\d', 'a' 'b'",
    "docstring": 'def f():\n    """One.\n\n        Two: a, b (c).\n    """\n    return 1',
    "walrus and lambda": "(y := f(lambda a, /, b=1, *c, d, **e: a))",
    "long annotated assignment": f"self.name: Some[{LONG}, {LONG}] = call({LONG}, {LONG}, {LONG}, {LONG})",
    "parenthesised with": "with (a as b, c as d):\n    pass",
    "async": "async def f():\n    async for x in y:\n        await z\n    return [i async for i in j]",
    "star expressions": "a, *b = *c, *d\nf(*x, **y)",
    "decorators": "@a.b(1)\nclass C(B, metaclass=M):\n    x: int = 1",
    "chained comparison": "0 < a <= b is not None",
    "slices": "x[1:, ..., ::2, None]",
    "global and del": "def f():\n    global a\n    del a, b[0]",
    "nested functions": "def f(a, *, b: int = 2) -> int:\n    def g():\n        nonlocal a\n        yield a",
    "unary and powers": "-x ** -2, not (a and b) or c",
    "conditional": "a if b else (c if d else e)",
    "long call": f"result = call({LONG}, {LONG}, key={LONG}, **{LONG})",
    "long definition": f"def f({LONG}: int, {LONG}_2: int = 3, *, {LONG}_3: str) -> tuple[int, int]:\n    pass",
    "long string": f"x = '{'a, (b' * 60}'",
    "long condition": f"if ({LONG} and {LONG}) or ({LONG} and {LONG}) or {LONG} or {LONG}:\n    pass",
    "long docstring": f'def f():\n    """Call({", ".join([LONG] * 8)})."""',
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_text_parses_to_the_same_code(source: str) -> None:
    if "except*" in source and sys.version_info < (3, 11):
        pytest.skip("syntax of Python 3.11")
    tree = ast.parse(source)
    assert same_code(ast.parse(render(tree)), tree)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
@pytest.mark.parametrize(
    "source", ["def f[T](x: T) -> T:\n    return x", "class C[T]:\n    pass", "type X[T] = list[T]"]
)
def test_type_parameters_survive(source: str) -> None:
    tree = ast.parse(source)
    assert same_code(ast.parse(render(tree)), tree)


def test_own_modules_survive() -> None:
    import fastforward.autoquant.marks as marks

    tree = ast.parse(open(marks.__file__, encoding="utf-8").read())
    assert same_code(ast.parse(render(tree)), tree)


def test_long_lines_are_broken_one_argument_per_line() -> None:
    text = render(ast.parse(f"x = call({', '.join(f'{LONG}_{i}' for i in range(5))})"))
    assert text == "x = call(\n" + ",\n".join(f"    {LONG}_{i}" for i in range(5)) + "\n)\n"


def test_medium_lines_move_their_arguments_as_a_whole() -> None:
    body = ", ".join([LONG] * 3)
    assert (
        render(ast.parse(f"return_value_of_the_call = call({body})"))
        == f"return_value_of_the_call = call(\n    {body}\n)\n"
    )


def test_lines_that_fit_or_cannot_be_broken_stay() -> None:
    for line in ("x = 1", f"x = '{'a' * LIMIT}'", "'''\n" + "(a, b)" * 30 + "\n'''"):
        assert wrap_code(line) == line


def test_astor_is_used_and_its_failures_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("def f(a) -> int:\n    return a")
    assert render(tree) == "def f(a) -> int:\n    return a\n"
    monkeypatch.setattr(Renderer, "visit_Return", lambda self, node: self.statement(node, "return wrong"))
    assert same_code(ast.parse(render(tree)), tree)


def test_layout_of_a_module() -> None:
    source = "import a\nfrom b import c\n\n\ndef f():\n    pass\n\n\nclass D:\n    pass\n"
    assert render(ast.parse(source)) == source
