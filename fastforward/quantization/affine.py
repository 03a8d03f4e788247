"""The affine number format: the one formula between real values and integers.

``q = clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax)`` and ``x_hat = (q - zero_point) * scale``,
in float32 whatever the data type of ``x``: bit-equal to ``torch.fake_quantize_per_tensor_affine`` and
``torch.quantize_per_tensor``. Quantizers, observers, kernels and export all use it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import fastforward_kernels
import torch
from torch import Tensor

from fastforward.quantization.granularity import Granularity, PerTensor, blocked

MAX_BITS = 16
TINY = torch.finfo(torch.float32).tiny


class Grid(Protocol):
    """What quantizers and observers must know of a number format whose range is chosen."""

    @property
    def symmetric(self) -> bool:
        """Whether only the larger of the two bounds matters."""

    def parameters_for_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point that cover a range."""

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return float32 ``x`` rounded to the grid."""

    def range_for_parameters(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value on the grid."""

    def nearest_zero_point(self, zero_point: Tensor) -> Tensor:
        """Return the zero point of the format that is nearest to the float ``zero_point``."""


@dataclasses.dataclass(frozen=True)
class AffineGrid:
    """The integers a quantizer may use, and how a range of real values is laid over them.

    Attributes:
        quant_min: smallest integer.
        quant_max: largest integer.
        symmetric: real zero lies on the middle integer, 0 on a signed grid.
        allow_one_sided: a symmetric grid whose range has no negative value moves its zero point to
            ``quant_min``, so that no integer is wasted.
    """

    quant_min: int
    quant_max: int
    symmetric: bool = True
    allow_one_sided: bool = False

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 0 for int8, 128 for uint8."""
        return (self.quant_min + self.quant_max + 1) // 2

    def parameters_for_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (float32) and zero point (int32) that cover ``low`` to ``high`` and hold zero exactly.

        An empty range (both zero) gets scale 1. Shapes of ``low``, ``high`` and the results are equal.
        """
        low = low.detach().to(torch.float32).clamp(max=0)
        high = high.detach().to(torch.float32).clamp(min=0)
        if not self.symmetric:
            return self._asymmetric(low, high)
        scale, zero_point = self._symmetric(low, high)
        if not self.allow_one_sided:
            return scale, zero_point
        one_sided = (low >= 0).all()  # stays a tensor: a decision on the host would wait for the GPU
        other_scale, other_zero_point = self._asymmetric(low, high)
        return torch.where(one_sided, other_scale, scale), torch.where(one_sided, other_zero_point, zero_point)

    def _symmetric(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        below, above = max(self.middle - self.quant_min, 1), max(self.quant_max - self.middle, 1)
        scale = _usable(torch.maximum(-low / below, high / above))
        return scale, torch.full_like(scale, self.middle, dtype=torch.int32)

    def _asymmetric(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.quant_max - self.quant_min
        scale = _usable(high / steps - low / steps)  # divided first: the difference may overflow
        zero_point = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)
        return scale, zero_point.to(torch.int32)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return float32 ``x`` rounded to the grid; parameters broadcast against ``x``."""
        result = x * (1 / scale)  # all else happens in this one buffer: fresh memory takes as long as the arithmetic
        result.round_().add_(zero_point).clamp_(self.quant_min, self.quant_max)
        return result.sub_(zero_point).mul_(scale)

    def nearest_zero_point(self, zero_point: Tensor) -> Tensor:
        """Return the int32 zero point on the grid that is nearest to a float one."""
        return torch.round(zero_point).clamp(self.quant_min, self.quant_max).to(torch.int32)

    def range_for_parameters(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest real value on the grid, float32."""
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale


def integer_range(num_bits: int, *, signed: bool = True, restricted: bool = False) -> tuple[int, int]:
    """Return the smallest and largest integer of ``num_bits`` bits; ``restricted`` leaves out the most negative one."""
    if not isinstance(num_bits, int) or isinstance(num_bits, bool):
        msg = f"num_bits must be an int, got {num_bits!r}"
        raise TypeError(msg)
    if not 1 <= num_bits <= MAX_BITS:
        msg = f"num_bits must be between 1 and {MAX_BITS}, got {num_bits}"
        raise ValueError(msg)
    if not signed:
        return 0, 2**num_bits - 1
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    return (low + 1 if restricted and num_bits > 1 else low), high


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    granularity: Granularity | None = None,
    *,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Round ``x`` to the grid: same shape and dtype as ``x``; NaN stays NaN.

    The gradient to ``x`` is the clipped straight-through estimator; to ``scale`` and ``zero_point``, when they
    require one, that of LSQ (Esser et al. 2020, equation 3) and LSQ+ (Bhalgat et al. 2020), times
    ``gradient_scale``.
    """
    granularity = granularity or PerTensor()
    if torch.compiler.is_compiling():  # the formula itself, so that the compiler fuses it with its neighbours
        return _formula(x, scale, zero_point, quant_min, quant_max, granularity, gradient_scale)
    tile = tile_of(granularity, x.shape)
    scale, zero_point = fitted(granularity, x.shape, scale, zero_point)
    return fastforward_kernels.fake_quantize_tiles(
        x, scale, zero_point, quant_min, quant_max, tile, gradient_scale=gradient_scale
    )


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    granularity: Granularity | None = None,
) -> Tensor:
    """Return the integers of ``x`` on the grid, stored as ``dtype``, in the shape of ``x``."""
    granularity = granularity or PerTensor()
    tile = tile_of(granularity, x.shape)
    scale, zero_point = fitted(granularity, x.shape, scale, zero_point)
    return fastforward_kernels.ops.QUANTIZE(x, scale, zero_point, quant_min, quant_max, dtype, tile)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    granularity: Granularity | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the real values of the integers ``q``, in their shape."""
    granularity = granularity or PerTensor()
    tile = tile_of(granularity, q.shape)
    fitted_scale, fitted_zero_point = fitted(granularity, q.shape, scale, scale if zero_point is None else zero_point)
    zero_point = None if zero_point is None else fitted_zero_point
    return fastforward_kernels.ops.DEQUANTIZE(q, fitted_scale, zero_point, tile, out_dtype)


def tile_of(granularity: Granularity, shape: Sequence[int]) -> list[int]:
    """Return the block lengths as the kernels take them; an empty list is the whole tensor."""
    return [] if isinstance(granularity, PerTensor) else list(granularity.block_size(shape))


def fitted(granularity: Granularity, shape: Sequence[int], scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Return parameters with one element per block, or one for all.

    Ranges that all rows share (see ``_Extrema.share_rows``) have a leading axis of one and are spread here.
    """
    if isinstance(granularity, PerTensor) or scale.dim() < 2 or scale.shape[0] != 1 or scale.numel() == 1:
        return scale, zero_point
    parameter_shape = granularity.parameter_shape(shape)
    return scale.expand(parameter_shape), zero_point.expand(parameter_shape)


def _formula(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
    gradient_scale: float,
) -> Tensor:
    scale, zero_point = (_scaled_gradient(p, gradient_scale) for p in (scale, zero_point.to(torch.float32)))
    view = x
    if not isinstance(granularity, PerTensor):
        view = blocked(x, granularity.block_size(x.shape))
        scale, zero_point = granularity.spread(scale, x.shape), granularity.spread(zero_point, x.shape)
    wide = view.to(torch.float32)
    v, step, shift = (wide * (1 / scale)).detach(), scale.detach(), torch.round(zero_point.detach())
    q = torch.round(v) + shift
    on_grid = torch.clamp(q, quant_min, quant_max)
    inside, offset = q == on_grid, on_grid - shift
    out = offset * step
    # t - t.detach() is exactly zero and carries a gradient
    if wide.requires_grad:
        out = out + torch.where(inside, wide - wide.detach(), 0.0)
    if scale.requires_grad:
        out = out + (scale - step) * torch.where(inside, offset - v, offset)
    if zero_point.requires_grad:
        out = out + torch.where(inside, 0.0, zero_point.detach() - zero_point) * step
    # Reshaping to the same shape may still change the strides of axes of size one, and with them a memory format.
    return (out if view is x else out.reshape(x.shape)).to(x.dtype)


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return x.detach() + (x - x.detach()) * factor if x.requires_grad and factor != 1 else x


def _usable(scale: Tensor) -> Tensor:
    """Replace a scale of zero by 1 and keep others normal, so that ``1 / scale`` is finite."""
    return scale.clamp(min=4 * TINY).masked_fill_(scale == 0, 1.0)
