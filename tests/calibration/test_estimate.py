"""estimate_ranges: float pass-through, ranges at the end, nothing half done, tracking in training."""

import warnings

import pytest
import torch

import fastforward as ff
from fastforward.calibration.estimate import track_ranges
from fastforward.calibration.observers import Histogram, MinMax, MovingAverageMinMax, Observer
from fastforward.exceptions import CalibrationError, QuantizationWarning
from fastforward.nn import DynamicLinearQuantizer, LinearQuantizer, QuantizerMetadata, QuantizerStub
from fastforward.quantization.granularity import PerChannel, PerToken


class Block(torch.nn.Module):
    """Stands for a quantized module: a weight and quantizers on both operands and the result."""

    def __init__(self, bits=8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        self.input_quantizer = LinearQuantizer(bits, symmetric=False)
        self.weight_quantizer = LinearQuantizer(bits, granularity=PerChannel(0), allow_one_sided=False)
        self.output_quantizer = QuantizerStub()

    def forward(self, x):
        return self.output_quantizer(self.input_quantizer(x) @ self.weight_quantizer(self.weight).t())


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_found_quantizers_are_a_target():
    layer = ff.nn.QuantizedLinear(8, 4)
    layer.input_quantizer = LinearQuantizer(8)
    with ff.estimate_ranges(ff.find_quantizers(torch.nn.Sequential(layer), "**/input_quantizer")) as estimation:
        layer(randn(2, 8))
    assert list(estimation.sites) == ["0.input_quantizer"]
    assert layer.input_quantizer.is_calibrated


def test_the_block_runs_in_float_and_sets_ranges_at_its_end():
    block, x = Block(), randn(16, 8)
    with ff.estimate_ranges(block, MinMax) as estimation:
        assert torch.equal(block(x), x @ block.weight.t())
        assert not block.input_quantizer.is_calibrated
        assert set(estimation.sites) == {"input_quantizer", "weight_quantizer"}
        block(x * 2)
    assert block.input_quantizer.quantization_range[1] == pytest.approx(2 * x.max().item(), rel=0.02)
    assert block.weight_quantizer.scale.shape == (4,)
    assert not block.input_quantizer.overrides
    assert 0 < (block(x) - x @ block.weight.t()).abs().max() < 0.2


def test_results_do_not_depend_on_autograd():
    block, x = Block(), randn(16, 8)
    with ff.estimate_ranges(block):
        block(x).sum().backward()
    assert block.weight.grad is not None
    assert not block.input_quantizer.scale.requires_grad


@pytest.mark.parametrize(
    "observer",
    [MinMax, MinMax(), lambda name, quantizer: MinMax(), Histogram(bins=256)],
    ids=["class", "instance", "function", "histogram instance"],
)
def test_forms_of_the_observer(observer):
    block, x = Block(), randn(16, 8)
    with ff.estimate_ranges(block, observer) as estimation:
        block(x)
    observers = list(estimation.observers.values())
    assert observers[0] is not observers[1]
    assert block.input_quantizer.is_calibrated


def test_arguments_go_to_the_class():
    quantizer = LinearQuantizer(8, symmetric=False)
    with ff.estimate_ranges(quantizer, MovingAverageMinMax, momentum=0.5):
        for low in (-1.0, -3.0):
            quantizer(torch.tensor([low, 0.0]))
    assert quantizer.quantization_range[0] == pytest.approx(-2.0, rel=0.01)


@pytest.mark.parametrize(
    "target",
    [
        lambda b: [b],
        lambda b: [b.input_quantizer, b.weight_quantizer],
        lambda b: {"in": b.input_quantizer, "w": b.weight_quantizer},
    ],
)
def test_forms_of_the_target(target):
    block = Block()
    with ff.estimate_ranges(target(block)):
        block(randn(2, 8))
    assert block.input_quantizer.is_calibrated
    assert block.weight_quantizer.is_calibrated


@pytest.mark.parametrize(
    ("observer", "arguments", "error"),
    [
        (MinMax(), {"bins": 3}, ValueError),
        (3, {}, TypeError),
        (MinMax, {"missing": "no"}, ValueError),
        (MinMax, {"bins": 3}, TypeError),
    ],
)
def test_bad_arguments(observer, arguments, error):
    with pytest.raises(error), ff.estimate_ranges(Block(), observer, **arguments):
        pass


def test_an_exception_inside_leaves_everything_as_it_was():
    block, x = Block(), randn(16, 8)
    with ff.estimate_ranges(block):
        block(x)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(KeyError), ff.estimate_ranges(block):
        block(x * 100)
        raise KeyError
    assert not block.input_quantizer.overrides
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_range_that_cannot_be_computed_changes_no_other():
    class Broken(Observer):
        def update(self, x):
            pass

        def compute_range(self):
            msg = "no range"
            raise ArithmeticError(msg)

    block = Block()
    with (
        pytest.raises(ArithmeticError),
        ff.estimate_ranges(block, lambda name, q: Broken() if name == "weight_quantizer" else MinMax()),
    ):
        block(randn(2, 8))
    assert not block.input_quantizer.is_calibrated


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_refused_where_it_occurs(bad):
    block, x = Block(), randn(2, 8)
    block.input_quantizer.quant_metadata = QuantizerMetadata(("activation/input",), "matmul", "input", "model.py", 31)
    x[0, 0] = bad
    with (
        pytest.raises(
            CalibrationError, match=r"input_quantizer \(activation/input of matmul\(input\) at model.py:31\)"
        ),
        ff.estimate_ranges(block),
    ):
        block(x)
    assert not block.input_quantizer.overrides
    assert not block.weight_quantizer.is_calibrated


def test_no_data_is_an_error():
    block = Block()
    with (
        pytest.raises(CalibrationError, match="no floating tensor reached input_quantizer, weight_quantizer"),
        ff.estimate_ranges(block),
    ):
        pass
    with pytest.raises(CalibrationError, match="no floating tensor"), ff.estimate_ranges(block.input_quantizer):
        block.input_quantizer(torch.tensor([1, 2]))


@pytest.mark.parametrize("missing", ["warn", "error", "ignore"])
def test_unreached_sites(missing):
    reached, unreached = LinearQuantizer(8), LinearQuantizer(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with ff.estimate_ranges({"a": reached, "b": unreached}, missing=missing) as estimation:
                reached(torch.ones(2))
        except CalibrationError as error:
            assert missing == "error"
            assert "b" in str(error)
    assert estimation.unseen == ["b"]
    assert [w.category for w in caught] == ([QuantizationWarning] if missing == "warn" else [])
    assert reached.is_calibrated == (missing != "error")


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), QuantizerStub(), DynamicLinearQuantizer(8), []])
def test_nothing_to_observe(target):
    with pytest.raises(CalibrationError, match="no quantizer to observe"), ff.estimate_ranges(target):
        pass


