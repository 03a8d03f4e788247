"""The transformer as a table: source in, rewritten source out."""

import ast
import textwrap

import pytest
import torch
import torch.nn.functional as F

from fastforward.autoquant.callees import UNKNOWN
from fastforward.autoquant.inference import Inference
from fastforward.autoquant.marks import Context, mark
from fastforward.autoquant.optable import default_table
from fastforward.autoquant.recompile import Engine, resolver
from fastforward.autoquant.rewrite import rewrite


def helper(x):
    return x


def rewritten(source: str) -> tuple[str, list[str]]:
    """The rewritten function and the names of its quantizers."""
    node = ast.parse(textwrap.dedent(source)).body[0]
    namespace = {"F": F, "torch": torch, "helper": helper}
    exec(compile(ast.Module([node], []), __file__, "exec"), namespace)
    resolve = resolver(namespace[node.name])
    inference = Inference(node, lambda name: None if (found := resolve(name)) is UNKNOWN else found)
    engine = Engine()
    marks = mark(node, Context(default_table(), resolve, engine.treat_call, inference.may_be_tensor))
    rewrite(node, marks)
    return ast.unparse(ast.fix_missing_locations(node)), [site.name for site in marks.sites]


CASES = {
    "operator on arguments": (
        """
        def f(x, w):
            return F.linear(x, w)
        """,
        """
        def f(x, w, *, _ff):
            _ff = _ff.enter(x)
            x = _ff.q(0, x)
            w = _ff.q(1, w)
            return _ff.q(2, F.linear(x, w))
        """,
        ["quantizer_x", "quantizer_w", "quantizer_linear"],
    ),
    "parameters are quantized where they are read": (
        """
        def f(self, x):
            return F.linear(x, self.weight, bias=self.bias)
        """,
        """
        def f(self, x, *, _ff):
            _ff = _ff.enter(self)
            x = _ff.q(0, x)
            return _ff.q(1, F.linear(x, _ff.q(2, self.weight), bias=_ff.q(3, self.bias)))
        """,
        ["quantizer_x", "quantizer_linear", "quantizer_self_weight", "quantizer_self_bias"],
    ),
    "results of operators are not quantized twice": (
        """
        def f(x):
            y = torch.relu(x)
            return torch.matmul(y, y)
        """,
        """
        def f(x, *, _ff):
            _ff = _ff.enter(x)
            x = _ff.q(0, x)
            y = _ff.q(1, torch.relu(x))
            return _ff.q(2, torch.matmul(y, y))
        """,
        ["quantizer_x", "quantizer_relu", "quantizer_matmul"],
    ),
    "moved data keeps the quantizer of its input": (
        """
        def f(q, k):
            return q @ k.transpose(-2, -1)
        """,
        """
        def f(q, k, *, _ff):
            _ff = _ff.enter(q)
            q = _ff.q(0, q)
            k = _ff.q(1, k)
            return _ff.q(2, q @ k.transpose(-2, -1))
        """,
        ["quantizer_q", "quantizer_k", "quantizer_matmul"],
    ),
    "a moved parameter is quantized as the parameter": (
        """
        def f(self, x):
            return x @ self.weight.t()
        """,
        """
        def f(self, x, *, _ff):
            _ff = _ff.enter(self)
            x = _ff.q(0, x)
            return _ff.q(1, x @ _ff.q(2, self.weight).t())
        """,
        ["quantizer_x", "quantizer_matmul", "quantizer_self_weight"],
    ),
    "unknown results are quantized at their definition": (
        """
        def f(self, x):
            y = self.layer(x)
            return torch.exp(y)
        """,
        """
        def f(self, x, *, _ff):
            _ff = _ff.enter(self)
            y = _ff.q(0, _ff.callee(0, self.layer)(x))
            return _ff.q(1, torch.exp(y))
        """,
        ["quantizer_y", "quantizer_exp"],
    ),
    "unpacked names, loop variables and with-targets follow their definition": (
        """
        def f(self, xs):
            a, b = self.split(xs)
            for x in xs:
                a = a + x
            with self.open() as c:
                return a * b * c
        """,
        """
        def f(self, xs, *, _ff):
            _ff = _ff.enter(self)
            (a, b) = _ff.callee(0, self.split)(xs)
            a = _ff.q(0, a)
            b = _ff.q(1, b)
            for x in xs:
                x = _ff.q(2, x)
                a = _ff.q(3, a + x)
            with _ff.callee(1, self.open)() as c:
                c = _ff.q(4, c)
                return _ff.q(6, _ff.q(5, a * b) * c)
        """,
        None,
    ),
    "a name changed in place is never rebound": (
        """
        def f(x, y):
            x += y
            x[0] = 1
            return torch.exp(x)
        """,
        """
        def f(x, y, *, _ff):
            _ff = _ff.enter(x)
            x += _ff.q(0, y)
            x[0] = 1
            return _ff.q(1, torch.exp(_ff.q(2, x)))
        """,
        ["quantizer_y", "quantizer_exp", "quantizer_x"],
    ),
    "augmented assignment stays as it is": (
        """
        def f(self, k, y):
            self.pick(k)[k()] += y
        """,
        """
        def f(self, k, y, *, _ff):
            _ff = _ff.enter(self)
            y = _ff.q(0, y)
            _ff.callee(0, self.pick)(k)[_ff.callee(1, k)()] += y
        """,
        ["quantizer_y"],
    ),
    "a definition that no operator reads gets nothing": (
        """
        def f(self, x):
            x = self.first(x)
            x = self.second(x)
            return torch.exp(x)
        """,
        """
        def f(self, x, *, _ff):
            _ff = _ff.enter(self)
            x = _ff.callee(0, self.first)(x)
            x = _ff.q(0, _ff.callee(1, self.second)(x))
            return _ff.q(1, torch.exp(x))
        """,
        ["quantizer_x", "quantizer_exp"],
    ),
    "integers, shapes and strings stay plain Python": (
        """
        def f(x, n: int):
            b, t = x.shape
            name = "a" + str(n)
            return x.view(b * n, t // 2), len(name) + 1
        """,
        """
        def f(x, n: int, *, _ff):
            _ff = _ff.enter(x)
            (b, t) = x.shape
            name = 'a' + str(n)
            return (x.view(b * n, t // 2), len(name) + 1)
        """,
        [],
    ),
    "helpers are called through the scope, and locals() hides it": (
        """
        def f(x):
            return helper(x), locals()
        """,
        """
        def f(x, *, _ff):
            _ff = _ff.enter(x)
            return (_ff.callee(0, helper)(x), _ff.visible(1, locals()))
        """,
        [],
    ),
    "repeated names are numbered in source order": (
        """
        def f(x, y):
            x = x + y
            return x + y
        """,
        """
        def f(x, y, *, _ff):
            _ff = _ff.enter(x)
            x = _ff.q(0, x)
            y = _ff.q(1, y)
            x = _ff.q(2, x + y)
            return _ff.q(3, x + y)
        """,
        ["quantizer_x", "quantizer_y", "quantizer_add_1", "quantizer_add_2"],
    ),
    "an operator without a quantizer for its result stays as it is": (
        """
        def f(x, y):
            return x == y
        """,
        """
        def f(x, y, *, _ff):
            _ff = _ff.enter(x)
            return x == y
        """,
        [],
    ),
    "a function without positional arguments enters its scope too": (
        """
        def f(*, x):
            return torch.exp(x)
        """,
        """
        def f(*, x, _ff):
            _ff = _ff.enter()
            x = _ff.q(0, x)
            return _ff.q(1, torch.exp(x))
        """,
        None,
    ),
    "a docstring stays first": (
        '''
        def f(x):
            """Doc."""
            return torch.exp(x)
        ''',
        '''
        def f(x, *, _ff):
            """Doc."""
            _ff = _ff.enter(x)
            x = _ff.q(0, x)
            return _ff.q(1, torch.exp(x))
        ''',
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rewriting_gives_the_expected_source(name: str) -> None:
    source, expected, names = CASES[name]
    text, found = rewritten(source)
    assert text == ast.unparse(ast.parse(textwrap.dedent(expected)))
    if names is not None:
        assert found == names


def test_every_new_node_stands_on_a_line_of_the_source() -> None:
    source = textwrap.dedent(CASES["unpacked names, loop variables and with-targets follow their definition"][0])
    node = ast.parse(source).body[0]
    lines = {inner.lineno for inner in ast.walk(node) if hasattr(inner, "lineno")}
    engine = Engine()
    context = Context(default_table(), lambda _: UNKNOWN, engine.treat_call)
    rewrite(node, mark(node, context))
    statements = [inner for inner in ast.walk(node) if isinstance(inner, (ast.stmt, ast.expr))]
    assert all(inner.lineno in lines and inner.end_lineno is not None for inner in statements)


def test_marking_changes_nothing() -> None:
    for source, _, _ in CASES.values():
        node = ast.parse(textwrap.dedent(source)).body[0]
        before = ast.dump(node, include_attributes=True)
        mark(node, Context(default_table(), lambda _: UNKNOWN, Engine().treat_call))
        assert ast.dump(node, include_attributes=True) == before
