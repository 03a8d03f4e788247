"""Bias correction: the mean error that quantization causes at a layer's output is taken off its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2, with
the means taken from calibration data. It acts on layers that have a bias, and on those channels where the mean of the
other samples would have lowered the error of each sample left out.
"""

import torch
from torch import Tensor

from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.calibration.samples import SampledCall
from fastforward.nn.quantizer import Quantizer


def linear_shift(inputs: LinearInputs, exact: Tensor) -> Tensor:
    """What to add to a linear layer's bias, ``[out_features]``.

    Args:
        inputs: The layer, quantized, and its sample.
        exact: The float layer's output without bias, from before its weight was changed, ``[rows, out_features]``.
    """
    weight: Tensor = inputs.layer.weight_quantizer(inputs.weight())
    return helpful_mean(exact - inputs.quantized() @ weight.t())


def conv_shift(call: SampledCall, layer: torch.nn.Module) -> Tensor:
    """What to add to a convolution's bias, ``[out_channels]``.

    Args:
        call: A sampled call of the layer.
        layer: The layer with its calibrated quantizers.
    """
    quantized: dict[str, Tensor] = {}
    for name in ("input", "weight"):
        quantizer = getattr(layer, f"{name}_quantizer", None)
        value = call.arguments[name]
        quantized[name] = quantizer(value) if isinstance(quantizer, Quantizer) else value
    error = call.run().float() - call.run(**quantized).float()
    channels = error.flatten(2) if error.dim() > 2 else error[..., None]
    # Places of one image are alike, so whole images are left out, as long as there are several.
    samples = channels.mean(2) if len(channels) > 1 else channels[0].t()
    return helpful_mean(samples)


def helpful_mean(errors: Tensor) -> Tensor:
    """The mean of ``errors`` (``[samples, channels]``) where taking it off pays, zero elsewhere: ``[channels]``.

    It pays where the mean of the other samples lowers the squared error of each sample left out, summed over all.
    """
    count = len(errors)
    total, squares = errors.sum(0, dtype=torch.float64), errors.square().sum(0, dtype=torch.float64)
    # With others = (total - error) / (count - 1), the sum of others * (2 * error - others): no others are made.
    left = max(count - 1, 1)
    gain = 2 * (total**2 - squares) / left - ((count - 2) * total**2 + squares) / left**2
    mean = (total / count).to(errors.dtype)
    return torch.where(gain > 0, mean, torch.zeros_like(mean))
