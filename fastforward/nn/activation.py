"""Quantized activation layers."""

import torch

from fastforward.nn.unary import QuantizedUnary


class QuantizedReLU(QuantizedUnary, torch.nn.ReLU):
    """``torch.nn.ReLU`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "relu"


class QuantizedReLU6(QuantizedUnary, torch.nn.ReLU6):
    """``torch.nn.ReLU6`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "relu6"


class QuantizedLeakyReLU(QuantizedUnary, torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "leaky_relu"


class QuantizedELU(QuantizedUnary, torch.nn.ELU):
    """``torch.nn.ELU`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "elu"


class QuantizedGELU(QuantizedUnary, torch.nn.GELU):
    """``torch.nn.GELU`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "gelu"


class QuantizedSiLU(QuantizedUnary, torch.nn.SiLU):
    """``torch.nn.SiLU`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "silu"


class QuantizedMish(QuantizedUnary, torch.nn.Mish):
    """``torch.nn.Mish`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "mish"


class QuantizedSigmoid(QuantizedUnary, torch.nn.Sigmoid):
    """``torch.nn.Sigmoid`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "sigmoid"


class QuantizedTanh(QuantizedUnary, torch.nn.Tanh):
    """``torch.nn.Tanh`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "tanh"


class QuantizedHardtanh(QuantizedUnary, torch.nn.Hardtanh):
    """``torch.nn.Hardtanh`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "hardtanh"


class QuantizedHardswish(QuantizedUnary, torch.nn.Hardswish):
    """``torch.nn.Hardswish`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "hardswish"


class QuantizedHardsigmoid(QuantizedUnary, torch.nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "hardsigmoid"


class QuantizedSoftmax(QuantizedUnary, torch.nn.Softmax):
    """``torch.nn.Softmax`` with ``input_quantizer`` and ``output_quantizer``."""

    _operator = "softmax"
