"""Bias correction: the mean error that quantization causes at a layer's output is taken off its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2, with
the means taken from calibration data. It acts on layers that have a bias.
"""

import torch
from torch import Tensor

from fastforward.calibration.linear_inputs import LinearInputs
from fastforward.calibration.samples import SampledCall
from fastforward.nn.quantizer import Quantizer


def linear_shift(inputs: LinearInputs, mean_output: Tensor) -> Tensor:
    """What to add to a linear layer's bias, ``[out_features]``.

    Args:
        inputs: The layer, quantized, and its sample.
        mean_output: The float layer's mean output without bias, from before its weight was changed.
    """
    weight: Tensor = inputs.layer.weight_quantizer(inputs.weight())
    return mean_output - inputs.quantized().mean(0) @ weight.t()


def conv_mean(call: SampledCall) -> Tensor:
    """Mean output of each channel of a convolution, ``[out_channels]``."""
    return _channel_mean(call.run())


def conv_shift(call: SampledCall, layer: torch.nn.Module, mean_output: Tensor) -> Tensor:
    """What to add to a convolution's bias, ``[out_channels]``.

    Args:
        call: A sampled call of the layer.
        layer: The layer with its calibrated quantizers.
        mean_output: What :func:`conv_mean` gave.
    """
    x, weight = call.arguments["input"], call.arguments["weight"]
    quantized: dict[str, Tensor] = {}
    for name, value in (("input", x), ("weight", weight)):
        quantizer = getattr(layer, f"{name}_quantizer", None)
        quantized[name] = quantizer(value) if isinstance(quantizer, Quantizer) else value
    return mean_output - _channel_mean(call.run(**quantized))


def _channel_mean(output: Tensor) -> Tensor:
    axes = [axis for axis in range(output.dim()) if axis != 1]
    return output.float().mean(axes)
