"""Quantized convolutions, plain and transposed, of one to three dimensions."""

from typing import Any

import torch

from fastforward.nn.module import QuantizedModule
from fastforward.nn.operands import add_operand_stubs, quantize_parameter
from fastforward.nn.quantizer import Quantizer
from fastforward.nn.simulated_weight import SimulatedWeight

_ROLES = ("input", "weight", "bias", "output")


class _QuantizedConv(QuantizedModule, include_in_module_map=False):
    """Operands of a convolution; the subclasses add the float class."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    bias_quantizer: Quantizer | None
    output_quantizer: Quantizer
    _operator = ""
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, self._operator, _ROLES)
        self._simulated_weight = SimulatedWeight()

    def _quantized_operands(
        self, input: torch.Tensor, here: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x = here.input_quantizer(input)
        weight = self._simulated_weight.get(self.weight_quantizer, self.weight)
        return x, weight, quantize_parameter(self.bias_quantizer, self.bias)


class _QuantizedForwardConv(_QuantizedConv, include_in_module_map=False):
    _conv_forward: Any

    def forward(self, input: torch.Tensor) -> Any:
        """Convolve ``[batch, in_channels, *size]``; the padding mode is applied to the quantized input."""
        if self._float_only:
            return super().forward(input)
        here = self.at_call()
        x, weight, bias = self._quantized_operands(input, here)
        return here.output_quantizer(self._conv_forward(x, weight, bias))


class QuantizedConv1d(_QuantizedForwardConv, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv1d"


class QuantizedConv2d(_QuantizedForwardConv, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv2d"


class QuantizedConv3d(_QuantizedForwardConv, torch.nn.Conv3d):
    """``torch.nn.Conv3d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv3d"


class _QuantizedTransposedConv(_QuantizedConv, include_in_module_map=False):
    _functional: Any = None
    _output_padding: Any
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> Any:
        """Convolve transposed; ``output_size`` picks the padding of the output as in torch."""
        if self._float_only or self.padding_mode != "zeros":
            return super().forward(input, output_size)
        here = self.at_call()
        x, weight, bias = self._quantized_operands(input, here)
        extra = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        function = type(self)._functional
        y = function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return here.output_quantizer(y)


class QuantizedConvTranspose1d(_QuantizedTransposedConv, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv_transpose1d"
    _functional = staticmethod(torch.nn.functional.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedTransposedConv, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv_transpose2d"
    _functional = staticmethod(torch.nn.functional.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedTransposedConv, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    _operator = "conv_transpose3d"
    _functional = staticmethod(torch.nn.functional.conv_transpose3d)
