"""The base of quantized layers with one tensor in, one out and no parameters."""

from typing import Any

import torch

from fastforward.nn.module import QuantizedModule
from fastforward.nn.operands import add_operand_stubs
from fastforward.nn.quantizer import Quantizer


class QuantizedUnary(QuantizedModule, include_in_module_map=False):
    """``input_quantizer``, the float class's forward, ``output_quantizer``.

    A subclass names the float class as its second base and, in ``_operator``, the row of the operator table.
    """

    input_quantizer: Quantizer
    output_quantizer: Quantizer
    _operator = ""
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, self._operator, ("input", "output"))

    def forward(self, input: torch.Tensor) -> Any:
        """As in the float class; an ``inplace`` layer still changes the tensor it was given."""
        if self._float_only:
            return super().forward(input)
        here = self.at_call()
        x = here.input_quantizer(input)
        y = super().forward(x)
        if x is not input and getattr(self, "inplace", False):
            input.copy_(y)
        return here.output_quantizer(y)
