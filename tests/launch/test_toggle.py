"""What the toggle does to the models of a program, call by call."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastforward as ff
from fastforward import toggle as toggle_module
from fastforward.nn.module import QuantizedModule
from fastforward.toggle import Toggle
from fastforward.toggle.settings import Settings
from fastforward.toggle.summary import summary, write_reports

CALIBRATION = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        if fail:
            raise RuntimeError("asked to fail")
        return self.head(self.body(x)) * 2


Start = Callable[..., Toggle]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Switch a toggle on for the test, with the settings given."""
    original = nn.Module.__call__

    def begin(**settings: object) -> Toggle:
        toggle = Toggle(Settings(**{"calibration": CALIBRATION, **settings}), original)
        toggle_module._wrap_module_call(toggle)
        return toggle

    yield begin
    nn.Module.__call__ = original


def levels(model: nn.Module, x: torch.Tensor) -> int:
    """How many different values the last linear layer multiplies."""
    seen: list[int] = []
    original = nn.functional.linear

    def linear(input: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(len(input.detach().unique()))
        return original(input, *args, **kwargs)

    nn.functional.linear = linear
    try:
        model(x)
    finally:
        nn.functional.linear = original
    return seen[-1]


def last_words(toggle: Toggle) -> str:
    for session in toggle.sessions:
        session.finish()
    return summary(toggle.settings, toggle.sessions, toggle.left_alone)


def train(model: nn.Module, steps: int = 6) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(64, 8)).square().mean().backward()
        optimizer.step()


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, ff.nn.Quantizer) and not module.is_stub() for module in model.modules())


# ---------------------------------------------------------------------- modes
def test_first_eval_batches_are_float_and_later_ones_simulate(start: Start) -> None:
    model = Net().eval()
    reference = copy.deepcopy(model)
    batches = [torch.randn(512, 8) for _ in range(CALIBRATION + 2)]
    expected = [reference(x) for x in batches]
    start()
    for index, (x, wanted) in enumerate(zip(batches, expected, strict=True)):
        result = model(x)
        assert torch.equal(result, wanted) == (index < CALIBRATION)
        assert torch.allclose(result, wanted, atol=0.2)
    assert levels(model, batches[0]) <= 256


def test_a_single_calibration_batch_is_enough(start: Start) -> None:
    model = Net().eval()
    x = torch.randn(512, 8)
    wanted = model(x)
    start(calibration=1)
    assert torch.equal(model(x), wanted)
    assert levels(model, x) <= 256
    assert ff.sqnr(wanted, model(x)) > 25


def test_training_simulates_and_follows_ranges(start: Start) -> None:
    model = Net()
    parameters = list(model.parameters())
    start()
    train(model)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is not None for p in parameters)
    before = model.body[0].input_quantizer.scale.clone()
    model(torch.randn(512, 8) * 10)
    assert model.body[0].input_quantizer.scale > before


def test_eval_after_training_simulates_with_ranges_that_stand(start: Start) -> None:
    model = Net()
    start()
    train(model)
    model.eval()
    before = model.body[0].input_quantizer.scale.clone()
    assert levels(model, torch.randn(512, 8) * 10) <= 256
    assert torch.equal(model.body[0].input_quantizer.scale, before)


def test_training_after_a_few_eval_batches(start: Start) -> None:
    model = Net().eval()
    start()
    with torch.inference_mode():
        model(torch.randn(64, 8))
    train(model)
    assert levels(model.eval(), torch.randn(512, 8)) <= 256


def test_inference_mode_leaves_a_model_that_can_be_trained(start: Start) -> None:
    model = Net().eval()
    start()
    with torch.inference_mode():
        for _ in range(CALIBRATION + 1):
            model(torch.randn(64, 8))
    train(model)


def test_nan_passes_and_is_reported(start: Start) -> None:
    model = Net().eval()
    toggle = start()
    bad = torch.full((4, 8), float("nan"))
    model(torch.randn(64, 8))
    assert model(bad).isnan().all()
    for _ in range(CALIBRATION):
        model(torch.randn(64, 8))
    assert torch.isfinite(model.body[0].input_quantizer.scale).all()
    assert "NaN or infinity" in last_words(toggle)


