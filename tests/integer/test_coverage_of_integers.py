"""Coverage counts the work of every kind of integer layer, as much as the float layer does."""

import copy

import pytest
import torch

import fastforward as ff

nn = torch.nn

LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (5, 8), "w8a8"),
    "linear, dynamic": (lambda: nn.Linear(8, 12), (5, 8), "w8a8_dynamic"),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), "w8a8"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7), "w8a8"),
    "lstm": (lambda: nn.LSTM(8, 12, num_layers=2), (5, 3, 8), "w8a8"),
    "gru both ways": (lambda: nn.GRU(8, 12, bidirectional=True), (5, 3, 8), "w8a8"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_integer_layers_do_the_work_of_float_ones(name: str) -> None:
    torch.manual_seed(0)
    make, shape, scheme = LAYERS[name]
    model, x = nn.Sequential(make()).eval(), torch.randn(shape)
    expected = ff.coverage(copy.deepcopy(model), x).macs
    ff.convert(ff.quantize(model, [x], scheme=scheme, progress=False))
    covered = ff.coverage(model, x)
    (row,) = [row for row in covered.rows if row.macs]
    assert row.mode == "integer"
    assert covered.macs == expected > 0
