"""Each case is a function whose `probe(...)` calls ask what is known about their argument."""

# ruff: noqa: E501 - a case per line reads best

import ast
import math  # noqa: F401 - resolved by name in the cases
import textwrap
from collections.abc import Sequence
from typing import Optional

import pytest
import torch

from fastforward.autoquant.class_attributes import attribute_kinds
from fastforward.autoquant.inference import Inference
from fastforward.autoquant.kinds import Kind

LIMIT = 7
TABLE = torch.ones(3)
SIZES = (1, 2, (3, 4))


class Config:
    hidden: int = 3


def counted(x) -> int:
    return len(x)


def scaled(x) -> "torch.Tensor":
    return x


def halves(x) -> tuple[int, int]:
    return x.shape[0], 2


def resolve(node: ast.expr):
    """As the rewriter resolves: module globals, then attributes."""
    if isinstance(node, ast.Name):
        return globals().get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value)
        return None if owner is None else getattr(owner, node.attr, None)
    return None


def probe(source: str, self_types=None) -> list[bool]:
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, ast.FunctionDef)
    inference = Inference(node, resolve, self_types)
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "probe"]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    return [inference.may_be_tensor(call.args[0]) for call in calls]


TENSOR, PLAIN = [True], [False]
EXPRESSIONS = {
    # literals and arithmetic
    "3": PLAIN, "-1": PLAIN, "'a'": PLAIN, "None": PLAIN, "True": PLAIN, "f'{x}'": PLAIN, "'%s' % x": PLAIN,
    "3 + 4.0": PLAIN, "x + 1": TENSOR, "1 - x": TENSOR, "-x": TENSOR, "not x": PLAIN, "2 ** 0.5": PLAIN,
    "[1] + [2]": PLAIN, "[x] + [x]": PLAIN, "([x] + [x])[0]": TENSOR, "(1, 2)[0]": PLAIN, "(x, 2)[0]": TENSOR,
    "{'a': x}['a']": TENSOR, "x or 1": TENSOR, "1 or 2": PLAIN, "1 if x else 2": PLAIN, "x if x else 2": TENSOR,
    "(y := 3)": PLAIN, "(y := x)": TENSOR, "lambda v: v": PLAIN,
    # shapes, sizes, data types
    "x.shape": PLAIN, "x.shape[0]": PLAIN, "x.size(0) // 2": PLAIN, "x.size()": PLAIN, "x.dim() - 1": PLAIN,
    "x.ndim": PLAIN, "x.dtype": PLAIN, "x.device": PLAIN, "x.numel() / 2": PLAIN, "x.item()": PLAIN, "x.tolist()": PLAIN,
    "x.shape[-1] ** -0.5": PLAIN, "torch.Size([1])": PLAIN, "torch.finfo(x.dtype).min": PLAIN, "torch.float32": PLAIN,
    # calls
    "len(x)": PLAIN, "int(x)": PLAIN, "float(x)": PLAIN, "range(3)": PLAIN, "max(1, 2)": PLAIN, "max(x, 2)": TENSOR,
    "sum(x)": TENSOR, "abs(-1)": PLAIN, "str(x) + 'a'": PLAIN, "math.sqrt(2)": PLAIN, "isinstance(x, int)": PLAIN,
    "counted(x) + 1": PLAIN, "scaled(x)": TENSOR, "halves(x)[0] * 2": PLAIN, "unknown(x)": TENSOR, "x.foo()": TENSOR,
    "torch.relu(x)": TENSOR, "torch.is_tensor(x)": PLAIN, "torch.nn.Linear(1, 1)": PLAIN, "torch.nn.Parameter(x)": TENSOR,
    # globals and attributes
    "LIMIT": PLAIN, "TABLE": TENSOR, "SIZES[2]": PLAIN, "math.pi * 2": PLAIN, "x.grad": TENSOR, "unknown.y": TENSOR,
    # tensors of integers and truth values are no floating tensors until arithmetic makes them so
    "x == 1": PLAIN, "x > 0": PLAIN, "x is None": PLAIN, "x.argmax(-1)": PLAIN, "x.long()": PLAIN, "x.argmax(-1) + 1": PLAIN,
    "(x > 0) * 0.5": TENSOR, "x.long() / 2": TENSOR, "torch.arange(3)": PLAIN, "torch.arange(3.0)": TENSOR,
    "torch.zeros(3)": TENSOR, "torch.zeros(3, dtype=torch.long)": PLAIN, "torch.zeros(3, dtype=x.dtype)": TENSOR,
    "(x > 0) & (x < 1)": PLAIN, "(x > 0).unsqueeze(0)": PLAIN, "(x > 0).float()": TENSOR,
}  # fmt: skip


