"""Integer neighbours: each against the same operator on dequantized floats, requantized."""

import fastforward_kernels as ffk
import pytest
import torch
from torch.nn import functional

SCALE, ZERO = torch.tensor(0.05), torch.tensor(-3, dtype=torch.int32)
OTHER_SCALE, OTHER_ZERO = torch.tensor(0.11), torch.tensor(7, dtype=torch.int32)
OUT = {"out_dtype": torch.int8, "out_scale": torch.tensor(0.07), "out_zero_point": torch.tensor(5, dtype=torch.int32)}


def integers(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def real(q, scale=SCALE, zero_point=ZERO):
    return (q.float() - zero_point) * scale


X, Y = integers(2, 8, 12, 16), integers(2, 8, 12, 16, seed=1)
WEIGHT, BIAS = torch.rand(16) + 0.5, torch.randn(16)
CASES = {
    "add": (
        lambda out: ffk.int8_add(X, SCALE, ZERO, Y, OTHER_SCALE, OTHER_ZERO, activation="relu", **out),
        lambda: torch.relu(real(X) + real(Y, OTHER_SCALE, OTHER_ZERO)),
    ),
    "add of a row": (
        lambda out: ffk.int8_add(X, SCALE, ZERO, Y[0, 0, 0], OTHER_SCALE, OTHER_ZERO, **out),
        lambda: real(X) + real(Y[0, 0, 0], OTHER_SCALE, OTHER_ZERO),
    ),
    "mul": (
        lambda out: ffk.int8_mul(X, SCALE, ZERO, Y, OTHER_SCALE, OTHER_ZERO, **out),
        lambda: real(X) * real(Y, OTHER_SCALE, OTHER_ZERO),
    ),
    "concat": (
        lambda out: ffk.int8_concat(
            [X, Y], torch.stack((SCALE, OTHER_SCALE)), torch.stack((ZERO, OTHER_ZERO)), dim=1, **out
        ),
        lambda: torch.cat((real(X), real(Y, OTHER_SCALE, OTHER_ZERO)), 1),
    ),
    "avg_pool2d": (
        lambda out: ffk.int8_avg_pool2d(X, SCALE, ZERO, (3, 3), (2, 2), (1, 1), **out),
        lambda: functional.avg_pool2d(real(X), 3, 2, 1),
    ),
    "layer_norm": (
        lambda out: ffk.int8_layer_norm(X, SCALE, ZERO, WEIGHT, BIAS, 1e-3, **out),
        lambda: functional.layer_norm(real(X), (16,), WEIGHT, BIAS, 1e-3),
    ),
    "layer_norm without weights": (
        lambda out: ffk.int8_layer_norm(X, SCALE, None, **out),
        lambda: functional.layer_norm(real(X, zero_point=0), (16,)),
    ),
    "rms_norm": (
        lambda out: ffk.int8_rms_norm(X, SCALE, ZERO, WEIGHT, 1e-3, **out),
        lambda: functional.rms_norm(real(X), (16,), WEIGHT, 1e-3),
    ),
    "softmax": (lambda out: ffk.int8_softmax(X, SCALE, **out), lambda: torch.softmax(real(X), -1)),
    "embedding": (
        lambda out: ffk.int8_embedding(torch.tensor([[1, 0], [11, 3]]), X[0, 0], SCALE, ZERO, **out),
        lambda: real(X[0, 0])[torch.tensor([[1, 0], [11, 3]])],
    ),
    "lookup": (
        lambda out: ffk.int8_lookup(X, ffk.lookup_table(torch.tanh, torch.int8, SCALE, ZERO, **out)),
        lambda: torch.tanh(real(X)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_float_result_is_that_of_the_float_operator(case):
    ours, expected = CASES[case][0]({}), CASES[case][1]()
    assert ours.is_contiguous()
    assert torch.allclose(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_integer_result_is_the_requantized_float_result(case):
    q = CASES[case][0](OUT)
    expected = torch.clamp(torch.round(CASES[case][1]() / OUT["out_scale"]) + OUT["out_zero_point"], -128, 127)
    difference = (q.float() - expected).abs()
    assert q.dtype == torch.int8
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_relu_and_max_pool_stay_on_the_grid():
    assert torch.equal(real(ffk.int8_relu(X, ZERO)), torch.relu(real(X)))
    pooled = ffk.int8_max_pool2d(X, (3, 3), (2, 2), (1, 1))
    assert torch.equal(real(pooled), functional.max_pool2d(real(X), 3, 2, 1)) and pooled.dtype == torch.int8


def test_embedding_with_a_scale_per_row():
    table, scale = integers(10, 6), torch.rand(10)
    zero_point = torch.arange(10, dtype=torch.int32)
    indices = torch.tensor([3, 9, 0])
    y = ffk.int8_embedding(indices, table, scale, zero_point)
    assert torch.equal(y, ((table.float() - zero_point[:, None]) * scale[:, None])[indices])


def test_unsigned_lookup_and_its_errors():
    x = torch.arange(256, dtype=torch.uint8)
    table = ffk.lookup_table(torch.sigmoid, torch.uint8, SCALE, ZERO)
    assert torch.equal(ffk.int8_lookup(x, table), torch.sigmoid(real(x)))
    with pytest.raises(ValueError, match="256 values"):
        ffk.int8_lookup(x, table[:10])
