"""The operators of compiled integer programs against their references."""

from typing import Any

import pytest
import torch
from fastforward_kernels import cpu_chain, ops_chain
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.int_mm import int_mm

FACTOR = 2.0**-10


def grid(step: float, zero_point: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor(step), torch.tensor(1.0 / step), torch.tensor(zero_point, dtype=torch.int32)


def product(rows: int, activation: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str]:
    torch.manual_seed(rows)
    codes = torch.randint(0, 256, (2, rows, 40), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
    return codes, weight, torch.full((24,), FACTOR), torch.randn(24), activation


@pytest.mark.parametrize("zero_point, highest", [(0, 255), (131, 255), (3, 15)])
def test_rounding(zero_point: int, highest: int) -> None:
    x = torch.cat([torch.randn(500) * 9, torch.tensor([0.125, -0.125, 1e9, -1e9, 0.0])]).view(5, 101)
    arguments = (*grid(0.25, zero_point), highest)
    codes = ops_chain.ROUND_TO_CODES(x, *arguments, [])
    assert torch.equal(codes, reference.round_to_codes(x, *arguments))
    assert int(codes.max()) == highest
    values = ops_chain.ROUND_TO_GRID(x, *arguments)
    assert torch.equal(values, (codes.float() - zero_point) * 0.25)
    assert ops_chain.ROUND_TO_GRID(torch.tensor([torch.nan]), *arguments).isnan().all()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_linear_to_floats(rows: int, activation: str) -> None:
    arguments = product(rows, activation)
    y = ops_chain.LINEAR_TO_FLOATS(*arguments)
    torch.testing.assert_close(y, reference.linear_to_floats(*arguments), rtol=1e-5, atol=1e-5)


def test_integers_of_a_weight() -> None:
    weight = torch.randint(-128, 128, (24, 48), dtype=torch.int8)
    scale = torch.rand(24, 1)
    assert torch.equal(ops_chain.WEIGHT_OF_INTEGERS(weight, scale), weight.float() * scale)
    for _ in range(2):
        sums = ops_chain.CHANNEL_SUMS(weight)
        assert torch.equal(sums, weight.int().sum(1, dtype=torch.int32))
        sums.zero_()  # what is kept is nobody else's
    weight.fill_(1)
    assert torch.equal(ops_chain.CHANNEL_SUMS(weight), torch.full((24,), 48, dtype=torch.int32))


@pytest.mark.parametrize("zero_point, highest", [(0, 255), (131, 255), (3, 15)])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_linear_to_codes(activation: str, smoothed: bool, zero_point: int, highest: int) -> None:
    arguments = product(300, activation)
    after = (torch.rand(24) + 0.5 if smoothed else None, *grid(0.25, zero_point), highest)
    for _ in range(2):  # the second time what was prepared is used again
        codes = ops_chain.LINEAR_TO_CODES(*arguments, *after)
    expected = reference.linear_to_codes(*arguments, *after)
    off = (codes.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 1e-3  # ties


def convolution(activation: str, zero_point: int, highest: int) -> tuple[Any, ...]:
    torch.manual_seed(highest)
    codes = torch.randint(0, 256, (2, 8, 9, 9), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (12, 4, 3, 3), dtype=torch.int8)
    addend = torch.randint(0, 256, (2, 12, 5, 5), dtype=torch.uint8)
    operands = codes, weight, 0.5, torch.full((12,), FACTOR), torch.randn(12), [2, 2], [1, 1], [1, 1], 2
    return (*operands, activation, addend, 0.125, 7, 0.25, zero_point, highest)


@pytest.mark.parametrize("zero_point, highest", [(0, 255), (131, 255), (3, 15)])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_convolution_plus_codes(activation: str, zero_point: int, highest: int) -> None:
    arguments = convolution(activation, zero_point, highest)
    expected, addend = reference.convolution_plus_codes(*arguments), arguments[10].clone()
    for _ in range(2):
        codes = ops_chain.CONVOLUTION_PLUS_CODES(*arguments)
    off = (codes.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 0.02  # ties: all steps are powers of two here
    assert torch.equal(arguments[10], addend)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert int(expected.max()) == highest


@pytest.mark.parametrize("padding", [[0, 0], [1, 2], [1, 0, 2]])
def test_channels_inside(padding: list[int]) -> None:
    codes = torch.randint(0, 256, (2, 3, 5, 7, 4)[: 2 + len(padding)], dtype=torch.uint8)
    for given in (codes, codes[:, :, ::2], codes.movedim(1, -1).contiguous().movedim(-1, 1)):
        y, expected = ops_chain.CHANNELS_INSIDE(given, padding, 9), reference.channels_inside(given, padding, 9)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()


def test_machines_without_exact_products_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_chain, "exact_onednn", lambda: False)
    arguments, after = product(4, "relu"), (None, *grid(0.25, 3), 255)
    assert torch.equal(ops_chain.LINEAR_TO_FLOATS(*arguments), reference.linear_to_floats(*arguments))
    assert torch.equal(ops_chain.LINEAR_TO_CODES(*arguments, *after), reference.linear_to_codes(*arguments, *after))
    others = convolution("relu", 3, 255)
    assert torch.equal(ops_chain.CONVOLUTION_PLUS_CODES(*others), reference.convolution_plus_codes(*others))


@pytest.mark.parametrize("strides", [(40, 1), (1, 1), (64, 1), (1, 3)])
def test_a_single_row_is_read_in_order_whatever_its_stride(strides: tuple[int, int]) -> None:
    codes, weight, *_ = product(1, "none")
    row = torch.empty_strided((1, 40), strides, dtype=torch.uint8).copy_(codes[0])
    assert torch.equal(int_mm(row, weight.t()), codes[0].int() @ weight.t().int())
