"""A tensor that is changed in place under one name stays the same tensor under all of them, in all functions."""

import pytest
import torch

from tests.autoquant.programs import compare, copying, load

NAMES = {
    "another name": "a = y; a += 1",
    "another name of what is changed": "a = y; y += 1; y = a",
    "an element of a list": "xs = [y, x]; xs[0] += 1",
    "a value of a dict": "d = {'k': y}; d['k'] += 1",
    "what a dict gives out": "d = {'k': y}; a = d.get('k'); a += 1",
    "appended": "xs = []; xs.append(y); xs[0] += 1",
    "added to a list": "xs = [x]; xs += [y]; xs[1] += 1",
    "unpacked": "a, b = y, x; a += b",
    "a loop variable": "for t in [y]: t += 1",
    "enumerated": "for i, t in enumerate([y]): t += i + 1",
    "zipped": "for t, u in zip([y], [x]): t += u",
    "comprehended": "xs = [t for t in [y]]; xs[0] += 1",
    "matched": "match (y, x):\n    case (a, _):\n        a += 1",
    "a method": "xs = [y]; xs[0].add_(1)",
    "an index": "v = y[0]; v += 1",
    "a view": "v = y.view(-1); v.mul_(2)",
    "a view without a name": "y.view(-1).mul_(2)",
    "a view by a function": "v = torch.flatten(y); v.mul_(2)",
    "a view by an attribute": "v = y.T; v += 1",
    "a view of a view": "v = y.transpose(0, 1); w = v.flatten(); u = y[1]; u.mul_(2)",
    "what a method in place gives": "v = y.add_(1); v += 1",
    "a function in place": "torch.relu_(y)",
    "one of two": "v = y if x.dim() else x; v += 1",
    "either": "(y if x.dim() else x).add_(1)",
    "assigned in a condition": "y = y if (v := y[0]) is None else y; v += 1",
    "an attribute": "self.kept = y; self.kept += 1",
    "an operator without anything to do": "v = F.dropout(y, 0.5, False); v += 1",
}
CALLS = {
    "a helper": "twice(y)",
    "a helper by keyword": "twice(t=y)",
    "a helper that spreads its arguments": "spread(x, y)",
    "a helper that is given the tensor twice": "first(y, y)",
    "a helper of a helper": "outer(x, y)",
    "a decorated helper": "decorated(y)",
    "what a helper hands back": "a = same(y, 0); a += 1",
    "what a helper hands back in a list": "a, b = both(x, y); b += 1",
    "what a helper yields": "for t in given(y): t += 1",
    "what a context manager gives": "with entered(y) as a: a += 1",
    "a method of the class": "self.method(x, y)",
    "a method of the class above": "super().above(y)",
    "a static method": "self.static(y)",
    "a layer in place": "self.act(y)",
    "a layer in place by position": "self.elu(y)",
    "a layer of the user": "self.block(y)",
    "what a layer hands back that does nothing": "a = self.same(y); a += 1",
    "what a layer hands back outside training": "self.drop.eval(); a = self.drop(y); a += 1",
    "a layer in place outside training": "self.drop_.eval(); a = self.drop_(y); a += 1",
    "a layer in place in training": "self.drop_.train(); self.drop_(y)",
    "a function within": "def change(t):\n    t += 1\nchange(y)",
    "a variable of a function within": "def change():\n    y.add_(1)\nchange()",
    "another name of it within": "def change():\n    a = y\n    a += 1\nchange()",
    "a name within of what changes outside": "def read():\n    a = y\n    return torch.relu(a)\ny += 1\ny += read()",
    "a lambda": "change = lambda t: t.add_(1); change(y)",
    "a lambda without a name": "(lambda t: t.add_(1))(y)",
}
HEAD = """
import contextlib, functools
import torch
from torch import nn
import torch.nn.functional as F

def twice(t):
    u = torch.tanh(t)
    t.mul_(2)
    return u

def spread(*ts):
    twice(ts[1])

def first(t, u):
    t.mul_(2)
    t.add_(torch.tanh(u))

def outer(t, u):
    return twice(u) + t

@torch.no_grad()
def decorated(t):
    return twice(t)

def same(t, n):
    return t if n <= 0 else same(t * 2, n - 1)

def both(t, u):
    return [t + 1, u]

def given(t):
    torch.relu(t)
    yield t

@contextlib.contextmanager
def entered(t):
    torch.relu(t)
    yield t

class Block(nn.Module):
    def forward(self, t):
        u = torch.tanh(t)
        t.mul_(2)
        return u

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.elu = nn.ELU(1.0, True)
        self.block = Block()
        self.same = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.drop_ = nn.Dropout2d(0.5, inplace=True)

    def above(self, t):
        return twice(t)

class Net(Base):
    def method(self, t, u):
        return twice(u) * t

    @staticmethod
    def static(t):
        return twice(t)

    def forward(self, x, y):
"""


def _arguments() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4), torch.randn(3, 4)


def _body(lines: str) -> str:
    return "".join(f"        {line}\n" for line in lines.replace("; ", "\n").splitlines())


@pytest.mark.parametrize("name", [*NAMES, *CALLS])
def test_a_change_reaches_the_argument_whatever_name_it_has(name: str) -> None:
    """Quantizers that hand on copies stand everywhere; a change of a copy would be lost."""
    lines = {**NAMES, **CALLS}[name]
    source = f"{HEAD}{_body(lines)}        return torch.relu(y) + torch.relu(x)\n"
    net, (x, y) = load(source).Net(), _arguments()
    before = y.clone()
    net(x, y)
    assert not torch.equal(y, before), name
    assert compare(source, _arguments, make=copying) == []
