"""Quantizers that stay outside of integer layers: made fast, and able to take codes from the layer before them.

The operands of an attention product, for example, are quantized in the middle of the user's function. The product
itself stays float, but the linear layer that computes its operand can store codes on the quantizer's grid, and a plain
tensor is rounded by torch's fused operators.
"""

import dataclasses
from typing import Any

import torch
from fastforward_kernels.ops_chain import ROUND_TO_GRID

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer.deferred import Deferred
from fastforward.integer.finite import is_ordinary
from fastforward.integer.grid import Grid, grid_of, quantize_dequantize
from fastforward.integer.tracing import fuses
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer


@dataclasses.dataclass(eq=False)
class IslandRounding:
    """Stands in for a quantizer's ``simulate`` after conversion; bit-equal to it."""

    quantizer: LinearQuantizer
    grid: Grid
    version: int | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Round ``x`` to the quantizer's grid."""
        if torch.compiler.is_compiling():  # a compiler cannot read version counters
            if fuses(x.device.type) and x.dtype == torch.float32 and not x.requires_grad:
                step, lowest = self.quantizer.scale, self.quantizer.quant_min
                zero_point = self.quantizer.rounded_zero_point() - lowest
                return ROUND_TO_GRID(x, step, step.reciprocal(), zero_point, self.grid.highest)
            return type(self.quantizer).simulate(self.quantizer, x)
        if self._stale():
            return type(self.quantizer).simulate(self.quantizer, x)
        if type(x) is Deferred:
            return x.rounded(self.grid)
        if x.dtype != torch.float32 or x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return type(self.quantizer).simulate(self.quantizer, x)
        if not is_ordinary(x, self.grid.scale):
            return type(self.quantizer).simulate(self.quantizer, x)  # NaN stays NaN
        return quantize_dequantize(x, self.grid)

    def _stale(self) -> bool:
        """Whether the quantizer has got another range since."""
        if self.version is None and grid_of(self.quantizer).key() == self.grid.key():
            self.version = self.quantizer.scale._version
        return self.quantizer.scale._version != self.version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "version": None}  # a copy's scale counts its changes anew


def speed_up(quantizer: Quantizer) -> None:
    """Let an active 8-bit quantizer round by codes; one of another kind is left as it is."""
    if not isinstance(quantizer, LinearQuantizer) or "simulate" in quantizer.__dict__ or quantizer.scale.requires_grad:
        return
    try:
        grid = grid_of(quantizer)
    except UnsupportedOperatorError:
        return
    if grid.highest == 255 and not quantizer.scale.is_inference():
        rounding: Any = IslandRounding(quantizer, grid, quantizer.scale._version)
        object.__setattr__(quantizer, "simulate", rounding)
