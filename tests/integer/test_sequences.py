"""torch.nn.Sequential hands products on: what is computed stays the same, and whoever looks still sees all calls."""

import copy
import pickle
from typing import Any

import pytest
import torch
from calibrated import activation_quantizer, close, outputs, simulated

import fastforward as ff
from fastforward.integer import deferred, linear

nn = torch.nn


def sequence() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    layers = nn.Conv2d(4, 8, 3), norm, nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(8, 8, 3), nn.Hardswish()
    return nn.Sequential(*layers).eval(), torch.randn(2, 4, 9, 9)


@pytest.fixture
def converted() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    model, x = sequence()
    simulated(model, x)
    expected = outputs(model, x)
    ff.convert(model, example_inputs=x)
    return model, x, expected


def tensors_made(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    made = []
    wrapper = deferred._wrapper
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(deferred, "_wrapper", lambda *args: made.append(args) or wrapper(*args))
        model(x)
    return len(made)


def test_only_the_last_result_is_made_a_tensor(converted: Any, monkeypatch) -> None:
    model, x, expected = converted
    assert close(expected, outputs(model, x))
    assert [link.fused for link in ff.integer.explain(model).links] == [("batch_norm", "relu"), ("hardswish",)]
    assert tensors_made(model, x, monkeypatch) == 1


@pytest.mark.parametrize("index", range(6))
def test_hooks_see_the_calls_of_their_module(converted: Any, index: int) -> None:
    model, x, expected = converted
    seen: list[torch.Tensor] = []
    model[index].register_forward_hook(lambda module, args, result: seen.append(result * 1))
    assert close(expected, outputs(model, x))
    with torch.no_grad():
        assert torch.allclose(seen[0], model[: index + 1](x) * 1, atol=1e-5)


def test_hooks_of_all_modules_see_every_call(converted: Any) -> None:
    model, x, expected = converted
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with handle:
        assert close(expected, outputs(model, x))
    assert seen == [*model, model]


def test_modules_put_in_the_place_of_others_run(converted: Any) -> None:
    model, x, _ = converted
    model[2] = nn.Tanh()
    with torch.no_grad():
        expected = model[5](model[4](torch.tanh(model[1](model[0](x)) * 1)))
    assert torch.allclose(outputs(model, x), expected * 1, atol=1e-5)


def test_a_quantizer_attached_later_acts() -> None:
    model, x = sequence()
    ff.quantize(model, [x, x], progress=False, convert=True)
    before = outputs(model, x)
    model[5].output_quantizer = activation_quantizer(-0.1, 0.1, num_bits=2)
    with torch.no_grad():
        assert torch.equal(outputs(model, x), model[5].output_quantizer(before))


def test_dropout_in_training_drops(converted: Any) -> None:
    model, x, _ = converted
    model[3].train()
    assert not torch.equal(outputs(model, x), outputs(model, x))


def test_copies_and_pickles_run_alike(converted: Any, monkeypatch) -> None:
    model, x, _ = converted
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, x), outputs(model, x))
        assert tensors_made(other, x, monkeypatch) == 1
        other[5] = nn.Identity()
        assert not torch.equal(outputs(other, x), outputs(model, x)), "it runs its own modules, not the original's"


def test_a_layer_that_stays_float_rounds_its_result_where_that_is_quantized(monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(3, 16)
    simulated(model, x)
    model[0].output_quantizer = activation_quantizer(-4.0, 4.0)
    monkeypatch.setattr(linear, "fastest", lambda ways, device: "float")
    ff.convert(model, example_inputs=x)
    assert ff.integer.explain(model).islands
    y = outputs(model, x)
    assert torch.equal(y, model[0].output_quantizer(y)) and torch.equal(y, outputs(model[0], x))
