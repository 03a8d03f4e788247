"""Residual additions: a convolution adds what another one stored, in codes where both sides are codes."""

from collections.abc import Callable

import pytest
import torch
from calibrated import Net, outputs, simulated

import fastforward as ff

nn = torch.nn
F = torch.nn.functional
Forward = Callable[[Net, torch.Tensor], torch.Tensor]


def _decibels(expected: torch.Tensor, actual: torch.Tensor) -> float:
    noise = (expected - actual).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(expected.square().sum() / noise))


def _conv(channels: int = 8, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight)  # what it adds is as large as what it is added to, as in a ResNet
    return conv


def _net(forward: Forward) -> Net:
    kernels = {"stem": 3, "a": 3, "b": 3, "down": 1, "last": 3}
    return Net(forward, **{name: _conv(kernel=k) for name, k in kernels.items() if name in forward.__code__.co_names})


def _identity(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    return self.last(F.relu(self.b(F.relu(self.a(x))) + x))


def _in_place(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    out = self.b(F.relu(self.a(x)))
    out += x
    return self.last(F.relu(out, inplace=True))


def _pooled(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
    return self.last(F.relu(x + self.b(F.relu(self.a(x)))))


def _projected(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    return self.last(F.relu(self.b(F.relu(self.a(x))) + self.down(x)))


def _other_activation(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    return self.last(F.hardswish(self.b(F.relu(self.a(x))) + x))


def _no_activation(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    x = self.a(x) + x
    return self.last(self.b(x) + x)


CHAINS: dict[str, tuple[Forward, tuple[str, str, tuple[str, ...]]]] = {
    "identity": (_identity, ("uint8", "uint8", ("add", "relu"))),
    "in place": (_in_place, ("uint8", "uint8", ("add", "relu"))),
    "after pooling": (_pooled, ("uint8", "uint8", ("add", "relu"))),
    "a projection that nobody stored as codes": (_projected, ("uint8", "uint8", ("add", "relu"))),
    "another activation": (_other_activation, ("uint8", "uint8", ("add", "hardswish"))),
    "no activation": (_no_activation, ("uint8", "uint8", ("add",))),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_sum_is_stored_by_the_convolution(name: str) -> None:
    forward, link = CHAINS[name]
    torch.manual_seed(0)
    example = torch.randn(2, 8, 12, 12)
    net = _net(forward).eval()
    expected = outputs(net, example)
    model = simulated(net, example)
    simulation = _decibels(expected, outputs(model, example))
    ff.convert(model)
    assert _decibels(expected, outputs(model, example, runs=3)) > simulation - 2  # the addend is rounded to 8 bits
    links = {row.path: (row.source, row.result, row.fused) for row in ff.integer.explain(model).integer}
    assert links["b"] == link
    assert links["last"][0] == "uint8"


def test_a_small_product_is_added_in_floats() -> None:
    """Rounding what it is added to would bury it in noise."""
    torch.manual_seed(0)
    example = torch.randn(2, 8, 12, 12)
    net = _net(_identity).eval()
    with torch.no_grad():
        net.b.weight.mul_(0.02)
    model = simulated(net, example)
    expected = outputs(model, example)
    ff.convert(model)
    results = [outputs(model, example) for _ in range(3)]
    assert model.b.adds_codes is False
    assert all(_decibels(expected, result) > 60 for result in results)


def _used_again(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    y = self.b(F.relu(self.a(x))) + x
    return self.last(F.relu(y)) + x * y


def _addend_changed_afterwards(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    y = self.b(F.relu(self.a(x))) + x
    x.mul_(-3)
    return self.last(y) + x


def _pending_addend_changed_afterwards(self: Net, x: torch.Tensor) -> torch.Tensor:
    z = self.down(x)
    y = self.b(x) + z
    z.relu_()
    return self.last(y) + z


def _sum_with_itself(self: Net, x: torch.Tensor) -> torch.Tensor:
    y = self.stem(x)
    return self.last(y + y)


def _sum_of_sums(self: Net, x: torch.Tensor) -> torch.Tensor:
    return self.last((self.a(x) + self.b(x)) + (self.stem(x) + self.down(x)))


def _normalized_sum(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    mean, var = torch.full((8,), 0.1), torch.full((8,), 2.0)
    return self.last(F.batch_norm(self.b(F.relu(self.a(x))) + x, mean, var))


def _broadcast(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.stem(x))
    return self.last(self.b(F.relu(self.a(x))) + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "forward",
    [
        _used_again,
        _addend_changed_afterwards,
        _pending_addend_changed_afterwards,
        _sum_with_itself,
        _sum_of_sums,
        _normalized_sum,
        _broadcast,
    ],
)
def test_sums_in_programs_that_go_on_using_the_operands(forward: Forward) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 12, 12)
    model = simulated(_net(forward), example)
    expected = outputs(model, example)
    ff.convert(model)
    for _ in range(4):
        assert _decibels(expected, outputs(model, example)) > 38


def _wide(self: Net, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    return self.last(self.b(x) + x)


def test_codes_much_coarser_than_the_result_are_not_added() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 12, 12)

    model = simulated(_net(_wide), example)
    scale = model.b.input_quantizer.scale
    model.b.input_quantizer.set_parameters(scale * 16, model.b.input_quantizer.zero_point)
    expected = outputs(model, example)
    ff.convert(model)
    assert _decibels(expected, outputs(model, example, runs=3)) > 45
