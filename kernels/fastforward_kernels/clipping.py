"""The range that loses least: squared error of quantization, measured on a histogram instead of on the data.

The histogram is taken as point masses at the centres of its bins. The search goes from coarse to fine: a grid of
candidate ends, then a finer grid around the best. Cost is independent of how much data the histogram has seen.
"""

import torch
from torch import Tensor


def clip_search(
    counts: Tensor, low: float, high: float, qmin: int, qmax: int, *, symmetric: bool, candidates: int = 32
) -> tuple[float, float]:
    """Return the range ``(low, high)`` whose grid ``qmin .. qmax`` gives the smallest squared error.

    Args:
        counts: histogram of the data, ``[bins]``.
        low: lower end of the first bin.
        high: upper end of the last bin.
        qmin: smallest integer.
        qmax: largest integer.
        symmetric: the range is ``(-a, a)``, else both ends are searched; both hold zero.
        candidates: ends tried per side and round.
    """
    width = (high - low) / counts.numel()
    centres = low + width * (torch.arange(counts.numel(), dtype=torch.float64, device=counts.device) + 0.5)
    used = counts > 0
    masses, centres = counts[used].double(), centres[used]
    if not masses.numel():
        msg = "the histogram is empty: observe data before searching for a range"
        raise ValueError(msg)
    if symmetric:
        return _symmetric(masses, centres, max(abs(low), abs(high)), qmin, qmax, candidates)
    return _asymmetric(masses, centres, (min(low, 0.0), max(high, 0.0)), qmin, qmax, candidates)


def _symmetric(
    masses: Tensor, centres: Tensor, bound: float, qmin: int, qmax: int, candidates: int
) -> tuple[float, float]:
    first, last = bound / (4 * candidates), bound
    for _ in range(3):
        ends = torch.linspace(first, last, 4 * candidates, dtype=torch.float64, device=centres.device)
        scales = ends * (2 / (qmax - qmin))
        errors = squared_error(masses, centres, scales, torch.full_like(scales, (qmin + qmax + 1) // 2), qmin, qmax)
        best = float(ends[errors.argmin()])
        step = (last - first) / (4 * candidates - 1)
        first, last = max(best - step, first), min(best + step, last)
    return -best, best


def _asymmetric(
    masses: Tensor, centres: Tensor, bounds: tuple[float, float], qmin: int, qmax: int, candidates: int
) -> tuple[float, float]:
    """Search the two ends in turn, twice coarsely and twice finely; the other end stays at its best so far."""
    best = list(bounds)
    for fineness in (1.0, 1.0, 0.1, 0.1):
        for side in (0, 1):
            ends = _ends(best[side], bounds[side], fineness, candidates, centres)
            other = torch.full_like(ends, best[1 - side])
            lows, highs = (ends, other) if side == 0 else (other, ends)
            errors = _errors_of_ranges(masses, centres, lows, highs, qmin, qmax)
            best[side] = float(ends[errors.argmin()])
    return best[0], best[1]


def _ends(best: float, bound: float, fineness: float, candidates: int, like: Tensor) -> Tensor:
    """Return candidates for one end: between zero and its bound, within ``fineness * bound`` of the best so far."""
    first, last = best - bound * fineness, best + bound * fineness
    ends = torch.linspace(first, last, 2 * candidates, dtype=torch.float64, device=like.device)
    return torch.cat((ends.clamp(min(bound, 0.0), max(bound, 0.0)), ends.new_tensor([best])))


def _errors_of_ranges(masses: Tensor, centres: Tensor, lows: Tensor, highs: Tensor, qmin: int, qmax: int) -> Tensor:
    usable = highs > lows
    scales = torch.where(usable, (highs - lows) / (qmax - qmin), torch.ones_like(lows))
    zero_points = (qmin - torch.round(lows / scales)).clamp(qmin, qmax)
    errors = squared_error(masses, centres, scales, zero_points, qmin, qmax)
    return torch.where(usable, errors, torch.full_like(errors, torch.inf))


def squared_error(masses: Tensor, centres: Tensor, scales: Tensor, zero_points: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the summed squared error of every candidate grid, float64 ``[candidates]``."""
    s, z = scales.unsqueeze(1), zero_points.unsqueeze(1)
    q = torch.clamp(torch.round(centres / s) + z, qmin, qmax)
    return ((q - z) * s - centres).square_().mul_(masses).sum(1)
