"""ff.quantize: forms of data, the state it leaves, and bad input."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.nn.quantizer import Quantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.second(self.dropout(torch.relu(self.first(x)))) * scale


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) if float(x.detach().abs().max()) > 100 else self.small(x)


class NoProducts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(16, 8) for _ in range(count)]


def active(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Quantizer) and not module.is_stub()}


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, classes: list[type], state: dict[str, torch.Tensor]) -> None:
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: batches(),
        lambda: iter(batches()),
        lambda: [(x,) for x in batches()],
        lambda: [(x, 1.0) for x in batches()],
        lambda: [{"x": x} for x in batches()],
        lambda: [ff.Call((x,), {"scale": 1.0}) for x in batches()],
        lambda: torch.utils.data.DataLoader(torch.randn(48, 8), batch_size=16),
        lambda: lambda model: [model(x) for x in batches()],
    ],
    ids=["tensors", "one-shot", "tuples", "more positional", "mappings", "calls", "loader", "function"],
)
def test_data_comes_in_many_forms(make: Callable[[], Any]) -> None:
    model = Net().eval()
    data, expected = batches(1)[0], None
    expected = model(data)
    assert ff.quantize(model, make(), progress=False) is model
    assert len(active(model)) == 4
    assert ff.sqnr(expected, model(data)) > 25


def test_a_function_without_arguments_runs_the_model_too() -> None:
    model = Net()
    ff.quantize(model, lambda: model(torch.randn(16, 8)), progress=False)
    assert len(active(model)) == 4


def test_one_value_is_quantized_once() -> None:
    model = Net()
    ff.quantize(model, batches(), progress=False)
    assert active(model) == {
        f"{layer}.{role}_quantizer" for layer in ("first", "second") for role in ("input", "weight")
    }


def test_code_that_compares_identities_keeps_all_its_products_quantized() -> None:
    """torch's attention takes another way when query, key and value are no longer one object."""
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    ff.quantize(model, [ff.Call((x, x, x), {"need_weights": False})], progress=False)
    found = ff.coverage(model, ff.Call((x, x, x), {"need_weights": False})).require(1.0)
    assert {row.operator for row in found.multiplying} == {"linear", "scaled_dot_product_attention"}


def test_modes_and_gradients_are_as_before() -> None:
    model = Net()
    model.second.eval()
    ff.quantize(model, batches(), progress=False)
    assert model.training and model.first.training and not model.second.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_parameters_keep_their_identity() -> None:
    model = Net()
    before = dict(model.named_parameters())
    ff.quantize(model, batches(), progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_an_observer_of_ones_own_sets_the_ranges() -> None:
    model, data = Net(), batches()
    ff.quantize(model, data, observer=ff.observers.MinMax, scheme=ff.schemes.get("w8a8").with_changes(steps=()),
                progress=False)  # fmt: skip
    low, high = model.first.input_quantizer.quantization_range
    everything = torch.cat(data)
    assert float(low) == pytest.approx(float(everything.min()), rel=0.02)
    assert float(high) == pytest.approx(float(everything.max()), rel=0.02)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8", "w4_g128", "w4a8", "a8", "fp8", "mxfp8"])
def test_every_kind_of_scheme_goes_through(scheme: str) -> None:
    model, data = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 8)), [torch.randn(64, 128)]
    expected = model(data[0])
    ff.quantize(model, data, scheme=scheme, progress=False)
    assert ff.sqnr(expected, model(data[0])) > 10


def test_stubs_that_are_there_already_are_used() -> None:
    model = Net()
    ff.quantize_model(model, skip=["second"])
    ff.quantize(model, batches(), progress=False)
    assert active(model) >= {"first.input_quantizer", "first.weight_quantizer"}
    assert type(model.second) is nn.Linear


def test_a_compiled_model_is_quantized_inside() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    assert ff.quantize(compiled, batches(), progress=False) is compiled
    assert len(active(model)) == 4


def test_sites_never_reached_stay_stubs_and_are_reported() -> None:
    model = Branching()
    with pytest.warns(ff.QuantizationWarning, match="never reached large"):
        ff.quantize(model, batches(), progress=False)
    assert active(model) == {"small.input_quantizer", "small.weight_quantizer"}
    assert model(torch.full((1, 8), 1000.0)).shape == (1, 4), "the other branch runs in float"


class Routing(nn.Module):
    """Sends its input to one of two layers by a value that quantization rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.even, self.odd = nn.Linear(8, 1, bias=False), nn.Linear(8, 4), nn.Linear(8, 4)
        with torch.no_grad():
            self.router.weight.copy_(torch.tensor([1.0, -1.0, *[0.0] * 6]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = float(self.router(x).detach().abs().max()) > 0
        return self.odd(x) if exact else self.even(x)


def test_what_only_float_reaches_is_left_float_and_reported() -> None:
    """The router's two inputs become equal when they are rounded to 8 bits."""
    data, model = torch.tensor([[1.0, 1.001, *[0.0] * 6]]), Routing()
    with pytest.warns(ff.QuantizationWarning, match="never reached"):
        ff.quantize(model, [data], scheme="w8a8_dynamic", progress=False)
    assert all(quantizer.is_calibrated for _, quantizer in model.named_quantizers())
    assert model(data).shape == model(data * 100).shape == (1, 4)


