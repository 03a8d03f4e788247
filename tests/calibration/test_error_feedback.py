"""Error feedback without an inverse, and without second moments where rows are few, is what the definition says."""

import pytest
import torch

import fastforward as ff
from fastforward.calibration.error_feedback import LastFeedback, feedback
from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.calibration.weight_rounding import DAMPING, round_weight, rounded_on_grid
from fastforward.quantization.granularity import Granularity

FEATURES = 300
"""More than one panel of second moments, no multiple of a block."""
MANY, FEW = 400, 80


def sample(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) * torch.logspace(0, -2, FEATURES)
    return torch.randn(rows, FEATURES, generator=generator) @ mixing + torch.randn(FEATURES, generator=generator)


def weight_and_quantizer(granularity: Granularity) -> tuple[torch.Tensor, ff.nn.LinearQuantizer]:
    weight = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(0))
    quantizer = ff.nn.LinearQuantizer(4, granularity=granularity, symmetric=False)
    with ff.estimate_ranges(quantizer, ff.observers.MinMax):
        quantizer(weight)
    return weight, quantizer


def by_definition(
    weight: torch.Tensor, rows: torch.Tensor, quantizer: ff.nn.LinearQuantizer, centred: bool
) -> torch.Tensor:
    """Frantar et al. 2023, algorithm 1, one feature after another, in float64."""
    rows = rows.double() - rows.double().mean(0) * centred
    moments = rows.t() @ rows
    order = moments.diagonal().argsort(descending=True, stable=True)
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(FEATURES, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work, rounded = weight.double()[:, order], torch.empty(weight.shape)
    for line, feature in enumerate(order.tolist()):
        column = weight.clone()
        column[:, feature] = work[:, line]
        rounded[:, feature] = quantizer(column)[:, feature]
        error = (work[:, line] - rounded[:, feature]) / upper[line, line]
        work[:, line + 1 :] -= error[:, None] * upper[line, line + 1 :]
    return rounded


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("granularity", [ff.PerChannel(0), ff.PerGroup(50)], ids=str)
@pytest.mark.parametrize("rows", [MANY, FEW])
def test_weights_are_those_of_the_definition(rows: int, granularity: Granularity, centred: bool) -> None:
    x, (weight, quantizer) = sample(rows), weight_and_quantizer(granularity)
    found = feedback(x, rows // 4, DAMPING, centred=centred)
    assert found is not None
    assert len(found[1].blocks) == (1 if rows == MANY else 5)
    for known, seen in zip(found, (x[rows // 4 :], x), strict=True):
        expected = by_definition(weight, seen, quantizer, centred)
        torch.testing.assert_close(rounded_on_grid(weight, known, quantizer), expected)
        assert not torch.allclose(expected, quantizer(weight))


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_layers_that_read_the_same_share_the_factor_and_get_the_weights_they_get_alone(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(*args: object, **options: object) -> object:
        made.append(args)
        return feedback(*args, **options)  # type: ignore[arg-type]

    def inputs(seed: int, x: torch.Tensor) -> LinearInputs:
        layer = torch.nn.Linear(FEATURES, 16, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(seed)))
        ff.quantize_model(layer)
        layer.weight_quantizer = ff.nn.LinearQuantizer(4, granularity=ff.PerChannel(0))
        with ff.estimate_ranges(layer.weight_quantizer, ff.observers.MinMax):
            layer.weight_quantizer(layer.weight)
        return LinearInputs("layer", layer, x)

    monkeypatch.setattr("fastforward.calibration.error_feedback.feedback", counted)
    x, last = sample(rows), LastFeedback()
    together = [round_weight(inputs(seed, x.clone()), last=last) for seed in range(3)]
    assert len(made) == 1
    assert all(torch.equal(round_weight(inputs(seed, x)), each) for seed, each in enumerate(together))
    other = round_weight(inputs(0, x * torch.linspace(1, 2, FEATURES)), last=last)
    assert not torch.equal(other, together[0])