def test_checkpointed_modules_see_the_same_ranges_twice(start: Start) -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model = Checkpointed()
    start()
    train(model)
    scale = model.head.input_quantizer.scale.clone()
    loss = model(torch.randn(64, 8) * 3).sum()
    followed = model.head.input_quantizer.scale.clone()
    loss.backward()
    assert not torch.equal(scale, followed)
    assert torch.equal(followed, model.head.input_quantizer.scale)


# ---------------------------------------------------------------------- what the program does with its model
def test_state_dict_is_that_of_the_float_model(start: Start) -> None:
    model, floating = Net(), Net()
    start()
    train(model)
    assert model.state_dict().keys() == floating.state_dict().keys()
    floating.load_state_dict(model.state_dict())
    model.load_state_dict(Net().state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles_go_on_by_themselves(start: Start, training: bool) -> None:
    model = Net().train(training)
    start()
    for _ in range(CALIBRATION + 1):
        model(torch.randn(64, 8))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert is_quantized(copied)
        before = model.body[0].input_quantizer.scale.clone()
        copied.train()
        copied(torch.randn(64, 8) * 100)
        assert torch.equal(model.body[0].input_quantizer.scale, before)
        assert levels(copied.eval(), torch.randn(512, 8)) <= 256


def test_an_exception_of_the_program_passes_and_nothing_is_lost(start: Start) -> None:
    model = Net().eval()
    toggle = start()
    with pytest.raises(RuntimeError, match="asked to fail"):
        model(torch.randn(4, 8), fail=True)
    for _ in range(CALIBRATION + 1):
        model(torch.randn(64, 8))
    assert levels(model, torch.randn(512, 8)) <= 256
    assert not toggle.sessions[0].failure


@pytest.mark.parametrize("training", [True, False])
def test_compiled_models(start: Start, training: bool) -> None:
    model = Net().train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    toggle = start()
    x = torch.randn(64, 8)
    for _ in range(CALIBRATION + 1):
        compiled(x)
    assert [session.name.rpartition(".")[2] for session in toggle.sessions] == ["Net"]
    model.eval()
    assert torch.equal(compiled(x), model(x))
    assert levels(model, torch.randn(512, 8)) <= 256


def test_lazy_modules(start: Start) -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    start()
    for _ in range(CALIBRATION + 2):
        model(torch.randn(64, 8))
    assert levels(model, torch.randn(512, 8)) <= 256


# ---------------------------------------------------------------------- which modules are roots
def test_losses_and_parts_are_no_roots(start: Start) -> None:
    model, loss = Net(), nn.MSELoss()
    toggle = start()
    loss(model(torch.randn(4, 8)), torch.zeros(4, 4))
    model.head(torch.randn(4, 16))
    assert [session.name.rpartition(".")[2] for session in toggle.sessions] == ["Net"]
    assert not toggle.left_alone


def test_two_roots(start: Start) -> None:
    generator, critic = Net(), nn.Linear(4, 1)
    toggle = start()
    for _ in range(2):
        critic(generator(torch.randn(64, 8))).mean().backward()
    assert len(toggle.sessions) == 2
    assert is_quantized(generator) and is_quantized(critic)


def test_a_part_called_first_then_the_whole(start: Start) -> None:
    model = Net().eval()
    toggle = start()
    for _ in range(CALIBRATION + 1):
        model.body(torch.randn(64, 8))
    for _ in range(CALIBRATION + 1):
        model(torch.randn(64, 8))
    assert len(toggle.sessions) == 2
    assert levels(model, torch.randn(512, 8)) <= 256
    assert toggle.sessions[1].coverage.share == 1.0


@pytest.mark.parametrize(
    ("settings", "quantized"),
    [
        ({"exclude": ("head",)}, ["body.0"]),
        ({"include": ("head",)}, ["head"]),
        ({"exclude": ("torch.nn.modules.linear.Linear",)}, []),
        ({"include": (Net.__module__,)}, ["body.0", "head"]),
        ({"exclude": (f"{Net.__module__}.Net",)}, []),
        ({"include": ("somewhere.else",)}, []),
    ],
)
def test_include_and_exclude(start: Start, settings: dict[str, tuple[str, ...]], quantized: list[str]) -> None:
    model = Net()
    start(**settings)
    model(torch.randn(64, 8))
    layers = {"body.0": model.body[0], "head": model.head}
    assert [name for name, layer in layers.items() if isinstance(layer, QuantizedModule)] == quantized
    model(torch.randn(64, 8))
    assert [name for name, layer in layers.items() if is_quantized(layer)] == quantized


def test_scripted_and_traced_modules_are_named_at_the_end(start: Start) -> None:
    scripted, traced = torch.jit.trace(Net(), torch.randn(4, 8)), torch.fx.symbolic_trace(nn.Linear(8, 4))
    toggle = start()
    scripted(torch.randn(4, 8))
    traced(torch.randn(4, 8))
    text = last_words(toggle)
    assert "ScriptModule" in text and "traced graph" in text


# ---------------------------------------------------------------------- settings and last words
def test_summary_counts_modules_operators_and_macs(start: Start) -> None:
    toggle = start()
    model = Net()
    model(torch.randn(64, 8))
    del model
    text = last_words(toggle)
    assert text.startswith("fastforward: w8a8: ")
    assert "2 modules, 2 of 2 operators, 100.0% of multiply-accumulates quantized" in text


def test_summary_says_that_nothing_was_quantized(start: Start) -> None:
    toggle = start()
    nn.ReLU()(torch.zeros(1))
    assert "nothing was quantized" in last_words(toggle)


def test_an_unknown_scheme_leaves_the_program_in_float_and_says_so(start: Start) -> None:
    model = Net()
    x = torch.randn(4, 8)
    wanted = model(x)
    toggle = start(scheme="w9a9")
    assert torch.equal(model(x), wanted)
    assert "unknown scheme 'w9a9'" in last_words(toggle)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8", "w8a8_dynamic", "fp8", "w8a16"])
def test_schemes(start: Start, scheme: str) -> None:
    model = Net()
    toggle = start(scheme=scheme)
    train(model)
    assert is_quantized(model)
    assert not toggle.sessions[0].failure
    model.eval()(torch.randn(64, 8))


def test_configuration_file(start: Start, tmp_path: object) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(ff.QuantizationConfig("w4a8").to_yaml())
    model = Net()
    start(scheme=str(path))
    train(model)
    assert model.head.weight_quantizer.num_bits == 4


def test_report_is_written_for_each_root(start: Start, tmp_path: object) -> None:
    toggle = start(report=str(tmp_path / "page.html"))
    for model in (Net(), nn.Linear(8, 2)):
        model(torch.randn(64, 8))
    del model
    last_words(toggle)
    write_reports(toggle.settings, toggle.sessions)
    assert "Net" in (tmp_path / "page.html").read_text()
    assert "Linear" in (tmp_path / "page-2.html").read_text()


def test_debug_prints_modules_sites_and_reasons(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    toggle = start(debug=True)
    Net()(torch.randn(64, 8))
    last_words(toggle)
    printed = capsys.readouterr().err
    for wanted in ("Net (rewritten in memory)", "head: QuantizedLinear (hand-written)", "bias of linear: added in"):
        assert wanted in printed


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "": "w4a8",
        "_CALIBRATION": "2",
        "_INCLUDE": "a, b.c",
        "_EXCLUDE": "d",
        "_REPORT": "x.html",
        "_DEBUG": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"FF_AUTOQUANT{name}", value)
    assert Settings.from_environment() == Settings("w4a8", 2, ("a", "b.c"), ("d",), "x.html", True)


@pytest.mark.parametrize(("value", "scheme"), [("1", "w8a8"), ("true", "w8a8"), ("On", "w8a8"), ("w4_g128", "w4_g128")])
def test_values_of_the_variable(monkeypatch: pytest.MonkeyPatch, value: str, scheme: str) -> None:
    monkeypatch.setenv("FF_AUTOQUANT", value)
    assert Settings.from_environment().scheme == scheme


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_calibration_must_be_a_positive_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FF_AUTOQUANT_CALIBRATION", value)
    with pytest.raises(ValueError, match="FF_AUTOQUANT_CALIBRATION must be a positive number"):
        Settings.from_environment()