class Borrowing(nn.Module):
    """Multiplies with the parameters of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_layer_whose_parameters_are_used_by_others_is_not_called_unreached(recwarn: pytest.WarningsRecorder) -> None:
    model = Borrowing()
    ff.quantize(model, batches(), progress=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, ff.QuantizationWarning)]
    assert ff.coverage(model, batches(1)[0]).share == 1.0


def test_branches_that_only_later_batches_take_are_quantized() -> None:
    model = Branching()
    ff.quantize(model, [*batches(), torch.full((4, 8), 1000.0)], progress=False)
    assert len(active(model)) == 4


def test_the_summary_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ff.quantize(Net(), batches())
    out = capsys.readouterr().out
    assert "w8a8: 100.0% of" in out and "2 of 2 operators" in out


def test_converting_in_one_call() -> None:
    model, data = Net().eval(), batches()
    expected = model(data[0])
    ff.quantize(model, data, convert=True, progress=False)
    assert ff.coverage(model, data[0]).integer_share == 1.0
    assert ff.sqnr(expected, model(data[0])) > 25


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if float(x.detach().abs().max()) > 100:
            msg = "too large"
            raise OverflowError(msg)
        return y


def nothing() -> Iterator[torch.Tensor]:
    return iter(())


BAD = [
    (Net, lambda: [], {}, ff.exceptions.CalibrationError, "no batches"),
    (Net, nothing, {}, ff.exceptions.CalibrationError, "no batches"),
    (Net, lambda: torch.randn(4, 8), {}, TypeError, "wrap a single batch"),
    (Net, lambda: 3, {}, TypeError, "iterable of batches"),
    (Net, lambda: "abc", {}, TypeError, "iterable of batches"),
    (Net, lambda: [3], {}, TypeError, "batch must be"),
    (Net, lambda: [torch.full((2, 8), float("nan"))], {}, ff.exceptions.CalibrationError, "NaN or infinity"),
    (Net, lambda: [*batches(), torch.full((2, 8), float("inf"))], {}, ff.exceptions.CalibrationError, "NaN or inf"),
    (Net, batches, {"scheme": "w8a9"}, ValueError, "unknown scheme 'w8a9'.*w8a8_dynamic"),
    (Net, batches, {"scheme": 8}, TypeError, "scheme"),
    (Net, batches, {"observer": 3}, TypeError, "observer must be"),
    (NoProducts, batches, {}, ff.exceptions.QuantizationError, "quantized nothing"),
    (Net, lambda: lambda: None, {}, ff.exceptions.CalibrationError, "never reached the model"),
    (Raising, lambda: [*batches(), torch.full((2, 8), 1e3)], {}, OverflowError, "too large"),
    (Net, lambda: [torch.randn(4, 9)], {}, RuntimeError, "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "data", "options", "error", "message"), BAD)
def test_bad_input_is_a_clear_error_and_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module],
    data: Callable[[], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model = make()
    classes, state = [type(module) for module in model.modules()], stored(model)
    with pytest.raises(error, match=message):
        ff.quantize(model, data(), progress=False, **options)
    assert_untouched(model, classes, state)
    assert model.training


def test_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="torch.nn.Module"):
        ff.quantize(lambda x: x, batches())  # type: ignore[arg-type]


def test_a_quantized_model_is_refused_and_keeps_its_quantizers() -> None:
    model, data = Net(), batches()
    ff.quantize(model, data, progress=False)
    before, expected = active(model), model.eval()(data[0])
    with pytest.raises(ff.exceptions.QuantizationError, match="quantized already"):
        ff.quantize(model, data, progress=False)
    assert active(model) == before
    assert torch.equal(model(data[0]), expected)


@pytest.mark.parametrize("step", ["smooth_linears", "refine_linears", "fold_batch_norms"])
def test_a_failure_in_any_step_is_rolled_back(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastforward.calibration import steps

    real = getattr(steps, step)

    def failing(*args: Any) -> None:
        real(*args)
        msg = "interrupted"
        raise KeyboardInterrupt(msg)

    monkeypatch.setattr(steps, step, failing)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 4)
    )
    model.train()
    classes, state = [type(module) for module in model.modules()], stored(model)
    with pytest.raises(KeyboardInterrupt):
        ff.quantize(model, batches(), progress=False)
    assert_untouched(model, classes, state)
    assert ff.quantize_model(model) is model, "a fresh start is possible"


def test_stubs_of_the_users_own_are_stubs_again_after_an_error() -> None:
    model = Net()
    ff.quantize_model(model)
    with pytest.raises(ff.exceptions.CalibrationError):
        ff.quantize(model, [torch.full((2, 8), float("nan"))], progress=False)
    assert active(model) == set()
    assert model.first.smoothing is None


def test_observing_an_integer_tensor_names_it() -> None:
    quantizer = ff.nn.LinearQuantizer(8)
    with pytest.raises(ff.exceptions.CalibrationError, match="torch.int64"):
        ff.observers.MinMax()(torch.tensor([1, 2]))
    assert torch.equal(quantizer(torch.tensor([1, 2])), torch.tensor([1, 2])), "at a site it passes through"


def test_running_before_calibrating_names_the_site() -> None:
    model = Net()
    ff.quantize_model(model)
    ff.schemes.get("w8a8").apply(model)
    with pytest.raises(ff.exceptions.CalibrationError, match="linear.*before its range is known"):
        model(torch.randn(2, 8))


def test_converting_before_calibrating_is_an_error() -> None:
    model = Net()
    ff.quantize_model(model)
    ff.schemes.get("w8a8").apply(model)
    with pytest.raises(ff.exceptions.CalibrationError, match="no range yet"):
        ff.convert(model)


def test_an_error_after_conversion_leaves_an_integer_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastforward.integer import conversion

    def failing(*args: Any) -> None:
        msg = "interrupted"
        raise KeyboardInterrupt(msg)

    monkeypatch.setattr(conversion, "learn", failing)
    model, data = Net(), batches()
    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        ff.quantize(model, data, progress=False, convert=True)
    assert isinstance(model.first, ff.integer.IntegerLinear)
    assert model.eval()(data[0]).isfinite().all()
