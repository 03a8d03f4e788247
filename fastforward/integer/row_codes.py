"""Codes of activations on a grid that each row, or each tensor, gets from its own range when it arrives."""

import dataclasses
import functools
from typing import NamedTuple

import torch
from fastforward_kernels.cpu_sweep import scratch

from fastforward.integer.grid import LEVELS, in_blocks
from fastforward.integer.rounding import integers
from fastforward.quantization.affine import AffineGrid
from fastforward.quantization.granularity import Granularity, min_max


class RowCodes(NamedTuple):
    """Rows of a matrix as codes: ``(codes - zero_point) * scale``.

    Attributes:
        codes: uint8 ``[rows, k]``.
        scale: float32 ``[rows, 1]``.
        zero_point: The code of real zero, float32 ``[rows, 1]``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


@dataclasses.dataclass(frozen=True)
class RowRounding:
    """Rounds tensors to codes on ``grid``, laid over the range of what shares a scale by ``granularity``.

    Rows with NaN or infinity get a scale or zero point that is not finite, and any codes.
    """

    grid: AffineGrid
    granularity: Granularity

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.grid.quant_max - self.grid.quant_min

    def __call__(self, x: torch.Tensor) -> RowCodes:
        """The codes of ``x [..., k]``, of any float dtype."""
        x = x.detach()
        scale, zero_point = self.grid.parameters_for_range(*min_max(x, self.granularity))
        rows = x.reshape(-1, x.shape[-1]).float()
        per_row = (
            p.reshape(-1, 1).expand(rows.shape[0], 1) for p in (scale, zero_point.sub(self.grid.quant_min).float())
        )
        scale, zero_point = per_row
        codes = self._traced if torch.compiler.is_compiling() else self._rounded
        return RowCodes(codes(rows, 1 / scale, zero_point), scale, zero_point)

    def _traced(self, rows: torch.Tensor, inverse: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return torch.round(rows * inverse).add(zero_point).clamp(0, self.highest).to(torch.uint8)

    def _rounded(self, rows: torch.Tensor, inverse: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """The same by blocks that stay in the cache, and by operators with one parameter: ATen vectorizes no more."""
        quantized = torch._empty_affine_quantized(rows.shape, scale=1.0, zero_point=0, dtype=torch.quint8)
        parts = (in_blocks(t, rows.shape[1]) for t in (rows, inverse, zero_point, quantized))
        for block, factor, shift, target in zip(*parts, strict=True):
            scaled = torch.mul(block, factor, out=scratch(0, block))
            target.copy_(scaled.round_().add_(shift))
        codes = integers(quantized)
        return codes if self.highest == LEVELS - 1 else codes.clamp_(max=self.highest)


@functools.cache
def row_rounding(grid: AffineGrid, granularity: Granularity) -> RowRounding:
    """The one rounding of its kind, so that layers find what the layer before them made of a tensor."""
    return RowRounding(grid, granularity)
