"""Rounding in one pass gives what differentiable simulation gives, and is taken only where nothing else is wanted."""

import copy

import pytest
import torch

import fastforward as ff
from fastforward.nn import one_pass
from fastforward.nn.linear import QuantizedLinear
from fastforward.quantization import affine


def _quantizer(low: float = -2.0, high: float = 3.0, **options: object) -> ff.nn.LinearQuantizer:
    quantizer = ff.nn.LinearQuantizer(8, symmetric=False, **options)  # type: ignore[arg-type]
    quantizer.quantization_range = (low, high)
    return quantizer


def _expected(quantizer: ff.nn.LinearQuantizer, x: torch.Tensor) -> torch.Tensor:
    grid = quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
    return affine.fake_quantize(x, *grid, quantizer.granularity)


def _ties(scale: float) -> torch.Tensor:
    return (torch.arange(-5000, 5000) / 2) * scale


VALUES = {
    "normal": torch.randn(64, 128),
    "transposed": torch.randn(2, 8, 64, 16).transpose(1, 2),
    "channels last": torch.randn(2, 8, 32, 32).contiguous(memory_format=torch.channels_last),
    "with holes": torch.randn(128, 128)[:, ::2],
    "huge": torch.randn(64, 128) * 1e30,
    "tiny": torch.randn(64, 128) * 1e-30,
    "infinite": torch.cat((torch.tensor([float("inf"), float("-inf")]), torch.randn(5000))),
    "not a number": torch.cat((torch.tensor([float("nan")]), torch.randn(5000))),
    "ties": _ties(float(_quantizer().scale)),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_the_formula(name: str, unsigned: bool) -> None:
    quantizer = _quantizer(quantized_dtype=torch.uint8) if unsigned else _quantizer()
    with torch.no_grad():
        y, expected = quantizer(VALUES[name]), _expected(quantizer, VALUES[name])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    if name != "with holes":
        assert y.stride() == expected.stride()


def test_rows_of_a_transposed_batch_come_in_order() -> None:
    quantizer, x = _quantizer(), torch.randn(8, 16, 64).transpose(0, 1)
    with torch.no_grad():
        y = quantizer(x)
    assert y.is_contiguous()
    assert torch.equal(y, _expected(quantizer, x))


def test_gradients_still_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 128, requires_grad=True)
    _quantizer()(x).sum().backward()
    assert x.grad is not None
    monkeypatch.setattr(one_pass.torch, "quantize_per_tensor", None)
    with torch.no_grad(), pytest.raises(TypeError):
        _quantizer()(x)


def _linears(count: int = 3) -> list[QuantizedLinear]:
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        layer = QuantizedLinear(128, 16)
        layer.input_quantizer = _quantizer()
        layer.smoothing = torch.linspace(0.5, 2, 128)
        made.append(layer.eval())
    return made


def test_layers_that_quantize_one_tensor_alike_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = one_pass.round_products
    monkeypatch.setattr(one_pass, "round_products", lambda *args: calls.append(1) or original(*args))
    layers, x = _linears(), torch.randn(64, 128)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(layer(x), layer(x.clone()))
        calls.clear()
        for layer in layers:
            layer(x)
        assert len(calls) == 1
        layers[0](x)
        assert len(calls) == 2, "the same layer again is another pass"


def test_what_was_shared_is_made_anew_when_something_changed() -> None:
    first, second, third = _linears()
    x = torch.randn(600, 128)
    with torch.no_grad():
        first(x)
        x.mul_(2)
        torch.testing.assert_close(second(x), _reference(second, x))
        x.numpy()[:] = torch.randn(600, 128).numpy()  # unknown to torch
        torch.testing.assert_close(third(x), _reference(third, x))
        first(x)
        second.input_quantizer.set_parameters(second.input_quantizer.scale * 2)
        torch.testing.assert_close(second(x), _reference(second, x))
        third.smoothing.mul_(1.5)
        torch.testing.assert_close(third(x), _reference(third, x))
        x[0, 0] = float("nan")
        assert first(x)[0].isnan().all()


def _reference(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    assert layer.smoothing is not None
    rounded = _expected(layer.input_quantizer, x * layer.smoothing.reciprocal())  # type: ignore[arg-type]
    weight = layer.weight_quantizer(layer.weight * layer.smoothing)
    return torch.nn.functional.linear(rounded, weight, layer.bias)


def test_a_layer_with_a_shared_input_can_be_copied() -> None:
    (layer,) = _linears(1)
    x = torch.randn(64, 128)
    with torch.no_grad():
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
