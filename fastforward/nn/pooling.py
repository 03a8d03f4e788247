"""Quantized average pooling; maximum pooling moves values and needs no quantizer of its own."""

import torch

from fastforward.nn.unary import QuantizedUnary


class QuantizedAvgPool1d(QuantizedUnary, torch.nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "avg_pool1d"


class QuantizedAvgPool2d(QuantizedUnary, torch.nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "avg_pool2d"


class QuantizedAvgPool3d(QuantizedUnary, torch.nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "avg_pool3d"


class QuantizedAdaptiveAvgPool1d(QuantizedUnary, torch.nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "adaptive_avg_pool1d"


class QuantizedAdaptiveAvgPool2d(QuantizedUnary, torch.nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "adaptive_avg_pool2d"