def test_nesting_is_refused_and_leaves_the_outer_block_intact():
    quantizer = LinearQuantizer(8, symmetric=False)
    with ff.estimate_ranges(quantizer):
        quantizer(torch.tensor([-1.0, 1.0]))
        with (
            pytest.raises(CalibrationError, match="observed already"),
            ff.estimate_ranges([LinearQuantizer(4), quantizer]),
        ):
            pass
        quantizer(torch.tensor([3.0]))
    assert quantizer.quantization_range[1] == pytest.approx(3.0, rel=0.01)


def test_weights_are_observed_once_until_they_change():
    class Counting(MinMax):
        def update(self, x):
            self.count = getattr(self, "count", 0) + 1
            super().update(x)

    block, x = Block(), randn(2, 8)
    with ff.estimate_ranges(block, Counting) as estimation:
        for _ in range(3):
            block(x)
        counts = {name: observer.count for name, observer in estimation.observers.items()}
        assert counts == {"input_quantizer": 3, "weight_quantizer": 1}
        with torch.no_grad():
            block.weight.mul_(2)
        block(x)
        assert estimation.observers["weight_quantizer"].count == 2
    assert block.weight_quantizer.quantization_range[1].max() >= block.weight.max() * 0.99


def test_a_range_per_token_for_any_batch_size():
    quantizer = LinearQuantizer(8, symmetric=False, granularity=PerToken())
    with ff.estimate_ranges(quantizer):
        quantizer(randn(4, 3, 8))
        quantizer(randn(2, 3, 8, seed=2))
    x = randn(5, 3, 8, seed=3).clamp(-1, 1)
    assert quantizer.scale.shape == (1, 3)
    assert (quantizer(x) - x).abs().max() < quantizer.scale.max()
    assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))
    assert torch.equal(torch.compile(quantizer, backend="eager")(x), quantizer(x))


def test_tracking_simulates_and_freezes():
    """Quantization-aware training: ranges follow moving averages until they are frozen."""
    block, x = Block(4), randn(16, 8)
    tracking = track_ranges(block, MovingAverageMinMax, momentum=0.5)
    out = block(x)
    assert not torch.equal(out, x @ block.weight.t())
    first = block.input_quantizer.scale.item()
    block(x * 3)
    assert block.input_quantizer.scale.item() == pytest.approx(2 * first, rel=1e-5)
    tracking.freeze()
    block(x * 100)
    assert block.input_quantizer.scale.item() == pytest.approx(2 * first, rel=1e-5)
    assert not block.input_quantizer.overrides


def test_simulating_inside_estimate_ranges():
    quantizer, x = LinearQuantizer(2, symmetric=False), randn(16)
    with ff.estimate_ranges(quantizer, simulate=True):
        out = quantizer(x)
    assert torch.equal(out, quantizer(x))


def test_observing_in_a_compiled_model():
    block, x = Block(), randn(16, 8)
    compiled = torch.compile(block, backend="eager")
    compiled_block_inputs = [x, x * 2]
    with ff.estimate_ranges(compiled):
        for batch in compiled_block_inputs:
            compiled(batch)
    assert block.input_quantizer.quantization_range[1] == pytest.approx(2 * x.max().item(), rel=0.02)
    assert torch.equal(compiled(x), block(x))
