"""A tensor that is changed in place under one name stays the same tensor under all of them."""

import pytest
import torch

import fastforward as ff
from tests.autoquant.programs import copying, load, replace_stubs

PROGRAMS = {
    "another name": "a = y; a += 1",
    "another name of what is changed": "a = y; y += 1; y = a",
    "an element of a list": "xs = [y, x]; xs[0] += 1",
    "a value of a dict": "d = {'k': y}; d['k'] += 1",
    "appended": "xs = []; xs.append(y); xs[0] += 1",
    "unpacked": "a, b = y, x; a += b",
    "a loop variable": "for t in [y]: t += 1",
    "a method": "xs = [y]; xs[0].add_(1)",
    "an index": "v = y[0]; v += 1",
    "a view": "v = y.view(-1); v.mul_(2)",
    "a view of a view": "v = y.transpose(0, 1); w = v.flatten(); u = y[1]; u.mul_(2)",
    "one of two": "v = y if x.dim() else x; v += 1",
    "assigned in a condition": "y = y if (v := y[0]) is None else y; v += 1",
}
HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x, y):
"""


@pytest.mark.xfail(strict=True, reason="a helper changes the quantized copy that it was handed: a known limit")
def test_a_change_by_a_helper_reaches_the_argument() -> None:
    source = f"def twice(t):\n    t.mul_(2)\n{HEAD}        twice(y)\n        return torch.relu(y)\n"
    net = ff.quantize_model(load(source).Net())
    replace_stubs(net, copying)
    x, y = torch.randn(3, 4), torch.ones(3, 4)
    assert torch.equal(net(x, y), 2 * torch.ones(3, 4))
    assert torch.equal(y, 2 * torch.ones(3, 4))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_change_reaches_the_argument_whatever_name_it_has(name: str) -> None:
    """Quantizers that hand on copies stand everywhere; a change of a copy would be lost."""
    body = "".join(f"        {line}\n" for line in PROGRAMS[name].split("; "))
    source = f"{HEAD}{body}        return torch.relu(y) + torch.relu(x)\n"
    results = []
    for quantized in (False, True):
        net = load(source).Net()
        if quantized:
            ff.quantize_model(net)
            assert replace_stubs(net, copying)
        torch.manual_seed(0)
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        before = y.clone()
        results.append((net(x, y), y))
        assert not torch.equal(y, before), name
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
