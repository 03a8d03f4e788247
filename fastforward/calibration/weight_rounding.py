"""Weight rounding by error feedback: each weight's rounding error is made up for by those not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, section 3, on
the inputs as the quantized layer sees them. Their mean is taken out first: what rounding does to it is a constant,
which bias correction removes.
"""

import torch
from torch import Tensor

from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.exceptions import CalibrationError
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.quantization.granularity import PerChannel, PerGroup, blocked

DAMPING = 0.2
"""Added to the diagonal of the inputs' covariance, relative to its mean: with a few thousand rows less overfits."""
_BLOCK = 64
_ROUNDOFF = 1e-6  # what is left of constant inputs once their mean is taken out


def can_round(inputs: LinearInputs) -> bool:
    """Whether the layer's weight quantizer is one that error feedback knows: integers per output channel or group."""
    quantizer = inputs.layer.weight_quantizer
    known = isinstance(quantizer, LinearQuantizer) and isinstance(quantizer.granularity, (PerChannel, PerGroup))
    return known and quantizer.is_calibrated and inputs.rows.shape[0] > 1


def round_weight(inputs: LinearInputs, damping: float = DAMPING) -> Tensor:
    """Return a weight for the layer that lies on its quantizer's grid (times ``1 / smoothing``): same shape and dtype.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    layer = inputs.layer
    rounded = rounded_on_grid(inputs.weight(), inputs.quantized(), layer.weight_quantizer, damping)
    if not bool(torch.isfinite(rounded).all()):
        msg = f"the sampled inputs of {inputs.path} are not finite: check the calibration data and the layers before it"
        raise CalibrationError(msg)
    smoothing = layer.smoothing
    return (rounded if smoothing is None else rounded / smoothing).to(layer.weight.dtype)


def rounded_on_grid(weight: Tensor, rows: Tensor, quantizer: object, damping: float = DAMPING) -> Tensor:
    """Error feedback along the input features, those of largest variance first.

    Args:
        weight: ``[out, in]``, float32.
        rows: Inputs that the weight will multiply, ``[rows, in]``.
        quantizer: The calibrated quantizer of the weight.
        damping: See ``DAMPING``.
    """
    assert isinstance(quantizer, LinearQuantizer)
    scale, zero_point = (_per_element(p, weight, quantizer) for p in (quantizer.scale, quantizer.rounded_zero_point()))
    order, upper = _feedback(rows, damping)
    work, scale, zero_point = (part[:, order].clone() for part in (weight, scale, zero_point))
    rounded = torch.empty_like(work)
    for start in range(0, work.shape[1], _BLOCK):
        end = min(start + _BLOCK, work.shape[1])
        errors = torch.empty(work.shape[0], end - start, device=work.device)
        for column in range(start, end):
            value = work[:, column]
            rounded[:, column] = quantizer.grid.round(value, scale[:, column], zero_point[:, column])
            errors[:, column - start] = (value - rounded[:, column]) / upper[column, column]
            work[:, column + 1 : end] -= torch.outer(errors[:, column - start], upper[column, column + 1 : end])
        work[:, end:] -= errors @ upper[start:end, end:]
    return rounded[:, order.argsort()]


def _per_element(parameter: Tensor, weight: Tensor, quantizer: LinearQuantizer) -> Tensor:
    granularity = quantizer.granularity
    blocks = blocked(weight, granularity.block_size(weight.shape))
    return granularity.spread(parameter.detach(), weight.shape).expand_as(blocks).reshape(weight.shape)


def _feedback(rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The order of the features, and the upper Cholesky factor of the inverse of their damped covariance."""
    centred = rows - rows.mean(0)
    covariance = centred.t() @ centred
    diagonal = covariance.diagonal()
    diagonal += torch.maximum(damping * diagonal.mean(), _ROUNDOFF * rows.square().sum(0).mean()).clamp_min(_ROUNDOFF)
    order = diagonal.argsort(descending=True)
    covariance = covariance[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return order, torch.linalg.cholesky(inverse, upper=True)
