"""Float8 formats with a scale: the grid that quantizers and observers share."""

import dataclasses
from collections.abc import Sequence

import fastforward_kernels
import torch
from torch import Tensor

from fastforward.quantization.affine import TINY, tile_of
from fastforward.quantization.granularity import Granularity, PerTensor, blocked
from fastforward.quantization.mapping import FLOAT8_DTYPES


@dataclasses.dataclass(frozen=True)
class Float8Grid:
    """The values of a float8 type times a scale; the largest magnitude maps to the type's largest number."""

    dtype: torch.dtype
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT8_DTYPES:
            msg = f"dtype must be one of {', '.join(map(str, FLOAT8_DTYPES))}, got {self.dtype}"
            raise TypeError(msg)

    @property
    def largest(self) -> float:
        """The type's largest finite number: 448 for e4m3fn, 57344 for e5m2."""
        return float(torch.finfo(self.dtype).max)

    def parameters_for_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 scale that covers a range, and a zero point of zero."""
        magnitude = torch.maximum(low.detach().abs(), high.detach().abs()).to(torch.float32)
        scale = magnitude / self.largest
        scale = torch.where(magnitude == 0, torch.ones_like(scale), scale.clamp(min=4 * TINY))
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return float32 ``x`` rounded to the grid; values beyond it saturate."""
        del zero_point
        return self.cast(x, scale).to(torch.float32) * scale

    def range_for_parameters(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value on the grid, float32."""
        del zero_point
        return -self.largest * scale, self.largest * scale

    def cast(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return ``x / scale`` as the float8 type."""
        return (x.to(torch.float32) * (1 / scale)).clamp(-self.largest, self.largest).to(self.dtype)

    def nearest_zero_point(self, zero_point: Tensor) -> Tensor:
        """Return zero: the format has no other zero point."""
        return torch.zeros_like(zero_point, dtype=torch.int32)


def fake_quantize_float8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, granularity: Granularity | None = None
) -> Tensor:
    """Round ``x`` to float8 values times ``scale``; clipped straight-through gradient to ``x``."""
    granularity = granularity or PerTensor()
    if torch.compiler.is_compiling():
        return _formula(x, scale, dtype, granularity)
    return fastforward_kernels.ops.FAKE_QUANTIZE_FLOAT8(x, scale, dtype, tile_of(granularity, x.shape))


def _formula(x: Tensor, scale: Tensor, dtype: torch.dtype, granularity: Granularity) -> Tensor:
    view = x
    if not isinstance(granularity, PerTensor):
        view, scale = blocked(x, granularity.block_size(x.shape)), granularity.spread(scale, x.shape)
    largest = torch.finfo(dtype).max
    wide = view.to(torch.float32)
    scaled = (wide * (1 / scale)).detach()
    out = scaled.clamp(-largest, largest).to(dtype).to(torch.float32) * scale
    if wide.requires_grad:  # an exact zero that carries the gradient
        out = out + torch.where(torch.round(scaled).abs() <= largest, wide - wide.detach(), 0.0)
    return out.reshape(x.shape).to(x.dtype)


def quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, block_size: Sequence[int]) -> Tensor:
    """Return ``x / scale`` as float8 values in the shape of ``x``."""
    tile = [] if scale.numel() == 1 else list(block_size)
    return fastforward_kernels.ops.QUANTIZE_FLOAT8(x, scale, dtype, tile)
