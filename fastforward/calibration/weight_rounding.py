"""Weight rounding by error feedback: each weight's rounding error is made up for by those not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, section 3, on
the inputs as the quantized layer sees them. Where bias correction follows, the inputs' mean is taken out first: what
rounding does to it is a constant, which the bias then absorbs. Where nothing absorbs it, it counts.

Every output channel is judged first, by a rounding made without some of the rows, on those rows: where it comes out no
better than rounding to nearest, the channel is rounded to nearest.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastforward.calibration.error_feedback import Feedback, LastFeedback
from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.exceptions import CalibrationError, QuantizationWarning
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.quantization.granularity import PerChannel, PerGroup

DAMPING = 0.2
"""Added to the diagonal of the inputs' covariance, relative to its mean: with a few thousand rows less overfits."""
_HELD_OUT = 4
"""One row in so many is kept for judging."""
_TOGETHER = 8
"""Lines whose errors are passed on one by one."""


def can_round(inputs: LinearInputs) -> bool:
    """Whether the layer's weight quantizer is one that error feedback knows: integers per output channel or group."""
    quantizer = inputs.layer.weight_quantizer
    known = isinstance(quantizer, LinearQuantizer) and isinstance(quantizer.granularity, (PerChannel, PerGroup))
    return known and quantizer.is_calibrated and inputs.rows.shape[0] >= 2 * _HELD_OUT


def round_weight(
    inputs: LinearInputs, damping: float = DAMPING, *, mean_absorbed: bool = False, last: LastFeedback | None = None
) -> Tensor:
    """Return a weight for the layer that lies on its quantizer's grid (times ``1 / smoothing``): same shape and dtype.

    Warns with QuantizationWarning, and rounds to nearest, where the sampled inputs allow no error feedback.

    Args:
        inputs: The layer and its sample.
        damping: See ``DAMPING``.
        mean_absorbed: A bias will take up the mean of the output's error.
        last: Remembers what the inputs say, for the next layer that reads the same.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    layer, weight, rows = inputs.layer, inputs.weight(), inputs.quantized()
    if not bool(torch.isfinite(rows).all() & torch.isfinite(weight).all()):
        msg = f"the sampled inputs of {inputs.path} are not finite: check the calibration data and the layers before it"
        raise CalibrationError(msg)
    rounded: Tensor = layer.weight_quantizer(weight)
    held_out = rows.shape[0] // _HELD_OUT
    known = (last or LastFeedback()).get(rows, held_out, damping, centred=mean_absorbed)
    if known is None:
        msg = f"the weight of {inputs.path} is rounded to nearest: its sampled inputs allow no error feedback"
        warnings.warn(msg, QuantizationWarning, stacklevel=2)
    else:
        without, of_all = known
        trial = rounded_on_grid(weight, without, layer.weight_quantizer)
        better = _better(trial, rounded, inputs, rows, held_out, mean_absorbed)
        del trial
        final = rounded_on_grid(weight, of_all, layer.weight_quantizer)
        rounded = torch.where(better[:, None], final, rounded)
    smoothing = layer.smoothing
    return (rounded if smoothing is None else rounded / smoothing).to(layer.weight.dtype)


def _better(
    trial: Tensor, rounded: Tensor, inputs: LinearInputs, rows: Tensor, held_out: int, mean_absorbed: bool
) -> Tensor:
    """Of which output channels ``trial`` makes a smaller error on the held-out rows, ``[out]``."""
    given, quantized = (_away(part, held_out) if mean_absorbed else part[:held_out] for part in (inputs.rows, rows))
    exact = given.float() @ inputs.layer.weight.detach().float().t()
    errors = [(quantized @ weight.t()).sub_(exact).square_().sum(0) for weight in (trial, rounded)]
    return errors[0] < errors[1]


def _away(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows, less the mean of the others: a bias takes up the mean of the error that those show."""
    return rows[:count].float() - rows[count:].mean(0, dtype=torch.float32)


def rounded_on_grid(weight: Tensor, known: Feedback, quantizer: object) -> Tensor:
    """Error feedback along the input features.

    Args:
        weight: ``[out, in]``, float32.
        known: What the inputs say.
        quantizer: The calibrated quantizer of the weight.
    """
    assert isinstance(quantizer, LinearQuantizer)
    rounding = _rounding_of_lines(quantizer, weight.shape, known.order)
    # One input feature a line, so that each step reads consecutive memory; transposed first, which whole lines follow.
    lines = weight.t().contiguous()[known.order]
    start, caused = 0, None
    for block in known.blocks:
        end = start + len(block.within)
        errors = lines[start:end].clone()  # of lines not rounded yet: the values that they should have
        if block.carried is not None and caused is not None:
            errors.addmm_(block.carried.t(), caused)
        _round_lines(lines[start:end].unbind(), errors, block.within, rounding[start:end])
        if block.inputs is not None:
            caused = block.inputs @ errors if caused is None else caused.addmm_(block.inputs, errors)
        start = end
    return lines[known.order.argsort()].t().contiguous()


def _round_lines(
    lines: Sequence[Tensor], errors: Tensor, within: Tensor, rounding: Sequence[Callable[[Tensor], Tensor]]
) -> None:
    """Replace ``lines`` by what they are rounded to, and ``errors``, the values they should have, by what that costs.

    By halves, so that nearly all that errors do to later values is done by large products.
    """
    if len(lines) > _TOGETHER:
        half = len(lines) // 2
        _round_lines(lines[:half], errors[:half], within[:half, :half], rounding[:half])
        errors[half:].addmm_(within[:half, half:].t(), errors[:half])
        _round_lines(lines[half:], errors[half:], within[half:, half:], rounding[half:])
        return
    for number, (line, error, round_line) in enumerate(zip(lines, errors.unbind(), rounding, strict=True), start=1):
        rounded = round_line(error)
        torch.sub(line, rounded, out=error)
        line.copy_(rounded)
        if number < len(lines):
            errors[number:].addr_(within[number - 1, number:], error)


def _rounding_of_lines(
    quantizer: LinearQuantizer, shape: torch.Size, order: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """How the input features ``order`` of a weight of ``shape`` are rounded, ``[out]`` each."""
    spread = (
        quantizer.granularity.spread(parameter.detach(), shape)
        for parameter in (quantizer.scale, quantizer.rounded_zero_point().float())
    )
    groups = [parameter.reshape(parameter.shape[0], -1).t().contiguous().unbind() for parameter in spread]
    size = shape[1] // len(groups[0])
    ways = [
        functools.partial(quantizer.grid.round, scale=scale, zero_point=zero_point)
        for scale, zero_point in zip(*groups, strict=True)
    ]
    return [ways[group] for group in (order // size).tolist()]
