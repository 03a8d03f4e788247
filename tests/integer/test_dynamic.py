"""Activations quantized by their own range on each call."""

import copy

import pytest
import torch
from calibrated import close, compiled_operators, outputs, weight_quantizer
from test_layers import FloatProducts

import fastforward as ff
from fastforward.integer import IntegerDynamicLinear
from fastforward.integer.islands import DynamicIslandRounding, speed_up
from fastforward.integer.onednn import has_onednn
from fastforward.integer.row_codes import RowRounding

nn = torch.nn

ACTIVATIONS = {
    "per token": {"num_bits": 8, "symmetric": False, "granularity": ff.PerToken()},
    "per tensor": {"num_bits": 8, "symmetric": False},
    "symmetric": {"num_bits": 8, "symmetric": True, "granularity": ff.PerToken()},
    "two-sided": {"num_bits": 8, "symmetric": True, "allow_one_sided": False, "granularity": ff.PerToken()},
    "4 bits": {"num_bits": 4, "symmetric": False, "granularity": ff.PerToken()},
    "unsigned": {"num_bits": 8, "symmetric": False, "quantized_dtype": torch.uint8, "granularity": ff.PerToken()},
}


def _simulated(name: str = "per token", bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = ff.nn.QuantizedLinear(64, 48, bias=bias)
    layer.input_quantizer = ff.nn.DynamicLinearQuantizer(**ACTIVATIONS[name])
    layer.weight_quantizer = weight_quantizer(layer.weight)
    return nn.Sequential(layer).eval()


@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 300, 64), (64,), (0, 64)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_output_equals_simulation(name: str, shape: tuple[int, ...]) -> None:
    model = _simulated(name)
    example = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[(...,) + (None,) * (len(shape) - 1)] + 0.3
    expected = outputs(model, example)
    ff.convert(model)
    assert type(model[0]) is IntegerDynamicLinear
    with FloatProducts() as seen:
        actual = outputs(model, example)
    assert seen.found == []
    assert actual.shape == expected.shape
    assert example.numel() == 0 or close(expected, actual)
    (link,) = ff.integer.explain(model).integer
    assert link.kernel.endswith("per tensor" if name == "per tensor" else "per token")


def test_smoothing_and_no_bias() -> None:
    model = _simulated(bias=False)
    model[0].smoothing = torch.logspace(-0.5, 0.5, 64)
    model[0].weight_quantizer = weight_quantizer(model[0].weight * model[0].smoothing)
    example = torch.randn(20, 64)
    expected = outputs(model, example)
    assert close(expected, outputs(ff.convert(model), example))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, example = _simulated().to(dtype), torch.randn(20, 64, dtype=dtype)
    expected = outputs(model, example)
    actual = outputs(ff.convert(model), example)
    assert actual.dtype == dtype
    assert torch.allclose(expected.float(), actual.float(), atol=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_token_only(value: float) -> None:
    model, example = ff.convert(_simulated()), torch.randn(20, 64)
    expected = outputs(model, example)
    example[3, 1] = value
    actual = outputs(model, example)
    assert not actual[3].isfinite().any()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(actual[others], expected[others])


def test_compiled_gives_the_same() -> None:
    model, example = ff.convert(_simulated()), torch.randn(20, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = outputs(compiled, example)  # before any eager call
    assert close(outputs(model, example), actual)


def test_compiled_layers_are_one_operator_each() -> None:
    assert compiled_operators(ff.convert(_simulated()), torch.randn(20, 64))["linear_to_floats"] == has_onednn()


def test_layers_share_the_codes_of_a_tensor_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (ff.convert(_simulated(bias=bias)) for bias in (True, False))
    rounded, x = [], torch.randn(5, 64)
    kept = RowRounding._rounded
    monkeypatch.setattr(RowRounding, "_rounded", lambda self, *args: rounded.append(1) or kept(self, *args))
    outputs(first, x)
    together = outputs(second, x)
    assert len(rounded) == 1
    assert torch.equal(outputs(second, x.clone()), together)
    x.mul_(2)
    assert not torch.equal(outputs(second, x), together)


def test_codes_are_those_of_the_quantizer_in_blocks_too() -> None:
    quantizer = ff.nn.DynamicLinearQuantizer(**ACTIVATIONS["per token"])
    halfway = torch.cat((torch.tensor([0.0, 255.0]), torch.arange(62) + 0.5))
    x = torch.cat((torch.randn(3000, 64) + 0.3, halfway[None]))
    rows = RowRounding(quantizer.grid, quantizer.granularity)(x)
    assert torch.equal((rows.codes - rows.zero_point) * rows.scale, quantizer(x))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_quantizers_outside_of_layers_round_as_before(value: float) -> None:
    quantizer = ff.nn.DynamicLinearQuantizer(8, symmetric=False)
    x = torch.randn(4, 33) * 3 + 1
    x[0, 0] = value
    expected = quantizer(x)
    speed_up(quantizer)
    assert isinstance(quantizer.__dict__["simulate"], DynamicIslandRounding)
    for program in (quantizer, torch.compile(quantizer, fullgraph=True, backend="aot_eager")):
        assert torch.equal(program(x).nan_to_num(), expected.nan_to_num())
    gradient = torch.autograd.grad(quantizer(y := torch.randn(5, requires_grad=True)).sum(), y)
    assert torch.equal(gradient[0], torch.ones(5))


@pytest.mark.parametrize("options", [{"num_bits": 4}, {"num_bits": 8, "granularity": ff.PerToken()}], ids=str)
def test_quantizers_with_other_grids_are_left_alone(options: dict[str, object]) -> None:
    quantizer = ff.nn.DynamicLinearQuantizer(**options)
    speed_up(quantizer)
    assert "simulate" not in quantizer.__dict__


def test_saving_loading_copying_and_moving(tmp_path) -> None:
    simulation, example = _simulated(), torch.randn(20, 64)
    model = ff.convert(copy.deepcopy(simulation))
    expected = outputs(model, example)
    ff.load_quantization(simulation, ff.save_quantization(model, tmp_path))
    assert type(simulation[0]) is IntegerDynamicLinear
    for other in (simulation, copy.deepcopy(model), model.to("cpu")):
        assert torch.equal(outputs(other, example), expected)
    assert model.to(torch.bfloat16)[0].weight_scale.dtype == torch.float32


def test_the_scheme_runs_on_integers() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 32) for _ in range(2)]
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    ff.quantize(model, data, scheme="w8a8_dynamic", convert=True, progress=False)
    assert [type(model[index]) for index in (0, 2)] == [IntegerDynamicLinear] * 2


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (ff.nn.DynamicLinearQuantizer(16), "16 bits"),
        (ff.nn.DynamicLinearQuantizer(8, granularity=ff.PerGroup(32)), "one per token"),
        (ff.nn.DynamicLinearQuantizer(8, parameter_inference_fn=lambda q, x: (x.abs().max() / 9, None)), "own"),
    ],
)
def test_what_has_no_integer_form_stays_simulated(quantizer: object, reason: str) -> None:
    model = _simulated()
    model[0].input_quantizer = quantizer
    ff.convert(model)
    assert reason in ff.integer.explain(model).islands[0].reason
