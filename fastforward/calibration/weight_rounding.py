"""Weight rounding by error feedback: each weight's rounding error is made up for by those not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, section 3, on
the inputs as the quantized layer sees them. Where bias correction follows, the inputs' mean is taken out first: what
rounding does to it is a constant, which the bias then absorbs. Where nothing absorbs it, it counts.

Every output channel is judged first, by a rounding made without some of the rows, on those rows: where it comes out no
better than rounding to nearest, the channel is rounded to nearest.
"""

import warnings

import torch
from torch import Tensor

from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.exceptions import CalibrationError, QuantizationWarning
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.quantization.granularity import PerChannel, PerGroup, blocked

DAMPING = 0.2
"""Added to the diagonal of the inputs' covariance, relative to its mean: with a few thousand rows less overfits."""
_LARGEST_DAMPING = 1e6
_HELD_OUT = 4
"""One row in so many is kept for judging."""
_BLOCK = 64


def can_round(inputs: LinearInputs) -> bool:
    """Whether the layer's weight quantizer is one that error feedback knows: integers per output channel or group."""
    quantizer = inputs.layer.weight_quantizer
    known = isinstance(quantizer, LinearQuantizer) and isinstance(quantizer.granularity, (PerChannel, PerGroup))
    return known and quantizer.is_calibrated and inputs.rows.shape[0] >= 2 * _HELD_OUT


def round_weight(inputs: LinearInputs, damping: float = DAMPING, *, mean_absorbed: bool = False) -> Tensor:
    """Return a weight for the layer that lies on its quantizer's grid (times ``1 / smoothing``): same shape and dtype.

    Warns with QuantizationWarning, and rounds to nearest, where the sampled inputs allow no error feedback.

    Args:
        inputs: The layer and its sample.
        damping: See ``DAMPING``.
        mean_absorbed: A bias will take up the mean of the output's error.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    layer, weight, rows = inputs.layer, inputs.weight(), inputs.quantized()
    if not bool(torch.isfinite(rows).all() & torch.isfinite(weight).all()):
        msg = f"the sampled inputs of {inputs.path} are not finite: check the calibration data and the layers before it"
        raise CalibrationError(msg)
    rounded: Tensor = layer.weight_quantizer(weight)
    held_out = rows.shape[0] // _HELD_OUT
    trial, final = (
        rounded_on_grid(weight, seen, layer.weight_quantizer, damping, centred=mean_absorbed)
        for seen in (rows[held_out:], rows)
    )
    if trial is None or final is None:
        msg = f"the weight of {inputs.path} is rounded to nearest: its sampled inputs allow no error feedback"
        warnings.warn(msg, QuantizationWarning, stacklevel=2)
    else:
        exact = inputs.exact()
        costs = [_held_out_error(exact, rows, candidate, held_out, mean_absorbed) for candidate in (trial, rounded)]
        rounded = torch.where((costs[0] < costs[1])[:, None], final, rounded)
    smoothing = layer.smoothing
    return (rounded if smoothing is None else rounded / smoothing).to(layer.weight.dtype)


def _held_out_error(exact: Tensor, rows: Tensor, weight: Tensor, count: int, mean_absorbed: bool) -> Tensor:
    """Squared error of each output channel on the first ``count`` rows, ``[out]``; the bias is made from the others."""
    error = (rows @ weight.t()).sub_(exact)
    absorbed = error[count:].mean(0) if mean_absorbed else 0.0
    return (error[:count] - absorbed).square_().sum(0)


def rounded_on_grid(
    weight: Tensor, rows: Tensor, quantizer: object, damping: float = DAMPING, *, centred: bool = False
) -> Tensor | None:
    """Error feedback along the input features, those of largest variance first.

    Args:
        weight: ``[out, in]``, float32.
        rows: Inputs that the weight will multiply, ``[rows, in]``.
        quantizer: The calibrated quantizer of the weight.
        damping: See ``DAMPING``.
        centred: Whether the rows' mean does not matter.

    Returns:
        ``None`` if the rows say nothing about how errors add up.
    """
    assert isinstance(quantizer, LinearQuantizer)
    feedback = _feedback(rows - rows.mean(0) if centred else rows, damping)
    if feedback is None:
        return None
    order, upper = feedback
    scale, zero_point = (_per_element(p, weight, quantizer) for p in (quantizer.scale, quantizer.rounded_zero_point()))
    # One input feature a line, so that each step reads consecutive memory.
    work, scale, zero_point = (part.t()[order].contiguous() for part in (weight, scale, zero_point))
    rounded = torch.empty_like(work)
    for start in range(0, len(work), _BLOCK):
        end = min(start + _BLOCK, len(work))
        errors = torch.empty_like(work[start:end])
        for line in range(start, end):
            rounded[line] = quantizer.grid.round(work[line], scale[line], zero_point[line])
            errors[line - start] = (work[line] - rounded[line]) / upper[line, line]
            work[line + 1 : end].addr_(upper[line, line + 1 : end], errors[line - start], alpha=-1)
        work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return rounded[order.argsort()].t().contiguous()


def _per_element(parameter: Tensor, weight: Tensor, quantizer: LinearQuantizer) -> Tensor:
    granularity = quantizer.granularity
    blocks = blocked(weight, granularity.block_size(weight.shape))
    return granularity.spread(parameter.detach(), weight.shape).expand_as(blocks).reshape(weight.shape)


def _feedback(rows: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """The order of the features, and the upper Cholesky factor of the inverse of their damped second moments.

    The damping grows until the factorization succeeds; ``None`` if it never does, or if the rows are all zero.
    """
    rows = rows.double()  # the spread of real features is wider than the square root of float32's precision
    moments = rows.t() @ rows
    average = moments.diagonal().mean()
    if not bool(average > 0):
        return None
    moments /= average
    order = moments.diagonal().argsort(descending=True)
    moments = moments[order][:, order]
    while damping <= _LARGEST_DAMPING:
        damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        # M M^T with M upper triangular, from the factors of the matrix read backwards; then the inverse is U^T U.
        lower, failure = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failure):
            unit = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
            return order, upper.to(torch.float32)
        damping = max(10 * damping, 1e-6)
    return None