@pytest.mark.parametrize(("expression", "expected"), EXPRESSIONS.items())
def test_expression(expression: str, expected: list[bool]) -> None:
    assert probe(f"def f(x):\n    probe({expression})") == expected


ANNOTATIONS = {
    "int": PLAIN, "bool": PLAIN, "float": PLAIN, "str": PLAIN, "None": PLAIN, "'int'": PLAIN, "int | None": PLAIN,
    "Optional[int]": PLAIN, "list[int]": PLAIN, "torch.Size": PLAIN, "torch.dtype": PLAIN, "Config": PLAIN,
    "torch.Tensor": TENSOR, "'torch.Tensor'": TENSOR, "torch.Tensor | int": TENSOR, "Optional[torch.Tensor]": TENSOR,
    "Any": TENSOR, "object": TENSOR, "torch.LongTensor": TENSOR, "list[torch.Tensor]": PLAIN, "Callable": PLAIN,
    "Sequence[int]": PLAIN, "not valid": TENSOR, "'not valid'": TENSOR,
}  # fmt: skip


@pytest.mark.parametrize(("annotation", "expected"), ANNOTATIONS.items())
def test_annotation(annotation: str, expected: list[bool]) -> None:
    if annotation == "not valid":
        annotation = "print('x')"
    assert probe(f"def f(x: {annotation}):\n    probe(x)") == expected


@pytest.mark.parametrize(
    ("annotation", "expected"), {"list[int]": PLAIN, "list[torch.Tensor]": TENSOR, "dict[str, int]": PLAIN}.items()
)
def test_element_of_an_annotated_container(annotation: str, expected: list[bool]) -> None:
    assert probe(f"def f(x: {annotation}):\n    probe(x[0])") == expected


