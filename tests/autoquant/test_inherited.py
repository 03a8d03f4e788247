"""Methods inherited from a class of another module, called by code that is not rewritten."""

import inspect
from typing import Any

import pytest
import torch

import fastforward as ff
from tests.autoquant.programs import load

BASE = """\
import torch
from torch import nn

class Base(nn.Module):
    def encode(self, x, *, times=2):
        "Multiply."
        for _ in range(times):
            x = torch.matmul(self.inner(x), self.weight)
        return x

    def inner(self, x):
        return x @ self.weight

    def shadowed(self, x):
        return x.matmul(self.weight)

    def describe(self):
        return "%s of %d" % (type(self).__name__, 1 + 1)
"""
DERIVED = """\
import torch
from torch import nn
from {base} import Base

class Net(Base):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4) * 2)

    def shadowed(self, x):
        return x * 3

    def forward(self, x):
        return self.encode(x)
"""


@pytest.fixture
def net() -> Any:
    base = load(BASE)
    return load(DERIVED.format(base=base.__name__)).Net


def stubs(model: Any) -> list[str]:
    return [name for name, _ in model.named_quantizers(skip_stubs=False)]


def test_its_operators_get_quantizers_on_the_first_call(net: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = ff.quantize(net(), lambda model: model.inner(x), progress=False)
    active = [name for name, _ in model.named_quantizers()]
    assert active == ["quantizer_inner_x", "quantizer_inner_self_weight"]
    assert not torch.equal(model.inner(x), net().inner(x))
    assert torch.equal(model.encode(x), net().encode(x))


def test_compiled_before_it_was_ever_called(net: Any) -> None:
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    model = torch.compile(ff.quantize_model(net()), fullgraph=True, backend="eager")
    assert torch.equal(model(x), net()(x))


def test_it_looks_and_acts_as_before(net: Any) -> None:
    x = torch.randn(3, 4)
    model, plain = ff.quantize_model(net()), net()
    before = stubs(model)
    for _ in range(2):
        for name in ("encode", "inner", "shadowed"):
            mine, theirs = getattr(type(model), name), getattr(net, name)
            assert inspect.signature(mine) == inspect.signature(theirs)
            assert (mine.__name__, mine.__qualname__, mine.__doc__) == (
                theirs.__name__,
                theirs.__qualname__,
                theirs.__doc__,
            )
            assert torch.equal(getattr(model, name)(x), getattr(plain, name)(x))
        assert torch.equal(model.encode(x, times=1), plain.encode(x, times=1))
        assert model.describe() == "Net of 2"
    with pytest.raises(TypeError, match="unexpected keyword argument 'turns'"):
        model.encode(x, turns=1)
    assert set(before) < set(stubs(model))
    assert type(model).describe is net.describe
