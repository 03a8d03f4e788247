"""Float8 and block formats against their published definitions, written out a second time."""

import math

import pytest
import torch

from fastforward.quantization import block_formats as bf
from fastforward.quantization.float8 import Float8Grid, fake_quantize_float8
from fastforward.quantization.granularity import PerChannel, PerGroup, PerTensor, min_max
from fastforward.quantization.mapping import FLOAT8_DTYPES


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(exponent_bits, mantissa_bits, bias, largest):
    """Every non-negative number of a small floating type, in order, so that an index's parity is the mantissa's."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent == 0:
                values.append(math.ldexp(mantissa, 1 - bias - mantissa_bits))
            else:
                values.append(math.ldexp(2**mantissa_bits + mantissa, exponent - bias - mantissa_bits))
    return [value for value in values if value <= largest]


def nearest(x, values):
    """The nearest of ``values``, the one with an even index on a tie."""
    best = min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return math.copysign(values[best], x)


ELEMENTS = {
    "e2m1": (bf.E2M1, numbers(2, 1, 1, 6.0)),
    "e2m3": (bf.E2M3, numbers(2, 3, 1, 7.5)),
    "e3m2": (bf.E3M2, numbers(3, 2, 3, 28.0)),
    "e4m3": (bf.E4M3, numbers(4, 3, 7, 448.0)),
    "e5m2": (bf.E5M2, numbers(5, 2, 15, 57344.0)),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_round_to_the_nearest_number(name):
    kind, values = ELEMENTS[name]
    middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    inputs = [*values, *middles, *(m * 1.001 for m in middles), *(m * 0.999 for m in middles), kind.largest * 3]
    x = torch.tensor(inputs + [-v for v in inputs])
    assert kind.round(x).tolist() == [nearest(v, values) for v in x.tolist()]


@pytest.mark.parametrize(("kind", "dtype"), [(bf.E4M3, torch.float8_e4m3fn), (bf.E5M2, torch.float8_e5m2)])
def test_elements_equal_torch_float8(kind, dtype):
    x = randn(10_000) * torch.logspace(-6, 4, 10_000)
    assert torch.equal(kind.round(x), x.clamp(-kind.largest, kind.largest).to(dtype).float())


def mx_block(block, values, emax):
    """OCP MX 1.0, section 6.3: a shared power of two, then elements rounded and saturated."""
    largest = max(abs(v) for v in block)
    shared = max(math.frexp(largest)[1] - 1 - emax, -127) if largest else 0
    return [math.ldexp(nearest(math.ldexp(v, -shared), values), shared) for v in block]


@pytest.mark.parametrize(
    ("name", "element", "emax"),
    [
        ("mxfp8", "e4m3", 8),
        ("mxfp8_e5m2", "e5m2", 15),
        ("mxfp6_e2m3", "e2m3", 2),
        ("mxfp6_e3m2", "e3m2", 4),
        ("mxfp4", "e2m1", 2),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_mx_formats(name, element, emax, scale):
    x = randn(3, 64) * scale
    x[1, :32] = 0
    values = ELEMENTS[element][1]
    got = bf.fake_quantize_blocks(x, name)
    want = [mx_block(row[start : start + 32], values, emax) for row in x.tolist() for start in (0, 32)]
    assert torch.equal(got, torch.tensor(want).reshape(3, 64))


def test_nvfp4():
    """The same steps with torch's own float8 type and a search among the numbers of e2m1."""
    x = randn(2, 48)
    x[0, :16] = 0
    x[1, 16:32] *= 1e-4
    encode = torch.tensor(6 * 448.0) / x.abs().max()
    decode = 1 / encode
    for row, result in zip(x, bf.fake_quantize_blocks(x, "nvfp4"), strict=True):
        for start in (0, 16, 32):
            block = row[start : start + 16]
            stored = (block.abs().max() / 6 * encode).to(torch.float8_e4m3fn).float()
            factor = 1 / (stored * decode)
            values = [nearest((v * factor).item(), ELEMENTS["e2m1"][1]) if stored else 0.0 for v in block]
            assert torch.equal(result[start : start + 16], torch.tensor(values) * (stored * decode))


def test_nf4_levels_are_the_quantiles_of_the_paper():
    """QLoRA, appendix E: 8 quantiles of the negative half and 9 of the positive one, sharing zero, scaled to one."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(bf.NF4_LEVELS), (levels / levels.max()).float(), rtol=0, atol=2e-6)


def test_nf4_takes_the_nearest_level():
    x = randn(4, 128)
    levels = torch.tensor(bf.NF4_LEVELS)
    blocks = x.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    index = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    assert torch.equal(bf.fake_quantize_blocks(x, "nf4"), (levels[index] * scale).reshape(4, 128))


@pytest.mark.parametrize("name", bf.BLOCK_FORMATS)
def test_block_formats_in_general(name):
    x = randn(2, 3, 50).to(torch.bfloat16)
    x[0, 0, 3] = torch.nan
    out = bf.fake_quantize_blocks(x, name)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.isnan(out[0, 0, 3])
    clean = randn(2, 50)
    once = bf.fake_quantize_blocks(clean, name)
    signal = clean.square().sum() / (clean - once).square().sum()
    assert 10 * signal.log10() > (15 if bf.BLOCK_FORMATS[name].bits == 4 else 20)
    assert torch.equal(bf.fake_quantize_blocks(torch.zeros(2, 50), name), torch.zeros(2, 50))
    leaf = clean.clone().requires_grad_()
    bf.fake_quantize_blocks(leaf, name).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_a_short_last_block_counts_as_padded():
    x = randn(1, 40)
    whole = bf.fake_quantize_blocks(torch.cat([x, torch.zeros(1, 24)], 1), "mxfp4")
    assert torch.equal(bf.fake_quantize_blocks(x, "mxfp4"), whole[:, :40])


def test_unknown_block_format():
    with pytest.raises(ValueError, match="known are mxfp8"):
        bf.block_format("fp3")


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)], ids=str)
def test_float8_grid_and_kernel_agree(dtype, granularity):
    x = randn(4, 16) * 5
    grid = Float8Grid(dtype)
    scale, zero_point = grid.parameters_for_range(*min_max(x, granularity))
    assert not zero_point.any()
    got = fake_quantize_float8(x, scale, dtype, granularity)
    spread = torch.ones_like(x) * (
        scale if scale.dim() == 0 else scale.repeat_interleave(x.numel() // scale.numel()).reshape(x.shape)
    )
    assert torch.equal(got, grid.round(x, spread, zero_point.new_zeros(())))
    assert (got - x).abs().max() <= x.abs().max() / 8
    assert torch.isfinite(fake_quantize_float8(x * 1e6, scale, dtype, granularity)).all()


def test_float8_gradient_is_clipped():
    x = torch.tensor([-600.0, 1.3, 447.0, 600.0], requires_grad=True)
    fake_quantize_float8(x, torch.tensor(1.0), torch.float8_e4m3fn).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_float8_needs_a_float8_type():
    with pytest.raises(TypeError, match="float8"):
        Float8Grid(torch.float16)
