"""observer="auto": the range that costs the operator's output least."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.calibration.choose import Candidates, Use, automatic
from fastforward.calibration.flow import in_eval_mode
from fastforward.calibration.min_max import MinMax
from fastforward.calibration.recorder import FlowRecorder
from fastforward.calibration.samples import ELEMENTS, ROWS, Samples


def quantized_linear(weight: torch.Tensor, bits: int = 4) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    ff.quantize_model(layer)
    layer.input_quantizer = ff.nn.LinearQuantizer(bits, symmetric=False, metadata=layer.input_quantizer.quant_metadata)
    return layer


def calibrate(layer: nn.Module, data: list[torch.Tensor]) -> dict[str, object]:
    samples = Samples(len(data))
    recorder = FlowRecorder(layer, listener=samples)
    with in_eval_mode(layer):
        with recorder, ff.disable_quantization(layer):
            for x in data:
                layer(x)
        with ff.estimate_ranges(layer, automatic(recorder.flow(), samples)) as estimation:
            for x in data:
                layer(x)
    return dict(estimation.observers)


def test_an_outlier_that_the_output_hardly_sees_is_clipped() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    x[0, 0] = 100.0
    weight = torch.randn(8, 16)
    weight[:, 0] = 1e-3
    layer = quantized_linear(weight)
    calibrate(layer, [x])
    assert float(layer.input_quantizer.quantization_range[1]) < 20


def test_an_outlier_that_the_output_depends_on_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    x[:, 0] *= 20
    layer = quantized_linear(torch.randn(8, 16), bits=8)
    observers = calibrate(layer, [x])
    chosen = next(o for o in observers.values() if isinstance(o, Candidates)).chosen
    assert chosen == "min-max"


def test_a_candidate_that_is_hardly_better_does_not_replace_min_max() -> None:
    data = torch.randn(512, 16)
    layer = quantized_linear(torch.randn(8, 16), bits=8)
    observers = calibrate(layer, [data.clamp(-2, 2)])
    assert next(o for o in observers.values() if isinstance(o, Candidates)).chosen == "min-max"


def test_layers_that_share_an_input_are_judged_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(x)
            return self.q(h) + self.k(h) * self.v(h)

    judged = []
    errors = Use.errors
    monkeypatch.setattr(Use, "errors", lambda use, candidates: judged.append(use) or errors(use, candidates))
    model = Three()
    ff.quantize(model, [torch.randn(64, 16) for _ in range(2)], progress=False)
    assert len(judged) == 3
    assert torch.equal(model.q.input_quantizer.scale, model.v.input_quantizer.scale)


def test_candidates_merge_as_if_one_had_seen_all() -> None:
    first, second, both = (Candidates(lambda roundings: 0) for _ in range(3))
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([-3.0, 0.5])
    first(a), second(b), both(a), both(b)
    merged = first.merge(second)
    merged.succeed(first)
    for (name, mine), (_, expected) in zip(merged.ranges(), both.ranges(), strict=True):
        assert torch.equal(torch.stack(mine), torch.stack(expected)), name
    low, high = merged.compute_range()
    assert (float(low), float(high)) == (-3.0, 1.0)


def test_integers_and_infinities_are_refused_by_name() -> None:
    observer = Candidates(lambda roundings: 0).bind(ff.PerTensor(), MinMax().grid, "encoder.input_quantizer")
    for bad in (torch.tensor([1, 2]), torch.tensor([1.0, float("inf")]), torch.tensor([float("nan")])):
        with pytest.raises(ff.exceptions.CalibrationError, match="encoder.input_quantizer"):
            observer(bad)


@pytest.mark.parametrize(
    ("make", "shape", "argument"),
    [
        (lambda: nn.Linear(32, 4), (40000, 32), "input"),
        (lambda: nn.Conv2d(16, 4, 3), (64, 16, 128, 128), "input"),
    ],
)
def test_samples_are_bounded(make: Callable[[], nn.Module], shape: tuple[int, ...], argument: str) -> None:
    model = make()
    ff.quantize_model(model)
    samples = Samples(2)
    with in_eval_mode(model), FlowRecorder(model, listener=samples):
        for _ in range(2):
            model(torch.zeros(shape))
    kept = [call.arguments[argument] for calls in samples.calls.values() for call in calls]
    assert 0 < sum(x.numel() for x in kept) <= ELEMENTS
    assert "Conv" in type(model).__name__ or sum(x.shape[0] for x in kept) <= ROWS


def test_a_sampled_call_computes_what_the_operator_computed() -> None:
    model, x = nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8)
    ff.quantize_model(model)
    samples = Samples(1)
    with in_eval_mode(model), FlowRecorder(model, listener=samples):
        expected = model(x)
    (calls,) = samples.calls.values()
    torch.testing.assert_close(calls[0].run(), expected)


@pytest.mark.parametrize(("shape", "kept"), [((8, 3, 10, 10), [2]), ((3, 20, 20), []), ((3, 5, 5), [3])], ids=str)
def test_of_large_inputs_entries_of_the_batch_are_sampled_and_never_channels(
    shape: tuple[int, ...], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastforward.calibration.samples.ELEMENTS", 2 * 700)
    samples, layer = Samples(), nn.Conv2d(3, 4, 3)
    with FlowRecorder(ff.quantize_model(layer), listener=samples):
        layer(torch.randn(shape))
    assert [len(call.arguments["input"]) for calls in samples.calls.values() for call in calls] == kept
