"""Operators on the result of an integer layer, in every way that torch lets one write their arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastforward as ff
from tests.integer.calibrated import Net, simulated

nn = torch.nn
F = torch.nn.functional
Spelling = Callable[[Any], Any]

MATRIX: dict[str, Spelling] = {
    "reshape(shape=)": lambda y: y.reshape(shape=(4, -1)),
    "reshape(*shape)": lambda y: y.reshape(4, -1),
    "torch.reshape(input=, shape=)": lambda y: torch.reshape(input=y, shape=(4, -1)),
    "view(size=)": lambda y: y.view(size=(4, -1)),
    "view(dtype)": lambda y: y.view(torch.int32),
    "view(dtype=)": lambda y: y.view(dtype=torch.int32),
    "transpose(dim0=, dim1=)": lambda y: y.transpose(dim0=0, dim1=-1),
    "torch.transpose(input=)": lambda y: torch.transpose(input=y, dim0=0, dim1=1),
    "swapaxes(axis0=, axis1=)": lambda y: y.swapaxes(axis0=0, axis1=1),
    "permute(dims=)": lambda y: y.permute(dims=(1, 0)),
    "torch.permute(input=, dims=)": lambda y: torch.permute(input=y, dims=(1, 0)),
    "flatten(start_dim=)": lambda y: y.flatten(start_dim=-2),
    "torch.flatten(input=, end_dim=)": lambda y: torch.flatten(input=y, end_dim=1),
    "size(dim=)": lambda y: y.size(dim=1),
    "add(other=)": lambda y: y.add(other=1.5),
    "add(other=, alpha=)": lambda y: y.add(other=y, alpha=2),
    "torch.add(input=, other=)": lambda y: torch.add(input=y, other=y),
    "torch.add(out=)": lambda y: torch.add(y, y, out=torch.empty(8, 8)),
    "add_(other=)": lambda y: y.add_(other=1.5),
    "torch.mul(input=, other=)": lambda y: torch.mul(input=y, other=y),
    "torch.mean(input=, dim=)": lambda y: torch.mean(input=y, dim=0),
    "mean(dim=, keepdim=)": lambda y: y.mean(dim=(0, 1), keepdim=True),
    "F.relu(input=, inplace=)": lambda y: F.relu(input=y, inplace=True),
    "torch.relu(input=)": lambda y: torch.relu(input=y),
    "torch.relu_": lambda y: torch.relu_(y),
    "F.gelu(input=, approximate=)": lambda y: F.gelu(input=y, approximate="tanh"),
    "F.silu(input=, inplace=)": lambda y: F.silu(input=y, inplace=True),
    "F.leaky_relu(negative_slope=)": lambda y: F.leaky_relu(y, negative_slope=0.3, inplace=True),
    "F.hardtanh(min_val=, max_val=)": lambda y: F.hardtanh(y, min_val=-0.1, max_val=0.2),
    "tanh(out=)": lambda y: torch.tanh(y, out=torch.empty(8, 8)),
    "F.dropout(training=)": lambda y: F.dropout(input=y, p=0.5, training=False),
    "torch.dropout(train=)": lambda y: torch.dropout(input=y, p=0.5, train=False),
    "torch.numel(input=)": lambda y: torch.numel(input=y),
}
IMAGE: dict[str, Spelling] = {
    "F.max_pool2d(kernel_size=)": lambda y: F.max_pool2d(input=y, kernel_size=2, stride=1, padding=1),
    "F.max_pool2d(return_indices=)": lambda y: F.max_pool2d(y, 2, return_indices=True)[1],
    "torch.max_pool2d(stride=)": lambda y: torch.max_pool2d(y, kernel_size=(2, 2), stride=(1, 2)),
    "F.avg_pool2d(kernel_size=)": lambda y: F.avg_pool2d(input=y, kernel_size=2, ceil_mode=True),
    "F.adaptive_avg_pool2d(output_size=)": lambda y: F.adaptive_avg_pool2d(input=y, output_size=(1, 1)),
    "F.batch_norm": lambda y: F.batch_norm(
        input=y, running_mean=torch.zeros(8), running_var=torch.ones(8), weight=torch.full((8,), 2.0), eps=0.1
    ),
}


def _same(layer: nn.Module, example: torch.Tensor, spelling: Spelling) -> bool:
    model = ff.convert(simulated(Net(lambda self, x: spelling(self.layer(x)), layer=layer), example), backend="onednn")
    with torch.no_grad():
        expected = spelling(model.layer(example) + 0)
        found = [model(example) for _ in range(3)]
    if not isinstance(expected, torch.Tensor):
        return all(y == expected for y in found)
    return all(y.dtype == expected.dtype and torch.allclose(y + 0, expected, rtol=1e-4, atol=1e-4) for y in found)


@pytest.mark.parametrize("spelling", MATRIX.values(), ids=MATRIX.keys())
def test_results_of_linear_layers(spelling: Spelling) -> None:
    torch.manual_seed(0)
    assert _same(nn.Linear(8, 8), torch.randn(8, 8), spelling)


@pytest.mark.parametrize("spelling", IMAGE.values(), ids=IMAGE.keys())
def test_results_of_convolutions(spelling: Spelling) -> None:
    torch.manual_seed(0)
    assert _same(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 8, 8), spelling)


IN_PLACE: list[nn.Module] = [nn.ReLU(inplace=True), nn.ReLU6(True), nn.SiLU(True), nn.Hardswish(True)]


@pytest.mark.parametrize("module", IN_PLACE, ids=lambda module: type(module).__name__)
def test_activations_in_place_change_what_they_are_given(module: nn.Module) -> None:
    torch.manual_seed(0)

    def activated(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.module(y)
        return y * 1

    example = torch.randn(2, 3, 8, 8)
    model = simulated(Net(activated, layer=nn.Conv2d(3, 8, 3, padding=1), module=module), example)
    with torch.no_grad():
        expected = model(example)
        ff.convert(model, backend="onednn")
        found = [model(example) + 0 for _ in range(3)]
    assert all(torch.allclose(y, expected, rtol=1e-3, atol=1e-3) for y in found)
