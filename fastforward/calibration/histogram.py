"""Observers that keep a histogram, and choose a range from it: by squared error, by entropy, by percentile.

The bins are those of a fixed grid: their width is a power of two, their edges its multiples. A histogram of wider
values only doubles the width, which merges pairs of bins exactly. So the result depends on the values alone, not on
their order, their batches or the processes that saw them, and merging is exact, associative and commutative.
"""

import math

import torch
from torch import Tensor
from typing_extensions import Self

from fastforward.calibration.observer import BlockObserver
from fastforward.calibration.search import best_range
from fastforward.exceptions import CalibrationError

MIN_EXPONENT = -126
"""Smallest exponent of a bin's width: the multiplication by its inverse stays exact in float32."""
_AT_ONCE = 1 << 17
"""Elements: temporaries then stay in the cache; those of a whole activation would be fresh memory each time."""


class HistogramObserver(BlockObserver):
    """Keeps counts per block on the fixed grid; subclasses choose the range.

    Args:
        bins: number of bins, a power of two; half of them below zero. By default 8192 for one block and 1024 for
            each of several, to bound memory.
    """

    counts: Tensor
    exponent: Tensor
    extremes: Tensor

    def __init__(self, bins: int | None = None) -> None:
        super().__init__()
        if bins is not None and (bins < 4 or bins & (bins - 1)):
            msg = f"bins must be a power of two and at least 4, got {bins}"
            raise ValueError(msg)
        self.requested_bins = bins
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(MIN_EXPONENT, dtype=torch.int64))
        self.register_buffer("extremes", torch.zeros(2))

    def update_rows(self, rows: Tensor) -> None:
        bounds = torch.stack(torch.aminmax(rows))
        self._take_extremes(bounds)
        if self.counts.numel() == 0:
            bins = self.requested_bins or self.default_bins(rows.shape[0])
            self.counts = torch.zeros(rows.shape[0], bins, dtype=torch.int64, device=rows.device)
        exponent = exponent_for(float(bounds.abs().max()), self.bins)
        self._widen(exponent)
        self.counts += histogram(rows, self.bins, int(self.exponent))

    def absorb(self, other: Self) -> None:
        if other.bins != self.bins:
            msg = f"{self.site}: histograms of {self.bins} and {other.bins} bins cannot be merged"
            raise CalibrationError(msg)
        counts = other.counts
        if other.parameter_shape != self.parameter_shape:
            self.share_leading_axis(other.parameter_shape)
            counts = joined(counts, other.parameter_shape)
        self._take_extremes(other.extremes)
        self._widen(int(other.exponent))
        self.counts += coarsened(counts, int(self.exponent) - int(other.exponent))

    def join_leading_axis(self) -> None:
        self.counts = joined(self.counts, self.parameter_shape)

    def _take_extremes(self, bounds: Tensor) -> None:
        low, high = torch.minimum(self.extremes[0], bounds[0]), torch.maximum(self.extremes[1], bounds[1])
        self.extremes = torch.stack([low, high])

    def _widen(self, exponent: int) -> None:
        """Double the bins' width until it is ``2 ** exponent``."""
        if exponent > int(self.exponent):
            self.counts = coarsened(self.counts, exponent - int(self.exponent))
            self.exponent.fill_(exponent)

    def default_bins(self, blocks: int) -> int:
        """Return how many bins each of ``blocks`` blocks gets if the user did not say."""
        return 8192 if blocks == 1 else 1024

    @property
    def bins(self) -> int:
        """Number of bins of each block."""
        return self.counts.shape[-1]

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, int(self.exponent))

    def centers(self) -> Tensor:
        """Return the middle of each bin, float32 of shape ``[bins]``."""
        index = torch.arange(self.bins, device=self.counts.device, dtype=torch.float32)
        return (index - self.bins // 2 + 0.5) * self.width

    def support(self) -> tuple[Tensor, Tensor]:
        """Return the outer edges of the occupied bins of each block, no further out than the extremes, with zero."""
        occupied = self.counts > 0
        first = occupied.to(torch.int8).argmax(1)
        last = self.bins - occupied.flip(1).to(torch.int8).argmax(1)
        low, high = ((edge - self.bins // 2) * self.width for edge in (first, last))
        return low.clamp(max=0).maximum(self.extremes[0]), high.clamp(min=0).minimum(self.extremes[1])

    def choose(self) -> tuple[Tensor, Tensor]:
        """Return the range of each block, two tensors of shape ``[blocks]``."""
        raise NotImplementedError

    def compute_range(self) -> tuple[Tensor, Tensor]:
        low, high = self.choose()
        return low.reshape(self.parameter_shape), high.reshape(self.parameter_shape)


class Histogram(HistogramObserver):
    """The range with the least error on the quantizer's own grid, judged by a histogram.

    Args:
        method: ``"mse"`` (squared error) or ``"kl"`` (Kullback-Leibler divergence of the values' distribution from
            the quantized one; Migacz 2017, "8-bit inference with TensorRT"). ``"entropy"`` is another name of "kl".
        bins: number of bins, a power of two.
        candidates: how many thresholds are tried per side.
    """

    def __init__(self, method: str = "mse", bins: int | None = None, candidates: int = 100) -> None:
        super().__init__(bins)
        if method not in {"mse", "kl", "entropy"}:
            msg = f"method must be 'mse' or 'kl', got {method!r}"
            raise ValueError(msg)
        self.method = "kl" if method == "entropy" else method
        self.candidates = candidates

    def choose(self) -> tuple[Tensor, Tensor]:
        measure = self._squared_error if self.method == "mse" else self._divergence
        return best_range(*self.support(), measure, self.candidates, each_side=not self.grid.symmetric)

    def default_bins(self, blocks: int) -> int:
        return 2048 if self.method == "kl" and blocks == 1 else super().default_bins(blocks)

    def _squared_error(self, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = self.grid.parameters_for_range(low, high)
        centers = self.centers()
        rounded = self.grid.round(centers, scale[:, None], zero_point[:, None])
        return ((rounded - centers) ** 2 * self.counts).sum(1)

    def _divergence(self, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = self.grid.parameters_for_range(low, high)
        rounded = self.grid.round(self.centers(), scale[:, None], zero_point[:, None])
        return divergence(self.counts.to(torch.float64).expand(rounded.shape), rounded)


class Percentile(HistogramObserver):
    """The range that leaves out the outermost values on both sides, for example ``Percentile(99.99)``.

    Args:
        p: percent of the values below the upper bound; as many lie above the lower bound.
        bins: number of bins; a bound is accurate to one bin.
    """

    def __init__(self, p: float = 99.99, bins: int | None = None) -> None:
        super().__init__(bins)
        if not 50 < p <= 100:
            msg = f"p must be above 50 and at most 100 percent, got {p}"
            raise ValueError(msg)
        self.p = p

    def choose(self) -> tuple[Tensor, Tensor]:
        low, high = self.support()
        total = self.counts.sum(1, keepdim=True)
        outside = total * (1 - self.p / 100)
        upper = self._edge(total - outside)
        lower = -self._flipped()._edge(total - outside)
        return lower.clamp(max=0).maximum(low), upper.clamp(min=0).minimum(high)

    def _edge(self, wanted: Tensor) -> Tensor:
        """Return where the count from below reaches ``wanted``, interpolated inside the bin."""
        total = self.counts.cumsum(1)
        index = torch.searchsorted(total.to(torch.float64), wanted.to(torch.float64)).clamp(max=self.bins - 1)
        inside = self.counts.gather(1, index).clamp(min=1)
        below = total.gather(1, index) - self.counts.gather(1, index)
        part = ((wanted - below) / inside).clamp(0, 1)
        return ((index - self.bins // 2 + part) * self.width).squeeze(1).to(torch.float32)

    def _flipped(self) -> "Percentile":
        mirror = Percentile(self.p, self.bins)
        mirror.counts, mirror.exponent = self.counts.flip(1), self.exponent
        return mirror


def exponent_for(largest: float, bins: int) -> int:
    """Return the exponent of the narrowest bins that hold values up to ``largest``."""
    if largest == 0:
        return MIN_EXPONENT
    # frexp: largest < 2 ** e, and -2 ** (e) itself would still lie in the lowest bin
    return max(math.frexp(largest)[1] - int(math.log2(bins // 2)), MIN_EXPONENT)


def histogram(rows: Tensor, bins: int, exponent: int) -> Tensor:
    """Count ``rows`` (float32 ``[blocks, n]``) into bins of width ``2 ** exponent``: int64 ``[blocks, bins]``."""
    blocks, elements = rows.shape
    counts = torch.zeros(blocks, bins, dtype=torch.int64, device=rows.device)
    at_once = max(_AT_ONCE // max(elements, 1), 1)
    for part, into in zip(rows.split(at_once), counts.split(at_once), strict=True):
        first = torch.arange(len(part), device=rows.device, dtype=torch.int32)[:, None] * bins
        for piece in part.split(_AT_ONCE, 1):
            index = _bin_of(piece, bins, exponent).add_(first).flatten()
            into += torch.bincount(index, minlength=into.numel()).reshape(into.shape)
    return counts


def _bin_of(x: Tensor, bins: int, exponent: int) -> Tensor:
    """The bin of each element, int32."""
    scaled = x * math.ldexp(1.0, -exponent)  # exact, except that a small value may become zero in wide bins
    vanished = (x < 0) & (scaled == 0) if exponent > 0 else None
    index = scaled.floor_().to(torch.int32)
    if vanished is not None:
        index -= vanished.to(torch.int32)  # too small for the scaled value, and yet below zero
    return index.add_(bins // 2).clamp_(0, bins - 1)


def joined(counts: Tensor, parameter_shape: tuple[int, ...]) -> Tensor:
    """Return the sum of ``counts`` (``[blocks, bins]``) over the leading axis of the parameters."""
    return counts.reshape(parameter_shape[0], -1, counts.shape[1]).sum(0)


def coarsened(counts: Tensor, doublings: int) -> Tensor:
    """Return ``counts`` (``[blocks, bins]``) in bins ``2 ** doublings`` times as wide, as many as before."""
    if doublings <= 0:
        return counts
    blocks, bins = counts.shape
    half = bins // 2
    # floor, not truncation: bin i of the negative half goes to floor(i / 2)
    target = torch.arange(-half, half, device=counts.device) >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(1, target + half, counts)


def divergence(counts: Tensor, rounded: Tensor) -> Tensor:
    """Return the KL divergence of each row of ``counts`` from its quantized form.

    Args:
        counts: float64 ``[blocks, bins]``.
        rounded: the value on the grid that each bin is rounded to, nondecreasing, ``[blocks, bins]``.

    Bins rounded to one value share their counts evenly in the quantized distribution, over the occupied ones. Values
    that clip join the outermost bins inside the range in the reference distribution only, as TensorRT does.
    """
    changed = torch.ones_like(rounded, dtype=torch.bool)
    changed[:, 1:] = rounded[:, 1:] != rounded[:, :-1]
    level = changed.cumsum(1) - 1
    first, last = rounded[:, :1], rounded[:, -1:]
    blocks, bins = counts.shape
    edge_low = (rounded == first).sum(1, keepdim=True) - 1
    edge_high = bins - (rounded == last).sum(1, keepdim=True)
    position = torch.arange(bins, device=counts.device)
    inside = (position >= edge_low) & (position <= edge_high)
    kept = counts * inside
    reference = kept.clone()
    reference.scatter_add_(1, edge_low, (counts * (position < edge_low)).sum(1, keepdim=True))
    reference.scatter_add_(1, edge_high, (counts * (position > edge_high)).sum(1, keepdim=True))
    occupied = (reference > 0).to(counts.dtype)
    sums = torch.zeros_like(counts).scatter_add_(1, level, kept)
    sizes = torch.zeros_like(counts).scatter_add_(1, level, occupied)
    quantized = (sums / sizes.clamp(min=1)).gather(1, level) * occupied
    p = reference / reference.sum(1, keepdim=True)
    q = quantized / quantized.sum(1, keepdim=True).clamp(min=1e-300)
    smooth = 1e-12  # an occupied bin whose counts all clipped has q = 0: expensive, not infinite
    return torch.where(p > 0, p * (p.log() - q.clamp(min=smooth).log()), 0.0).sum(1)
