"""NaN and infinity have no integer: integer layers refuse them."""

import copy

import pytest
import torch
from calibrated import Net, activation_quantizer, close, outputs, simulated

import fastforward as ff
from fastforward.integer.islands import IslandRounding, speed_up

nn = torch.nn
F = torch.nn.functional

LAYERS = {
    "linear": (lambda: nn.Linear(32, 16), (8, 32)),
    "linear 1 row": (lambda: nn.Linear(32, 16), (1, 32)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
}


def _converted(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    example = torch.randn(shape)
    model = simulated(nn.Sequential(make()), example)
    return model, ff.convert(copy.deepcopy(model)), example


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_refuses_it(name: str, value: float) -> None:
    _, model, example = _converted(name)
    outputs(model, example, runs=3)
    example.view(-1)[7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        outputs(model, example)


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
@pytest.mark.parametrize("name", LAYERS)
def test_a_huge_value_saturates_as_in_simulation(name: str, value: float) -> None:
    simulation, model, example = _converted(name)
    example.view(-1)[7] = value
    assert close(outputs(simulation, example), outputs(model, example))


def test_smoothed_inputs_are_looked_at_too() -> None:
    example = torch.randn(600, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 16)), example)
    model[0].smoothing = torch.full((32,), 2.0)
    ff.convert(model)
    example[-1, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        outputs(model, example)


def test_what_arises_between_integer_layers_is_refused_by_the_next() -> None:
    example = torch.randn(8, 32)
    net = Net(lambda self, x: self.b(F.layer_norm(self.a(x), (16,))), a=nn.Linear(32, 16), b=nn.Linear(16, 8))
    model = ff.convert(simulated(net, example))
    outputs(model, example, runs=3)
    model.function = lambda self, x: self.b(torch.log(self.a(x)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        outputs(model, example)


def test_a_quantizer_outside_of_integer_layers_passes_nan_on() -> None:
    def function(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer(self.a(x) - 1)

    example = torch.randn(8, 32)
    model = simulated(Net(function, a=nn.Linear(32, 16), quantizer=activation_quantizer(-1.0, 1.0)), example)
    speed_up(model.quantizer)
    assert isinstance(model.quantizer.__dict__["simulate"], IslandRounding)
    example[0, 0] = float("nan")
    y = outputs(model, example)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


def test_large_ordinary_sums_are_no_reason_to_refuse() -> None:
    torch.manual_seed(0)
    example = torch.rand(64, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 16)), example)
    expected = outputs(model, example * 1e6)
    assert close(expected, outputs(ff.convert(model), example * 1e6))


def test_the_check_can_be_turned_off() -> None:
    _, model, example = _converted("linear")
    example[0, 0] = float("nan")
    ff.integer.check_inputs(False)
    try:
        assert outputs(model, example).isfinite().all()
    finally:
        ff.integer.check_inputs()
    with pytest.raises(ValueError, match="NaN or infinite"):
        outputs(model, example)


def test_codes_are_not_kept_of_inference_tensors() -> None:
    def function(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        x.mul_(-1)
        return first + self.b(x)

    example = torch.randn(8, 32)
    model = simulated(Net(function, a=nn.Linear(32, 16), b=nn.Linear(32, 16)), example.clone())
    model.b.input_quantizer.quantization_range = model.a.input_quantizer.quantization_range
    expected = outputs(model, example.clone())
    ff.convert(model)
    with torch.inference_mode():
        for _ in range(3):
            assert close(expected, model(example.clone()) + 0)
