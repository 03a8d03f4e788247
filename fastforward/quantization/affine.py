"""The affine number format: the one formula between real values and integers.

``q = clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax)`` and ``x_hat = (q - zero_point) * scale``,
in float32 whatever the data type of ``x``: bit-equal to ``torch.fake_quantize_per_tensor_affine`` and
``torch.quantize_per_tensor``. Quantizers, observers, kernels and export all use it.
"""

import dataclasses

import torch
from torch import Tensor

from fastforward.quantization.granularity import Granularity, PerTensor, blocked

MAX_BITS = 16
TINY = torch.finfo(torch.float32).tiny


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
        if not self.symmetric or (self.allow_one_sided and bool((low >= 0).all())):
            return self._asymmetric(low, high)
        below, above = self.middle - self.quant_min, max(self.quant_max - self.middle, 1)
        scale = _usable(torch.maximum(-low / max(below, 1), high / above))
        return scale, torch.full_like(scale, self.middle, dtype=torch.int32)

    def _asymmetric(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.quant_max - self.quant_min
        scale = _usable(high / steps - low / steps)  # divided first: the difference may overflow
        zero_point = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)
        return scale, zero_point.to(torch.int32)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return float32 ``x`` rounded to the grid; parameters broadcast against ``x``."""
        q = torch.round(x * (1 / scale)) + zero_point
        return (q.clamp(self.quant_min, self.quant_max) - zero_point) * scale

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
) -> Tensor:
    """Round ``x`` to the grid: same shape and dtype as ``x``.

    The gradient to ``x`` is the clipped straight-through estimator; to ``scale`` and ``zero_point``, when they
    require one, that of LSQ (Esser et al. 2020, equations 2 and 3).
    """
    return _fake_quantize_torch(x, scale, zero_point, quant_min, quant_max, granularity or PerTensor())


def _fake_quantize_torch(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, granularity: Granularity
) -> Tensor:
    view, scale, zero_point = _aligned(x, scale, zero_point, granularity)
    v = view.to(torch.float32) * (1 / scale)
    q = v + (torch.round(v) - v).detach()
    q = torch.round(v) if not q.requires_grad else q
    zero_point = zero_point.to(torch.float32)
    q = torch.clamp(q + zero_point, quant_min, quant_max)
    return ((q - zero_point) * scale).reshape(x.shape).to(x.dtype)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    granularity: Granularity | None = None,
) -> Tensor:
    """Return the integers of ``x`` on the grid, stored as ``dtype``; NaN has no integer and is refused by callers."""
    view, scale, zero_point = _aligned(x, scale, zero_point, granularity or PerTensor())
    q = torch.round(view.to(torch.float32) * (1 / scale)) + zero_point
    return q.clamp(quant_min, quant_max).reshape(x.shape).to(dtype)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    granularity: Granularity | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the real values of the integers ``q``."""
    granularity = granularity or PerTensor()
    view = blocked(q, granularity.block_size(q.shape)).to(torch.float32)
    if zero_point is not None:
        view = view - granularity.spread(zero_point, q.shape)
    return (view * granularity.spread(scale, q.shape)).reshape(q.shape).to(out_dtype)


def _aligned(
    x: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity
) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of data and parameters that broadcast against each other."""
    if isinstance(granularity, PerTensor):
        return x, scale, zero_point
    view = blocked(x, granularity.block_size(x.shape))
    return view, granularity.spread(scale, x.shape), granularity.spread(zero_point, x.shape)


def _usable(scale: Tensor) -> Tensor:
    """Replace a scale of zero by 1 and keep others normal, so that ``1 / scale`` is finite."""
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=4 * TINY))
