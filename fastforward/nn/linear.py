"""QuantizedLinear: ``torch.nn.Linear`` with a quantizer for each operand and for the output."""

import torch

from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.module import QuantizedModule
from fastforward.nn.one_pass import LastInput
from fastforward.nn.operands import add_operand_stubs, quantize_parameter
from fastforward.nn.quantizer import Quantizer
from fastforward.nn.simulated_weight import SimulatedWeight


class QuantizedLinear(QuantizedModule, torch.nn.Linear):
    """Linear layer, ``y = x W^T + b``, on quantized operands.

    Attributes:
        input_quantizer, weight_quantizer, bias_quantizer, output_quantizer: Stubs until replaced;
            ``bias_quantizer`` is ``None`` in a layer without bias.
        smoothing: ``None``, or a float tensor of shape ``[in_features]``. The input is divided by it and the columns of
            the weight are multiplied by it before either is quantized, which moves outliers from activations to
            weights (Xiao et al., "SmoothQuant", 2023, equation 3). With stubs only it has no effect.
    """

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    bias_quantizer: Quantizer | None
    output_quantizer: Quantizer
    smoothing: torch.Tensor | None
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, "linear", ("input", "weight", "bias", "output"))
        self.register_buffer("smoothing", None)
        self._simulated_weight = SimulatedWeight()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if self._float_only:  # the same as in torch.nn.Linear, a call less
            return torch.nn.functional.linear(input, self.weight, self.bias)
        here, smoothing = self.at_call(), self.smoothing
        x = _simulated(here.input_quantizer, input, smoothing)
        weight = self._simulated_weight.get(self.weight_quantizer, self.weight, smoothing)
        bias = quantize_parameter(self.bias_quantizer, self.bias)
        y: torch.Tensor = here.output_quantizer(torch.nn.functional.linear(x, weight, bias))
        return y


_last = LastInput()


def _simulated(quantizer: Quantizer, input: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
    """``quantizer(input / smoothing)``, which the caller keeps to itself."""
    if smoothing is None:
        x: torch.Tensor = quantizer(input)
        return x
    # Multiplied by the reciprocal, not divided: integer layers do the same and round alike.
    factor = smoothing.reciprocal()
    if type(quantizer) is LinearQuantizer and quantizer.is_plain():
        grid = quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
        known = _last.rounded(quantizer, input, factor, grid)
        if known is not None:
            return known
    # The factor is float32: what is rounded is not rounded to a lower precision before.
    x = quantizer(input * factor).to(input.dtype)
    return x
