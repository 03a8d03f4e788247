"""Smoothing, weight rounding, bias correction, batch-norm folding: each makes rounding cost less, or costs nothing."""

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.calibration.flow import Flow, passing_through
from fastforward.calibration.recorder import FlowRecorder
from fastforward.calibration.samples import Samples
from fastforward.calibration.smoothing import best_strength, divisor
from fastforward.calibration.steps import STEPS, fold_batch_norms, require_known, smooth_linears
from fastforward.calibration.undo import Undo
from fastforward.selection import schemes


def with_steps(*steps: str) -> schemes.Scheme:
    return schemes.get("w8a8").with_changes(steps=steps)


def outlier_data(batches: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(32)
    scale[:3] = torch.tensor([40.0, 25.0, 60.0])
    return [torch.randn(64, 32, generator=generator) * scale for _ in range(batches)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))


def quality(scheme: schemes.Scheme, held_out: int = 2) -> float:
    data, model = outlier_data(), mlp()
    expected = [model(x) for x in data[-held_out:]]
    ff.quantize(model, data[:-held_out], scheme=scheme, progress=False)
    return ff.sqnr(expected, [model(x) for x in data[-held_out:]])


def test_smoothing_helps_where_few_channels_are_large() -> None:
    assert quality(with_steps("smooth")) > quality(with_steps()) + 6


def test_every_step_together_is_better_than_smoothing_alone() -> None:
    assert quality(with_steps(*STEPS)) > quality(with_steps("smooth"))


def test_smoothing_cancels_in_float() -> None:
    data, model = outlier_data(), mlp()
    expected = model(data[0])
    ff.quantize(model, data, scheme=with_steps("smooth"), progress=False)
    assert model[0].smoothing is not None
    with ff.disable_quantization(model):
        torch.testing.assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_share_an_input_share_smoothing_and_range() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(x)
            return self.a(h) + self.b(h)

    model = Both()
    ff.quantize(model, outlier_data(), progress=False)
    assert torch.equal(model.a.smoothing, model.b.smoothing)
    assert torch.equal(model.a.input_quantizer.scale, model.b.input_quantizer.scale)
    assert torch.equal(model.a.input_quantizer.zero_point, model.b.input_quantizer.zero_point)