FUNCTIONS = {
    "reassignment joins": ("def f(x):\n    y = 1\n    probe(y)\n    y = x\n", [True]),
    "cycles of integers stay integers": ("def f(x):\n    n = 0\n    while x:\n        n = n + 1\n    probe(n)", [False]),
    "cycles reach a tensor": ("def f(x):\n    a = 0\n    for i in x:\n        a = b\n        b = a + x\n    probe(a)", [True]),
    "augmented": ("def f(x):\n    n = 0\n    n += 1\n    m = 0\n    m += x\n    probe(n), probe(m)", [False, True]),
    "unpacked shape": ("def f(x):\n    b, s, *_ = x.shape\n    probe(b * s)", [False]),
    "unpacked parts": ("def f(x):\n    a, b = 1, x\n    probe(a), probe(b)", [False, True]),
    "unpacked call": ("def f(x):\n    a, b = g(x)\n    probe(a)", [True]),
    "range loop": ("def f(x):\n    for i in range(len(x)):\n        probe(i)", [False]),
    "tensor loop": ("def f(x):\n    for v in x:\n        probe(v)", [True]),
    "enumerate": ("def f(x):\n    for i, v in enumerate(x):\n        probe(i), probe(v)", [False, True]),
    "zip": ("def f(x):\n    for i, v in zip(range(3), x):\n        probe(i), probe(v)", [False, True]),
    "tutorial": ("def f(x: torch.Tensor, y: list[int]):\n    y = y + y\n    for y_ in y:\n        probe(y), probe(y_)", [False, False]),
    "with": ("def f(x):\n    with x as y:\n        probe(y)", [True]),
    "except": ("def f(x):\n    try:\n        pass\n    except OSError as e:\n        probe(e)", [False]),
    "comprehension": ("def f(x):\n    return [probe(i) for i in range(3)], [probe(v) for v in x]", [False, True]),
    "match": ("def f(x):\n    match x:\n        case [y]:\n            probe(y)", [True]),
    "global": ("def f(x):\n    global LIMIT\n    LIMIT = 2\n    probe(LIMIT)", [True]),
    "shadowed builtin": ("def f(x):\n    len = x\n    probe(len(x))", [True]),
    "varargs": ("def f(*x, **k):\n    probe(x), probe(x[0]), probe(k)", [False, True, False]),
    "isinstance int": ("def f(x):\n    if isinstance(x, int):\n        probe(x)\n    else:\n        probe(x)", [False, True]),
    "isinstance tensor": ("def f(x):\n    if isinstance(x, torch.Tensor):\n        probe(x)\n    else:\n        probe(x)", [True, False]),
    "isinstance tuple": ("def f(x):\n    if isinstance(x, (int, float)):\n        probe(x)", [False]),
    "is_tensor": ("def f(x):\n    y = 0 if torch.is_tensor(x) else probe(x)", [False]),
    "not isinstance returns": ("def f(x):\n    if torch.is_tensor(x):\n        return x\n    probe(x)", [False]),
    "narrowed then assigned": ("def f(x, y):\n    if isinstance(x, int):\n        x = y\n        probe(x)", [True]),
    "is None": ("def f(x):\n    if x is None:\n        probe(x)\n    else:\n        probe(x)", [False, True]),
    "and": ("def f(x, y):\n    if y and isinstance(x, int):\n        probe(x)\n    else:\n        probe(x)", [False, True]),
    "nested function": ("def f(x):\n    def g(y: int, z):\n        probe(y), probe(z)\n    probe(g)", [False, True, False]),
    "default is no evidence": ("def f(x=1):\n    probe(x)", [True]),
}  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_function(source: str, expected: list[bool]) -> None:
    assert probe(source) == expected


def test_attributes_come_from_the_class() -> None:
    source = """
    class Block:
        eps: float
        def __init__(self, heads: int, config):
            self.heads, self.scale = heads, heads ** -0.5
            self.weight = torch.nn.Parameter(torch.ones(heads))
            self.changed = 1
            self.config, self.later = config, None
        def forward(self, x):
            self.changed = x
    """
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, ast.ClassDef)
    known = attribute_kinds(node, resolve)
    assert known == {
        "eps": Kind.PLAIN, "heads": Kind.INT, "scale": Kind.PLAIN, "weight": Kind.MAYBE, "changed": Kind.MAYBE,
        "config": Kind.MAYBE, "later": Kind.MAYBE,
    }  # fmt: skip
    body = "def f(self, x):\n    probe(self.heads * 2), probe(self.weight), probe(self.unknown), probe(self.training)"
    assert probe(body, known) == [False, True, True, False]


@pytest.mark.parametrize("layer", ["Sequential", "ModuleList", "Linear", "Module"])
def test_a_layer_is_no_tensor_whatever_arithmetic_it_has(layer: str) -> None:
    assert probe(f"def f(x):\n    head = torch.nn.{layer}()\n    probe(head); probe(head.norm(x))") == [False, True]


def test_types_serve_as_self_types() -> None:
    assert probe("def f(self):\n    probe(self.n), probe(self.w)", {"n": int, "w": torch.nn.Parameter}) == [False, True]


def test_annotated_names_used_by_the_tests_exist() -> None:
    assert Optional and Sequence  # resolved by name in the annotation cases
