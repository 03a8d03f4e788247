"""The matrix and neighbour Triton kernels, on a GPU or in Triton's interpreter, against the exact references."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import fastforward_kernels as ffk
from fastforward_kernels import epilogue, reference
from fastforward_kernels import reference_matmul as exact
from fastforward_kernels import reference_neighbours as exact_neighbours
from fastforward_kernels.triton import (
    float8_grid,
    float8_matmul,
    int8_conv,
    int8_matmul,
    launch,
    neighbours,
    observe,
    weight_only,
)

from tests.kernels.device import DEVICE, run

FLOAT = (torch.float32, None, None)
# Float32 sums over magnitudes: what the order of addition, and Hopper's 14-bit sums of float8 products, may cost.
ORDER, FLOAT8_SUM = (2e-7, 1e-6) if DEVICE.type == "cpu" else (5e-7, 3e-4)
INT8 = (torch.int8, torch.tensor(0.05), torch.tensor(3, dtype=torch.int32))


def integers(shape, dtype=torch.int8, seed=0):
    low, high = epilogue.INTEGER_RANGES[dtype]
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def floats(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int32(value):
    return torch.tensor(value, dtype=torch.int32)


LINEAR = [  # activation dtype, weight zero points, one scale per token, residual, activation, result
    (torch.int8, False, False, False, "none", FLOAT),
    (torch.uint8, True, False, True, "relu", FLOAT),
    (torch.uint8, False, True, False, "relu", INT8),
    (torch.int8, True, True, False, "none", (torch.bfloat16, None, None)),
    (torch.float32, False, False, False, "none", INT8),
    (torch.bfloat16, True, False, False, "relu", (torch.float16, None, None)),
    (torch.float16, False, True, True, "none", FLOAT),
]


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("size", [(1, 33, 7), (20, 150, 70), (100, 64, 129)], ids=str)
def test_int8_linear(case, size):
    x_dtype, weight_zero_points, per_token, with_residual, activation, out = case
    m, k, n = size
    low, high = epilogue.INTEGER_RANGES.get(x_dtype, (-128, 127))
    x = floats((m, k)).to(x_dtype) if x_dtype.is_floating_point else integers((m, k), x_dtype)
    count = (m,) if per_token else ()
    x_scale = torch.rand(count, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.01
    x_zero_point = torch.randint(low, high, count, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    zero_points = integers((n,), seed=3).int() if weight_zero_points else None
    packed = ffk.pack_linear_weight(integers((n, k), seed=4), torch.rand(n) * 0.01, zero_points)
    rest = (*packed, floats((n,), 5), floats((m, n), 6) if with_residual else None, activation, *out)
    if x_dtype.is_floating_point:
        arguments = (x, x_scale, x_zero_point, low, high, *rest)
        y, expected = run(int8_matmul.int8_linear_quantizing, *arguments), exact.int8_linear_quantizing(*arguments)
    else:
        arguments = (x, x_scale, x_zero_point, *rest)
        y, expected = run(int8_matmul.int8_linear, *arguments), exact.int8_linear(*arguments)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_against_float64(activation):
    packed = ffk.pack_linear_weight(integers((64, 64), seed=1), torch.full((64,), 0.0003))
    arguments = (integers((32, 64)), torch.tensor(0.1), int32(3), *packed, None, None)
    y = run(int8_matmul.int8_linear, *arguments, activation, *FLOAT)
    before = exact.int8_linear(*arguments, "none", *FLOAT)
    assert (y - epilogue.ACTIVATIONS[activation](before.double())).abs().max() <= 1e-6


@pytest.mark.parametrize("zero_point", [0, 1, -128])
def test_requantizing_is_quantizing_the_result(zero_point):
    packed = ffk.pack_linear_weight(integers((64, 8), seed=1).clamp(-3, 3), torch.ones(64))
    arguments = (integers((32, 8)).clamp(-8, 8), torch.tensor(0.5), None, *packed, None, None, "none")
    y = run(int8_matmul.int8_linear, *arguments, *FLOAT)
    grid = (torch.tensor(1.0), int32(zero_point))
    q = run(int8_matmul.int8_linear, *arguments, torch.int8, *grid)
    assert (y % 1 == 0.5).any() and torch.equal(q, ffk.quantize(y, *grid, -128, 127, torch.int8))


@pytest.mark.parametrize("split", [1, 2, 5])
def test_splitting_the_inner_axis_changes_nothing(split, monkeypatch):
    whole = int8_matmul.blocks

    def cut(*size):
        (tiles, _, batch), constants = whole(*size)
        return (tiles, split, batch), {**constants, "SPLIT_K": split}

    monkeypatch.setattr(int8_matmul, "blocks", cut)
    packed = ffk.pack_linear_weight(integers((70, 500), seed=1), torch.rand(70), integers((70,), seed=2).int())
    arguments = (integers((3, 500), torch.uint8), torch.tensor(0.1), int32(9), *packed, None, None, "relu", *INT8)
    assert torch.equal(run(int8_matmul.int8_linear, *arguments), exact.int8_linear(*arguments))


@pytest.mark.parametrize("types", list(itertools.product((torch.int8, torch.uint8), repeat=2)), ids=str)
def test_batched_product(types):
    a, b = integers((3, 5, 64), types[0]), integers((3, 64, 33), types[1], 1)
    scale = torch.tensor(0.01)
    for za, zb in itertools.product((None, int32(5)), (None, int32(-7))):
        arguments = (a, scale, za, b, scale, zb, *FLOAT)
        assert torch.equal(run(int8_matmul.int8_matmul, *arguments), exact.int8_matmul(*arguments))


CONVOLUTIONS = [  # channels, outputs, kernel, stride, padding, dilation, groups
    (16, 32, 3, 2, 1, 1, 1),
    (16, 16, 3, 1, 1, 1, 16),
    (8, 16, 3, 1, 2, 2, 2),
    (40, 8, 1, 1, 0, 1, 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    ("dims", "x_dtype", "zero_points"), [(2, torch.uint8, True), (2, torch.int8, False), (1, torch.uint8, False)]
)
def test_int8_convolution(case, dims, x_dtype, zero_points):
    channels, outputs, kernel, stride, padding, dilation, groups = case
    x = integers((2, channels, *(7, 6)[:dims]), x_dtype)
    weight_zero_points = integers((outputs,), seed=2).int() if zero_points else None
    weight = integers((outputs, channels // groups, *(kernel,) * dims), seed=1)
    packed = ffk.pack_conv_weight(weight, torch.rand(outputs) * 0.01, weight_zero_points)
    geometry = [[value] * dims for value in (stride, padding, dilation)]
    inputs = (x, torch.tensor(0.0137), int32(epilogue.INTEGER_RANGES[x_dtype][0] + 30), *packed, floats((outputs,)))
    plain = exact.int8_conv(*inputs, None, *geometry, groups, "none", *FLOAT)
    for residual, out in ((None, INT8), (floats(plain.shape, 3), FLOAT)):
        arguments = (*inputs, residual, *geometry, groups, "relu", *out)
        y, expected = run(int8_conv.int8_conv, *arguments), exact.int8_conv(*arguments)
        assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_linear_against_float64(float8):
    x, weight = floats((33, 100)).to(float8), floats((70, 100), 1).to(float8)
    x_scale, weight_scale, bias = torch.rand(33) + 0.5, torch.rand(70) + 0.5, floats((70,), 2)
    y = run(float8_matmul.float8_linear, x, x_scale, weight, weight_scale, bias, torch.float32)
    expected = (x.double() @ weight.double().t()) * x_scale[:, None].double() * weight_scale.double() + bias
    magnitude = (x.double().abs() @ weight.double().abs().t()) * x_scale[:, None] * weight_scale + bias.abs()
    assert ((y - expected).abs() / magnitude).max() <= FLOAT8_SUM


def test_float8_that_the_target_lacks_is_left_to_the_reference():
    x = floats((4, 32)).to(torch.float8_e4m3fnuz)
    assert torch.float8_e4m3fnuz not in float8_matmul.NATIVE["interpreter"]
    y = run(float8_matmul.float8_linear, x, torch.tensor(1.0), x, torch.tensor(1.0), None, torch.float32)
    assert torch.allclose(y, x.float() @ x.float().t())


@pytest.mark.parametrize(("bits", "group_size", "dtype"), [
    (4, 32, torch.bfloat16), (4, 64, torch.float32), (4, 128, torch.float16), (4, 256, torch.float32),
    (8, 32, torch.float32), (8, 128, torch.bfloat16), (8, 96, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3, 20, 130])
def test_weight_only_linear(bits, group_size, dtype, rows):
    k = 768 if group_size in (96, 128) else 256
    q = integers((70, k)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale, x = torch.rand(70, k // group_size), floats((rows, k)).to(dtype)
    for zero_point in (None, torch.randint(-8, 8, scale.shape, dtype=torch.int32)):
        packed = ffk.pack_weight_only(q, scale, zero_point, bits=bits, group_size=group_size)
        y = run(weight_only.weight_only_linear, x, *packed, floats((70,)).to(dtype))
        weight = exact.dequantized(*packed, dtype).double()
        magnitude = x.double().abs() @ weight.abs().t()
        expected = x.double() @ weight.t() + floats((70,)).to(dtype).double()
        error = (y.double() - expected).abs() / magnitude
        assert error.max() <= {torch.float32: ORDER, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("group_size", [32, 96, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_in_floats(bits, group_size, dtype):
    q = integers((7, 384)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = torch.rand(7, 384 // group_size)
    for zero_point in (None, torch.randint(-8, 8, scale.shape, dtype=torch.int32)):
        packed = ffk.pack_weight_only(q, scale, zero_point, bits=bits, group_size=group_size)
        assert torch.equal(run(weight_only.dequantized, *packed, dtype), exact.dequantized(*packed, dtype))


FLOAT8_GRIDS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("float8", FLOAT8_GRIDS)
def test_float8_grid_of_every_bfloat16_number(float8):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()]
    x = torch.cat((x, torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16)))
    arguments = (x, torch.tensor(1.0), float8, [])
    assert torch.equal(run(float8_grid.fake_quantize_float8, *arguments), reference.fake_quantize_float8(*arguments))
    y = run(float8_grid.quantize_float8, x.float() * 1.01, torch.tensor(0.3), float8, []).float()
    assert torch.equal(y, reference.quantize_float8(x.float() * 1.01, torch.tensor(0.3), float8, []).float())
    assert run(float8_grid.fake_quantize_float8, torch.tensor([float("nan")]), torch.tensor(1.0), float8, []).isnan()


X, Y = integers((2, 3, 6, 16)), integers((2, 3, 6, 16), seed=1)
S, Z = torch.tensor(0.05), int32(-3)
NEIGHBOURS = {
    "add": (X, S, Z, Y, S * 2, None, "relu"),
    "mul": (X, S, Z, Y[0, 0, 0], S * 2, Z),
    "concat": ([X, Y], torch.stack((S, S * 2)), torch.stack((Z, Z)), 1),
    "avg_pool2d": (X, S, Z, [3, 3], [2, 2], [1, 1]),
    "layer_norm": (X, S, Z, torch.rand(16), torch.rand(16), 1e-3),
    "rms_norm": (X, S, None, None, 1e-3),
    "softmax": (X, S),
    "embedding": (torch.tensor([[1, 0], [5, 3]]), X[0, 0], torch.rand(6), torch.arange(6, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name):
    kernel, definition, arguments = getattr(neighbours, name), getattr(exact_neighbours, name), NEIGHBOURS[name]
    q, expected = run(kernel, *arguments, *INT8), definition(*arguments, *INT8)
    assert q.dtype == torch.int8 and (q.int() - expected.int()).abs().max() <= (name == "softmax")
    assert torch.allclose(run(kernel, *arguments, *FLOAT), definition(*arguments, *FLOAT), rtol=1e-6, atol=1e-6)


def test_lookup_and_max_pool():
    table = floats((256,))
    assert torch.equal(run(neighbours.lookup, X, table), exact_neighbours.lookup(X, table))
    pool = ([3, 3], [2, 2], [1, 1])
    assert torch.equal(run(neighbours.max_pool2d, X, *pool), exact_neighbours.max_pool2d(X, *pool))


@pytest.mark.parametrize("tile", [[], [1, -1], [-1, 1], [1, 8], [8, -1], [8, 8]], ids=str)
def test_min_max(tile):
    x = floats((16, 24))
    assert all(
        torch.equal(a, b) for a, b in zip(run(observe.min_max, x, tile), reference.min_max(x, tile), strict=True)
    )
    x[3, 4] = float("nan")
    assert run(observe.min_max, x, tile)[0].isnan().sum() == 1


@pytest.mark.parametrize("bins", [100, 256])
def test_histogram(bins):
    x = floats((9000,))
    assert torch.equal(run(observe.histogram, x, -2.0, 2.5, bins), reference.histogram(x, -2.0, 2.5, bins))


def test_every_launch_says_whether_it_was_measured():
    for by_architecture in launch.table().values():
        for sizes in by_architecture.values():
            assert all(config["status"] for config in sizes.values())
            assert {"num_warps"} <= {key for config in sizes.values() for key in config}