class PreNorm(nn.Module):
    """Two layers read a norm's result; with ``skip``, an addition does so too."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        nn.init.normal_(self.norm.weight)
        self.norm.weight.data[:3] *= 30
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.a(h) * torch.sigmoid(self.b(h))
        return y + h if self.skip else y


@pytest.mark.parametrize("skip", [False, True])
def test_smoothing_is_folded_into_a_norm_that_feeds_nothing_else(skip: bool) -> None:
    model, data = PreNorm(skip).eval(), [torch.randn(64, 32) for _ in range(4)]
    before, expected = model.norm.weight.detach().clone(), model(data[0])
    ff.quantize(model, data, scheme=with_steps("smooth"), progress=False)
    assert (model.a.smoothing is None) is not skip
    assert torch.equal(model.norm.weight, before) is skip
    assert ff.sqnr(expected, model(data[0])) > 30
    with ff.disable_quantization(model):
        torch.testing.assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-4)


class Activated(nn.Module):
    """A layer reads another through an activation, of which ``watched`` and ``moved`` make more than that."""

    def __init__(self, activation: nn.Module, watched: bool = False, moved: bool = False) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(32, 32), activation, nn.Linear(32, 16)
        self.first.weight.data[:3] *= 40
        self.second.weight.data[:, :3] /= 40
        self.watched, self.moved = watched, moved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = self.activation(h[:, [2, 0, 1, *range(3, 32)]] if self.moved else h)
        y = self.second(h)
        return y + h.sum() if self.watched else y


@pytest.mark.parametrize(
    ("model", "folds"),
    [
        (Activated(nn.ReLU()), True),
        (Activated(nn.ReLU(inplace=True)), True),
        (Activated(nn.LeakyReLU(0.1)), True),
        (Activated(nn.Sequential(nn.ReLU(), nn.ReLU())), True),
        (Activated(nn.GELU()), False),
        (Activated(nn.ReLU6()), False),
        (Activated(nn.ReLU(), watched=True), False),
        (Activated(nn.ReLU(), moved=True), False),
    ],
)
def test_smoothing_passes_activations_that_a_positive_factor_passes(model: Activated, folds: bool) -> None:
    data = [torch.randn(64, 32) for _ in range(4)]
    before, expected = model.first.weight.detach().clone(), model(data[0])
    ff.quantize(model, data, scheme=with_steps("smooth"), progress=False)
    assert torch.equal(model.first.weight, before) is not folds
    assert (model.second.smoothing is None) is folds
    with ff.disable_quantization(model):
        torch.testing.assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-3)


class NormedConvolution(nn.Module):
    """A batch norm behind a convolution without a bias, then layers that read a norm's result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm, self.rest = nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), PreNorm(False)
        nn.init.uniform_(self.batch_norm.weight)
        nn.init.normal_(self.batch_norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(torch.tanh(self.batch_norm(self.conv(x))).mean(3).transpose(1, 2))


def recorded(model: nn.Module, data: list[torch.Tensor]) -> tuple[Flow, Samples]:
    samples = Samples(len(data))
    recorder = FlowRecorder(model, listener=samples)
    with torch.no_grad(), recorder:
        for x in data:
            recorder.output(model(x))
    return recorder.flow(), samples


def test_samples_follow_what_is_folded_as_a_new_run_would() -> None:
    torch.manual_seed(0)
    model, data = NormedConvolution().eval().requires_grad_(False), [torch.randn(8, 1, 12, 12) for _ in range(3)]
    ff.quantize_model(model)
    flow, samples = recorded(model, data)
    assert fold_batch_norms(model, flow, samples, Undo())
    schemes.get("w8a8").apply(model, flow.governing())
    smoothing, hold = smooth_linears(model, flow, samples, Undo())
    assert hold
    assert not smoothing, "it was folded into the norm"
    with passing_through(model):
        expected_flow, expected = recorded(model, data)
    assert [site.place for site in flow.sites] == [site.place for site in expected_flow.sites]
    assert flow.consumers == expected_flow.consumers
    assert samples.calls.keys() == expected.calls.keys()
    for number, calls in expected.calls.items():
        for own, new in zip(samples.calls[number], calls, strict=True):
            assert own.arguments["bias"] is not None
            torch.testing.assert_close(own.run(), new.run())
            torch.testing.assert_close(own.arguments["input"], new.arguments["input"])


class OwnConvolution(nn.Conv2d):
    """What becomes of a bias given to it later only its own code knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.weight, self.bias)


class CopyingLinear(nn.Linear):
    """Multiplies a copy of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.clone(), self.bias)


@pytest.mark.parametrize(
    ("model", "shape", "records"),
    [
        (NormedConvolution(), (8, 1, 12, 12), 1),
        (nn.Sequential(OwnConvolution(1, 4, 3, bias=False), nn.BatchNorm2d(4)), (8, 1, 12, 12), 2),
        (nn.Sequential(CopyingLinear(8, 8), nn.BatchNorm1d(8)), (64, 8), 2),
    ],
    ids=["layers", "a bias of one's own", "a copied weight"],
)
def test_data_is_recorded_anew_only_where_samples_cannot_follow(
    model: nn.Module, shape: tuple[int, ...], records: int
) -> None:
    runs = []
    model.eval().register_forward_hook(lambda *args: runs.append(args))
    ff.quantize(model, [torch.randn(shape) for _ in range(3)], progress=False)
    assert len(runs) == 3 * records + 1 + 3, "recorded, looked at again with the first batch, observed"


def test_smoothing_stays_where_an_activation_gets_other_values_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.first.weight.data[:3] *= 40
            self.second.weight.data[:, :3] /= 40

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros(())
            for h in (x, self.first(x)):
                y = y + self.second(torch.relu(h))
            return y

    model = Twice()
    before = model.first.weight.detach().clone()
    ff.quantize(model, [torch.randn(64, 32) for _ in range(4)], scheme=with_steps("smooth"), progress=False)
    assert torch.equal(model.first.weight, before)


def test_folding_and_keeping_a_smoothing_are_equally_good() -> None:
    def quality_of(fold: bool, monkeypatch: pytest.MonkeyPatch) -> float:
        torch.manual_seed(0)
        model, data = PreNorm(False).eval(), [torch.randn(64, 32) for _ in range(4)]
        expected = model(data[0])
        with monkeypatch.context() as patch:
            if not fold:
                patch.setattr("fastforward.calibration.steps.producer", lambda *args: None)
            ff.quantize(model, data, progress=False)
        assert (model.a.smoothing is None) is fold
        return ff.sqnr(expected, model(data[0]))

    monkeypatch = pytest.MonkeyPatch()
    assert quality_of(True, monkeypatch) == pytest.approx(quality_of(False, monkeypatch), abs=1.0)


