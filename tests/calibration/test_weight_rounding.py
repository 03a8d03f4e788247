"""Weight rounding and bias correction never cost a layer's output more than rounding to nearest does."""

import warnings

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.calibration.bias_correction import helpful_mean
from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.calibration.weight_rounding import round_weight
from fastforward.selection import schemes


def correlated(rows: int = 512, shift: float = 0.0) -> torch.Tensor:
    mixing = torch.randn(32, 32) * torch.logspace(0, -2, 32)
    return torch.randn(rows, 32) @ mixing + shift * torch.randn(32)


def layer_of(weight: torch.Tensor, bits: int = 4, *, bias: bool = False) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data = weight
    ff.quantize_model(layer)
    layer.weight_quantizer = ff.nn.LinearQuantizer(bits, granularity=ff.PerChannel(0), allow_one_sided=False)
    with ff.estimate_ranges(layer.weight_quantizer, ff.observers.MinMax):
        layer.weight_quantizer(layer.weight)
    return layer


@pytest.mark.parametrize("shift", [0.0, 4.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [("round_weights",), ("round_weights", "correct_bias")], ids="+".join)
@pytest.mark.parametrize("scheme", ["w4", "w4_g32", "w4a8", "w4a4", "w4a8_dynamic"])
def test_steps_lower_the_error_on_rows_they_have_not_seen(
    scheme: str, steps: tuple[str, ...], bias: bool, shift: float
) -> None:
    """Also without a bias to absorb the mean of the error, and without the step that would let it."""
    x, float_layer, errors = correlated(1024, shift), nn.Linear(32, 16, bias=bias).requires_grad_(False), []
    for chosen in ((), steps):
        layer = nn.Linear(32, 16, bias=bias).requires_grad_(False)
        layer.load_state_dict(float_layer.state_dict())
        changed = schemes.get(scheme).with_changes(steps=chosen)
        ff.quantize(layer, [x[:256], x[256:512]], scheme=changed, progress=False)
        errors.append(float((layer(x[512:]) - float_layer(x[512:])).square().mean()))
    assert errors[1] < errors[0]


def test_channels_that_other_rows_speak_against_are_rounded_to_nearest() -> None:
    weight = torch.randn(64, 32)
    mixed = torch.cat([torch.randn(16, 32) * 20, correlated(48)])  # the first quarter judges
    layer = layer_of(weight.clone())
    inputs = LinearInputs("layer", layer, mixed)
    nearest, rounded = layer.weight_quantizer(weight), round_weight(inputs)
    kept = (rounded == nearest).all(1)
    assert 0 < int(kept.sum())
    error = [((mixed[:16] @ (w - weight).t()) ** 2).sum(0) for w in (rounded, nearest)]
    assert float(error[0].sum()) <= float(error[1].sum())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_size_of_the_inputs_does_not_matter(size: float) -> None:
    weight, rows = torch.randn(8, 32), correlated()
    expected = round_weight(LinearInputs("layer", layer_of(weight.clone()), rows))
    rounded = round_weight(LinearInputs("layer", layer_of(weight.clone()), rows * size))
    assert (rounded == expected).float().mean() > 0.99
    assert not torch.equal(rounded, layer_of(weight.clone()).weight_quantizer(weight))


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize(
    "rows",
    [torch.ones(64, 1) * torch.arange(1.0, 33), torch.eye(32)[:1].expand(64, 32), torch.randn(8, 32).repeat(8, 1)],
    ids=["constant", "one feature", "fewer rows than features"],
)
def test_damping_grows_until_the_moments_can_be_factored(rows: torch.Tensor, damping: float) -> None:
    weight = torch.randn(8, 32)
    layer = layer_of(weight.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded = round_weight(LinearInputs("layer", layer, rows), damping)
    torch.testing.assert_close(layer.weight_quantizer(rounded), rounded)
    nearest = layer.weight_quantizer(weight)
    assert ((rows @ (rounded - weight).t()) ** 2).sum() <= ((rows @ (nearest - weight).t()) ** 2).sum()


@pytest.mark.parametrize("mean_absorbed", [False, True])
def test_inputs_that_say_nothing_are_reported_and_the_weight_is_rounded_to_nearest(mean_absorbed: bool) -> None:
    weight = torch.randn(8, 32)
    layer = layer_of(weight.clone(), bias=True)
    with pytest.warns(ff.QuantizationWarning, match="weight of decoder.fc is rounded to nearest"):
        rounded = round_weight(LinearInputs("decoder.fc", layer, torch.zeros(64, 32)), mean_absorbed=mean_absorbed)
    assert torch.equal(rounded, layer.weight_quantizer(weight))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (torch.full((4, 2), 0.5), [0.5, 0.5]),
        (torch.tensor([[1.0, 1.0], [-1.0, 1.5]]), [0.0, 1.25]),
        (torch.tensor([[3.0, 0.1], [-1.0, 0.1], [-1.0, 0.1]]), [0.0, 0.1]),
        (torch.tensor([[2.0, 0.0]]), [0.0, 0.0]),
    ],
    ids=["constant", "noise beside a mean", "one outlier", "a single sample tells nothing"],
)
def test_a_mean_is_taken_off_where_the_samples_agree_on_it(errors: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(helpful_mean(errors), torch.tensor(expected))
