"""The forms that linear layers take on GPUs, run on the CPU by the same operators."""

import copy

import pytest
import torch
from calibrated import outputs

import fastforward as ff
from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer import Float8Linear, IntegerDynamicLinear, PackedLinear
from fastforward.integer.float8 import require_float8
from fastforward.integer.packed_linear import require_packed
from fastforward.nn.float8_quantizer import DynamicFloat8Quantizer, Float8Quantizer

FEATURES = (256, 48)


def simulated(weight_quantizer, input_quantizer=None) -> ff.nn.QuantizedLinear:
    torch.manual_seed(0)
    layer = ff.nn.QuantizedLinear(*FEATURES).eval()
    granularity = weight_quantizer.granularity
    weight_quantizer.quantization_range = ff.quantization.granularity.min_max(layer.weight.detach(), granularity)
    layer.weight_quantizer = weight_quantizer
    if input_quantizer is not None:
        layer.input_quantizer = input_quantizer
    return layer


def reloaded(layer):
    """The layer built again from its state, in the place of a float one."""
    tensors, data = layer.quantization_state()
    return type(layer).from_quantization_state(torch.nn.Linear(*FEATURES), tensors, data)


PACKED = {
    "int4 groups": (4, ff.PerGroup(32), True, 4),
    "int4 channels": (4, ff.PerChannel(0), True, 4),
    "int4 asymmetric": (4, ff.PerGroup(128), False, 4),
    "int3": (3, ff.PerGroup(64), True, 4),
    "int8 channels": (8, ff.PerChannel(0), True, 8),
    "int8 tensor": (8, ff.PerTensor(), True, 8),
    "int6 asymmetric": (6, ff.PerGroup(256), False, 8),
}


@pytest.mark.parametrize("shape", [(1, 256), (3, 40, 256), (0, 256)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_compute_what_was_simulated(name, shape):
    num_bits, granularity, symmetric, bits = PACKED[name]
    quantizer = ff.nn.LinearQuantizer(num_bits, symmetric=symmetric, allow_one_sided=False, granularity=granularity)
    layer = simulated(quantizer)
    x = torch.randn(shape)
    expected, weight = outputs(layer, x), quantizer(layer.weight).detach()
    require_packed(layer)
    packed = PackedLinear.swap(layer)
    assert type(packed) is PackedLinear and packed.bits == bits
    assert torch.allclose(outputs(packed, x), expected, atol=1e-5)
    assert torch.allclose(packed.weight, weight, atol=1e-6)
    assert torch.equal(outputs(reloaded(packed), x), outputs(packed, x))
    half = copy.deepcopy(packed).bfloat16()
    assert half.weight_scale.dtype == torch.float32
    assert torch.allclose(outputs(half, x.bfloat16()).float(), expected, atol=0.05)


def test_groups_that_kernels_cannot_take_are_refused():
    layer = simulated(ff.nn.LinearQuantizer(4, granularity=ff.PerGroup(16)))
    with pytest.raises(UnsupportedOperatorError, match="groups of 32, 64 or 128"):
        require_packed(layer)


def test_a_state_of_another_shape_is_refused():
    packed = PackedLinear.swap(simulated(ff.nn.LinearQuantizer(8, granularity=ff.PerChannel(0))))
    tensors, data = packed.quantization_state()
    with pytest.raises(StateError, match="features"):
        PackedLinear.from_quantization_state(torch.nn.Linear(128, 48), tensors, data)


FLOAT8 = {
    "static": lambda dtype: Float8Quantizer(dtype),
    "per tensor": lambda dtype: DynamicFloat8Quantizer(dtype),
    "per token": lambda dtype: DynamicFloat8Quantizer(dtype, ff.PerToken()),
}


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", FLOAT8)
def test_float8_products_are_what_was_simulated(name, dtype, smoothed):
    quantizer = FLOAT8[name](dtype)
    layer = simulated(Float8Quantizer(dtype, ff.PerChannel(0)), quantizer)
    x = torch.randn(2, 5, 256)
    if smoothed:
        layer.smoothing = torch.rand(256) + 0.5
        weight = layer.weight.detach() * layer.smoothing
        layer.weight_quantizer.quantization_range = ff.quantization.granularity.min_max(weight, ff.PerChannel(0))
    if name == "static":
        quantizer.quantization_range = (x.min(), x.max())
    expected = outputs(layer, x)
    with pytest.raises(UnsupportedOperatorError, match="float8 matrix units"):
        require_float8(layer)  # on a CPU
    float8 = Float8Linear.swap(layer)
    assert torch.allclose(outputs(float8, x), expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(outputs(reloaded(float8), x), outputs(float8, x))
    assert outputs(float8, x[:0]).shape == (0, 5, 48)
    half = copy.deepcopy(float8).half()
    assert half.weight_scale.dtype == torch.float32 and outputs(half, x.half()).dtype == torch.float16


@pytest.mark.parametrize("granularity", [ff.PerToken(), ff.PerTensor()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_layers_in_one_operator(granularity, symmetric):
    weight = ff.nn.LinearQuantizer(8, granularity=ff.PerChannel(0))
    layer = simulated(weight, ff.nn.DynamicLinearQuantizer(8, symmetric=symmetric, granularity=granularity))
    x = torch.randn(3, 7, 256)
    integer = IntegerDynamicLinear.swap(layer)
    expected = outputs(integer, x)
    actual = integer._by_kernels(x, torch.float32)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_smoothing_moves_with_the_grid():
    grid = ff.integer.grid.Grid(0.1, 3, inverse_smoothing=torch.ones(4))
    placed = grid.on(torch.device("meta"))
    assert {t.device.type for t in (*placed, grid.inverse_smoothing, copy.deepcopy(grid).inverse_smoothing)} == {"meta"}
    assert copy.deepcopy(grid).on(torch.device("meta")) is placed