def test_no_smoothing_where_it_cannot_help() -> None:
    from fastforward.calibration.smoothing import SmoothingGroup

    layer = nn.Linear(32, 8)
    ff.quantize_model(layer)
    schemes.get("w8a8").apply(layer)
    rows = (torch.randint(0, 2, (256, 32)) * 2 - 1).float()
    assert best_strength(SmoothingGroup({"": layer}, rows)) == 0.0
    assert best_strength(SmoothingGroup({"": layer}, rows[:4] * torch.arange(1, 33))) == 0.0, "too few rows to tell"


def test_no_smoothing_where_a_tighter_range_does_as_well() -> None:
    from fastforward.calibration.smoothing import SmoothingGroup

    torch.manual_seed(0)
    layer = nn.Linear(512, 64)
    ff.quantize_model(layer)
    schemes.get("w8a8").apply(layer)
    rows = torch.randn(512, 512)  # no channel is larger than the others
    assert best_strength(SmoothingGroup({"": layer}, rows)) == 0.0
    assert best_strength(SmoothingGroup({"": layer}, rows * torch.linspace(1, 9, 512))) > 0.0


def test_the_divisor_has_geometric_mean_one() -> None:
    scale = divisor(outlier_data(1)[0], 0.7)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-6)
    assert float(scale[2]) > float(scale[10])


def test_rounded_weights_lie_on_the_grid_and_cost_less_output() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(32, 32) * torch.logspace(0, -2, 32)
    data = [torch.randn(128, 32) @ mixing for _ in range(4)]
    float_layer = nn.Linear(32, 16)
    errors = {}
    for steps in ((), ("round_weights",)):
        layer = nn.Linear(32, 16)
        layer.load_state_dict(float_layer.state_dict())
        scheme = schemes.get("w4").with_changes(steps=steps)
        ff.quantize(layer, data, scheme=scheme, progress=False)
        errors[steps] = ff.sqnr([float_layer(x) for x in data], [layer(x) for x in data])
        if steps:
            torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight)
    assert errors[("round_weights",)] > errors[()] + 1


def test_shared_weights_are_not_rounded() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.table(tokens)))

    model = Tied()
    before = model.table.weight.detach().clone()
    ff.quantize(model, [torch.arange(20)[None]], scheme=with_steps("round_weights"), progress=False)
    assert torch.equal(model.table.weight, before)


def test_bias_correction_removes_the_mean_error() -> None:
    torch.manual_seed(0)
    data = [torch.rand(256, 32) ** 4 for _ in range(2)]
    float_layer = nn.Linear(32, 16)
    means = {}
    for steps in ((), ("correct_bias",)):
        layer = nn.Linear(32, 16)
        layer.load_state_dict(float_layer.state_dict())
        scheme = schemes.get("w4a4").with_changes(steps=steps)
        ff.quantize(layer, data, scheme=scheme, progress=False)
        means[steps] = float((layer(data[0]) - float_layer(data[0])).mean(0).abs().max())
    assert means[("correct_bias",)] < means[()] / 3


def test_bias_correction_of_convolutions() -> None:
    torch.manual_seed(0)
    data = [torch.rand(16, 3, 8, 8) ** 4]
    float_layer = nn.Conv2d(3, 8, 3)
    means = {}
    for steps in ((), ("correct_bias",)):
        layer = nn.Conv2d(3, 8, 3)
        layer.load_state_dict(float_layer.state_dict())
        ff.quantize(layer, data, scheme=schemes.get("w4a4").with_changes(steps=steps), progress=False)
        means[steps] = float((layer(data[0]) - float_layer(data[0])).mean((0, 2, 3)).abs().max())
    assert means[("correct_bias",)] < means[()] / 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folding_a_batch_norm_changes_nothing_in_float(bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    ff.quantize(model, [x], scheme=with_steps("fold_batch_norm"), progress=False)
    assert float(model[1].running_mean.abs().max()) == 0
    with ff.disable_quantization(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_whose_input_is_used_elsewhere_too_is_not_folded() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = Skip().eval()
    model.norm.running_mean.fill_(1.0)
    ff.quantize(model, [torch.randn(2, 3, 4, 4)], scheme=with_steps("fold_batch_norm"), progress=False)
    assert float(model.norm.running_mean.mean()) == 1.0


def test_unknown_steps_are_named() -> None:
    with pytest.raises(ValueError, match="polish.*known steps.*smooth"):
        require_known(["polish"])
