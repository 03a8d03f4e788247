"""Integer weights with floating activations."""

import copy

import pytest
import torch
from calibrated import close, compiled_operators, outputs
from fastforward_kernels import cpu_int4, memory

import fastforward as ff
from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer import WeightOnlyLinear, digits, weight_only
from fastforward.integer.onednn import has_onednn

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


@pytest.mark.skipif(not cpu_int4.reads_packed(), reason="ATen packs int4 weights in another order here")
@pytest.mark.parametrize("name", [name for name in FORMATS if "int8" not in name])
def test_many_rows_unpack_an_int4_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, few, many = _simulated(*FORMATS[name], features=(256, 128)), torch.randn(5, 256), torch.randn(3, 50, 256)
    expected = [outputs(model, x) for x in (few, many)]
    ff.convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for run in (model, compiled):
        for x, y in zip((few, many), expected, strict=True):
            assert torch.allclose(outputs(run, x), y, rtol=2e-2, atol=2e-2 * float(y.abs().max()))
    assert compiled_operators(model, many)["int4_linear"] and not compiled_operators(model, few)["int4_linear"]
    program = ff.export(model, (many,)).graph_module.code
    assert "_weight_int4pack_mm_for_cpu" in program and "int4_linear" not in program
    assert ff.convert(_simulated(*FORMATS[name]))[0].kernels() == ("int4",), "48 channels are no whole block"
    monkeypatch.setattr(weight_only, "reads_packed", lambda: False)
    assert ff.convert(_simulated(*FORMATS[name], features=(256, 128)))[0].kernels() == ("int4",)


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
def test_another_device_is_refused(name: str) -> None:
    model = ff.convert(_simulated(*FORMATS[name]))
    with pytest.raises(UnsupportedOperatorError, match="move the model there first"):
        model.to("meta")(torch.empty(2, 256, device="meta"))


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
def test_weights_take_one_or_half_a_byte(name: str) -> None:
    model = _simulated(*FORMATS[name])
    ff.convert(model)
    stored = sum(b.numel() * b.element_size() for key, b in model[0].named_buffers() if "scale" not in key)
    assert stored == 256 * 48 * (1 if "int8" in name else 0.5)
    assert [key for key, _ in model.named_parameters()] == ["0.bias"]


def _digits_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weight^T`` by digits and a plain integer product."""
    offset = weight.sum(1, dtype=torch.float64) * digits.CENTER
    return digits.multiply(*digits.digits(x), lambda codes: (codes.double() @ weight.double().t() - offset).float())


def test_digits_hold_a_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64) * torch.logspace(-3, 3, 3)[:, None]
    x[1, :10] = 0
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    exact = x.double() @ weight.double().t()
    alone = torch.cat([_digits_product(row[None], weight) for row in x])
    for product in (_digits_product(x, weight), alone):
        difference = (product - exact).abs()
        assert (difference.amax(1) <= 1e-6 * exact.abs().amax(1)).all(), "each row by its own largest value"
    assert not _digits_product(torch.zeros(1, 64), weight).any()


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float, name: str) -> None:
    model = ff.convert(_simulated(*FORMATS[name]))
    example = torch.randn(3, 256)
    expected = outputs(model, example)
    example[1, 5] = value
    actual = outputs(model, example)
    assert not actual[1].isfinite().any()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2], expected[2])
    assert not outputs(model, example[1:2]).isfinite().any()


def test_layers_share_the_digits_of_a_tensor_until_it_changes() -> None:
    first, second = ff.convert(_simulated(*FORMATS["int8 per channel"])), ff.convert(_simulated(8, ff.PerTensor()))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            x = torch.randn(2, 256)
            first(x)
            x.mul_(-1)
            assert torch.equal(second(x), second(x.clone()))


@pytest.mark.parametrize("name", ["int8 per channel", "int4 in groups of 128"])
def test_weights_are_put_in_huge_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "use_huge_pages", lambda address, size: asked.append(size))
    model = ff.convert(_simulated(*FORMATS[name]))
    model(torch.randn(1, 256))
    model(torch.randn(1, 256))
    assert asked == [256 * 48 // (2 if "int4" in name else 1)]


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_products_do_not_sum_the_weight_again(rows: int) -> None:
    model, example = ff.convert(_simulated(*FORMATS["int8 per channel"])), torch.randn(rows, 256)
    found = compiled_operators(model, example)
    assert found["linear_to_floats"] == has_onednn() and "sum" not in found
    assert close(outputs(model, example), outputs(torch.compile(model, backend="aot_eager"), example))


@pytest.mark.parametrize("granularity", [ff.PerTensor(), ff.PerChannel(0), ff.PerGroup(32)], ids=str)
def test_many_channels_are_packed_in_parts(granularity: object) -> None:
    model = _simulated(4, granularity, features=(64, 1040))
    weight = model[0].weight_quantizer(model[0].weight)
    ff.convert(model)
    assert torch.allclose(model[0].weight, weight, atol=1e-3)


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
