"""Integer weights with floating activations."""

import copy

import pytest
import torch
from calibrated import close, outputs

import fastforward as ff
from fastforward.integer import WeightOnlyLinear
from fastforward.integer.weight_only import multiply_digits

nn = torch.nn


def _simulated(
    num_bits: int, granularity: object, symmetric: bool = True, features: tuple[int, int] = (256, 48)
) -> nn.Module:
    torch.manual_seed(0)
    layer = ff.nn.QuantizedLinear(*features)
    quantizer = ff.nn.LinearQuantizer(num_bits, symmetric=symmetric, allow_one_sided=False, granularity=granularity)
    low, high = ff.quantization.granularity.min_max(layer.weight.detach(), granularity)
    quantizer.quantization_range = (low, high)
    layer.weight_quantizer = quantizer
    return nn.Sequential(layer).eval()


FORMATS = {
    "int8 per channel": (8, ff.PerChannel(0), True),
    "int8 per tensor": (8, ff.PerTensor(), True),
    "int4 in groups of 32": (4, ff.PerGroup(32), True),
    "int4 in groups of 128": (4, ff.PerGroup(128), True),
    "int4 per channel": (4, ff.PerChannel(0), True),
    "int4 asymmetric": (4, ff.PerGroup(64), False),
    "int3": (3, ff.PerGroup(64), True),
}


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_output_equals_simulation(name: str, rows: int) -> None:
    model = _simulated(*FORMATS[name])
    example = torch.randn(2, rows, 256) if rows == 3 else torch.randn(rows, 256)
    expected = outputs(model, example)
    weight = model[0].weight_quantizer(model[0].weight)
    ff.convert(model)
    assert type(model[0]) is WeightOnlyLinear
    actual = outputs(model, example)
    if model[0].group:  # torch's int4 kernel computes in bfloat16
        assert torch.allclose(expected, actual, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    else:
        assert close(expected, actual)
    assert torch.allclose(model[0].weight, weight, atol=1e-3 if model[0].group else 1e-5)
    assert "weight only" in str(ff.integer.explain(model))


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
def test_weights_take_one_or_half_a_byte(name: str) -> None:
    model = _simulated(*FORMATS[name])
    ff.convert(model)
    stored = sum(b.numel() * b.element_size() for key, b in model[0].named_buffers() if "scale" not in key)
    assert stored == 256 * 48 * (1 if "int8" in name else 0.5)
    assert [key for key, _ in model.named_parameters()] == ["0.bias"]


def test_digits_hold_a_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64) * torch.logspace(-3, 3, 3)[:, None]
    x[1, :10] = 0
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    exact = x.double() @ weight.double().t()

    def multiply(digits: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(digits, weight.t()).float()

    assert (multiply_digits(x, multiply) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert torch.equal(multiply_digits(torch.zeros(1, 64), multiply), torch.zeros(1, 32))


def test_groups_of_an_odd_size_stay_simulated_and_say_why() -> None:
    model = _simulated(4, ff.PerGroup(16))
    ff.convert(model)
    assert "groups of 16" in ff.integer.explain(model).islands[0].reason


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
def test_saving_and_loading(name: str, tmp_path) -> None:
    model = _simulated(*FORMATS[name])
    target = copy.deepcopy(model)
    ff.convert(model)
    ff.load_quantization(target, ff.save_quantization(model, tmp_path))
    example = torch.randn(2, 256)
    assert torch.equal(outputs(target, example), outputs(model, example))
