"""The affine formula: bit-equal to torch, gradients, ranges, in eager and compiled form."""

import pytest
import torch

from fastforward.quantization import affine
from fastforward.quantization.granularity import PerChannel, PerGroup, PerTensor, PerTile, PerToken

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel((0, 1)),
    PerGroup(4),
    PerTile((2, 4)),
    PerToken(),
]
FORMATS = [(bits, symmetric) for bits in (1, 2, 3, 4, 8, 16) for symmetric in (True, False)]


def parameters(x, granularity, grid):
    from fastforward.quantization.granularity import min_max

    return grid.parameters_for_range(*min_max(x, granularity))


@pytest.mark.parametrize("bits", range(1, 17))
def test_integer_ranges(bits):
    assert affine.integer_range(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert affine.integer_range(bits, signed=False) == (0, 2**bits - 1)
    low, high = affine.integer_range(bits, restricted=True)
    assert bits == 1 or low == -high


@pytest.mark.parametrize(("bits", "error"), [(0, ValueError), (17, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_bad_widths_are_refused(bits, error):
    with pytest.raises(error, match="num_bits"):
        affine.integer_range(bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_bit_equal_to_torch_per_tensor(bits, symmetric, dtype):
    x = (torch.randn(257, generator=torch.Generator().manual_seed(bits)) * 3).to(dtype)
    grid = affine.AffineGrid(*affine.integer_range(bits), symmetric)
    scale, zero_point = parameters(x, PerTensor(), grid)
    got = affine.fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max)
    want = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, grid.quant_min, grid.quant_max)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_bit_equal_to_torch_per_channel_and_stored():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    grid = affine.AffineGrid(-128, 127, symmetric=False)
    scale, zero_point = parameters(x, PerChannel(0), grid)
    got = affine.fake_quantize(x, scale, zero_point, -128, 127, PerChannel(0))
    assert torch.equal(got, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -128, 127))
    stored = affine.quantize(x, scale, zero_point, -128, 127, torch.int8, PerChannel(0))
    assert stored.dtype == torch.int8
    assert torch.equal(stored, torch.quantize_per_channel(x, scale, zero_point, 0, torch.qint8).int_repr())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_simulated_equals_stored_and_error_is_half_a_step(granularity, bits, symmetric):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(bits))
    grid = affine.AffineGrid(*affine.integer_range(bits), symmetric)
    scale, zero_point = parameters(x, granularity, grid)
    assert scale.shape == granularity.parameter_shape(x.shape)
    simulated = affine.fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max, granularity)
    dtype = torch.int8 if bits <= 8 else torch.int16
    stored = affine.quantize(x, scale, zero_point, grid.quant_min, grid.quant_max, dtype, granularity)
    assert torch.equal(simulated, affine.dequantize(stored, scale, zero_point, granularity))
    if bits > 1:
        step = affine.dequantize(torch.ones_like(stored), scale, None, granularity)
        assert ((simulated - x).abs() <= step * (0.5 if symmetric else 1.0) * 1.001).all()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_formula_is_the_kernel(granularity, learned):
    """The form that torch.compile fuses gives the same values and gradients as the kernel."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * 2
    grid = affine.AffineGrid(-8, 7, symmetric=False)
    scale, zero_point = parameters(x / 2, granularity, grid)
    results = []
    for function in (affine.fake_quantize, lambda *a: affine._formula(*a, 1.0)):
        inputs = [x.clone().requires_grad_(), scale.clone(), zero_point.clone().float()]
        for value in inputs[1:] if learned else []:
            value.requires_grad_()
        out = function(*inputs, -8, 7, granularity)
        (out * torch.arange(32.0).reshape(4, 8)).sum().backward()
        results.append([out, *(value.grad for value in inputs if value.requires_grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][0], results[1][0])


def test_gradient_is_clipped_straight_through():
    x = torch.tensor([-9.0, -0.3, 0.2, 9.0], requires_grad=True)
    affine.fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_nan_survives_simulation():
    out = affine.fake_quantize(torch.tensor([1.0, torch.nan]), torch.tensor(0.1), torch.tensor(0), -8, 7)
    assert torch.isnan(out).tolist() == [False, True]


def test_compiled_formula_keeps_the_memory_format():
    x = torch.randn(1, 4, 4, 6).permute(0, 3, 1, 2)  # one batch: reshaping loses its stride
    arguments = x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -128, 127
    compiled = torch.compile(affine.fake_quantize, fullgraph=True, backend="eager")
    assert compiled(*arguments).stride() == affine.fake_quantize(*arguments).stride() == x.stride()


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "one_sided", "scale", "zero_point"),
    [
        (-1.0, 1.0, True, False, 1 / 127, 0),
        (-1.28, 1.0, True, False, 0.01, 0),
        (0.0, 2.55, True, True, 0.01, -128),
        (0.0, 1.27, True, False, 0.01, 0),
        (-0.5, 2.05, False, False, 0.01, -78),
        (1.0, 2.55, False, False, 0.01, -128),  # zero is always on the grid
        (-2.55, -1.0, False, False, 0.01, 127),
        (0.0, 0.0, False, False, 1.0, -128),
        (0.0, 0.0, True, False, 1.0, 0),
    ],
)
def test_parameters_for_a_range(low, high, symmetric, one_sided, scale, zero_point):
    grid = affine.AffineGrid(-128, 127, symmetric, one_sided)
    got = grid.parameters_for_range(torch.tensor(low), torch.tensor(high))
    assert got[0].item() == pytest.approx(scale, rel=1e-6)
    assert got[1].item() == zero_point
    assert (got[0].dtype, got[1].dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_extreme_ranges_stay_finite(magnitude):
    for symmetric in (True, False):
        grid = affine.AffineGrid(-128, 127, symmetric)
        scale, zero_point = grid.parameters_for_range(torch.tensor(-magnitude), torch.tensor(magnitude))
        x = torch.tensor([-magnitude, 0.0, magnitude])
        out = affine.fake_quantize(x, scale, zero_point, -128, 127)
        assert torch.isfinite(out).all()
        assert out[1] == 0
