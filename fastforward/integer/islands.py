"""Quantizers that stay outside of integer layers: made fast, and able to take codes from the layer before them.

The operands of an attention product, for example, are quantized in the middle of the user's function. The product
itself stays float, but the linear layer that computes its operand can store codes on the quantizer's grid, and a plain
tensor is rounded by torch's fused operators.
"""

import dataclasses
import math
from typing import Any

import torch
from fastforward_kernels.ops_chain import ROUND_TO_GRID

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer.deferred import Deferred, Usage
from fastforward.integer.finite import is_ordinary
from fastforward.integer.grid import LEVELS, Grid, grid_of, quantize_dequantize
from fastforward.integer.rounding import quantize_uint8
from fastforward.integer.tracing import fuses
from fastforward.nn.dynamic_quantizer import DynamicLinearQuantizer
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.granularity import PerTensor


@dataclasses.dataclass(eq=False)
class IslandRounding:
    """Stands in for a quantizer's ``simulate`` after conversion; bit-equal to it.

    With ``usage`` it rounds to codes, because an integer product may be what takes them, as long as that pays.
    """

    quantizer: LinearQuantizer
    grid: Grid
    version: int | None
    usage: Usage | None = None

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
        if not _is_plain(x):
            return type(self.quantizer).simulate(self.quantizer, x)
        if not is_ordinary(x, self.grid.scale):
            return type(self.quantizer).simulate(self.quantizer, x)  # NaN stays NaN
        if self.usage is not None and self.usage.pays():
            codes = quantize_uint8(x, self.grid.scale, self.grid.zero_point)
            return Deferred.of_codes(codes, self.grid, x.dtype, self.usage)
        return quantize_dequantize(x, self.grid.scale, self.grid.zero_point)

    def _stale(self) -> bool:
        """Whether the quantizer has got another range since."""
        if self.version is None and grid_of(self.quantizer).key() == self.grid.key():
            self.version = self.quantizer.scale._version
        return self.quantizer.scale._version != self.version

    def __getstate__(self) -> dict[str, Any]:
        # A copy's scale counts its changes anew, and a copy learns for itself what becomes of its results.
        return {**self.__dict__, "version": None, "usage": None if self.usage is None else Usage()}


@dataclasses.dataclass(eq=False)
class DynamicIslandRounding:
    """The same for a quantizer with one grid per tensor, which it takes from the tensor's own range."""

    quantizer: DynamicLinearQuantizer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Round ``x`` to a grid of its own."""
        quantizer, compiling = self.quantizer, torch.compiler.is_compiling()
        if type(x) is Deferred or not _is_plain(x) or not x.numel() or (compiling and not fuses("cpu")):
            return type(quantizer).simulate(quantizer, x)
        scale, zero_point = quantizer.parameters_for(x)
        if compiling:
            highest = quantizer.quant_max - quantizer.quant_min
            return ROUND_TO_GRID(x, scale, scale.reciprocal(), zero_point - quantizer.quant_min, highest)
        step = float(scale)
        if not math.isfinite(step):
            return type(quantizer).simulate(quantizer, x)  # NaN stays NaN
        return quantize_dequantize(x, step, int(zero_point) - quantizer.quant_min)


def _is_plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def speed_up(quantizer: Quantizer) -> None:
    """Let an active 8-bit quantizer round by codes; one of another kind is left as it is."""
    if "simulate" in quantizer.__dict__:
        return
    rounding: Any = None
    if isinstance(quantizer, LinearQuantizer):
        rounding = _static(quantizer)
    elif type(quantizer) is DynamicLinearQuantizer and _has_one_grid(quantizer):
        rounding = DynamicIslandRounding(quantizer)
    if rounding is not None:
        object.__setattr__(quantizer, "simulate", rounding)


def _static(quantizer: LinearQuantizer) -> IslandRounding | None:
    if quantizer.scale.requires_grad or quantizer.scale.is_inference():
        return None
    try:
        grid = grid_of(quantizer)
    except UnsupportedOperatorError:
        return None
    return IslandRounding(quantizer, grid, quantizer.scale._version) if grid.highest == LEVELS - 1 else None


def _has_one_grid(quantizer: DynamicLinearQuantizer) -> bool:
    """Whether the quantizer takes one grid of 256 integers from the range of each tensor."""
    levels = quantizer.quant_max - quantizer.quant_min + 1
    per_tensor = isinstance(quantizer.granularity, PerTensor)
    return per_tensor and levels == LEVELS and quantizer.parameter_inference_fn is None
