"""What passes each active quantizer: extremes, a histogram, the rounding noise, the share of clipped values."""

import torch
from torch import Tensor

from fastforward.diagnostics.metrics import decibels
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata

BINS = 40


class SiteValues:
    """The values of one site over a run.

    Attributes:
        bounds: Smallest and largest value on the quantizer's grid, over all its blocks.
        low: Smallest value seen; ``high`` the largest.
        histogram: Counts in ``BINS`` equal bins from ``bounds[0]`` to ``bounds[1]``, values outside in the outermost.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.metadata: QuantizerMetadata = quantizer.quant_metadata
        self.bounds = _bounds(quantizer)
        self.low, self.high = float("inf"), float("-inf")
        self.histogram = torch.zeros(BINS)
        self._count = self._clipped = 0
        self._signal = self._noise = 0.0

    def take_in(self, x: Tensor, rounded: Tensor) -> None:
        """Add one tensor, before and after rounding."""
        if x.numel() == 0:
            return
        x, rounded = x.detach().float(), rounded.detach().float()
        low, high = (float(bound) for bound in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._count == 0 and self.bounds == (0.0, 0.0):
            self.bounds = low, high
        start, end = self.bounds
        self.histogram += torch.histc(x.clamp(start, end), BINS, start, end if end > start else start + 1).cpu()
        self._count += x.numel()
        self._clipped += int(((x < start) | (x > end)).sum())
        self._signal += float(x.square().sum())
        self._noise += float((x - rounded).square().sum())

    @property
    def sqnr(self) -> float:
        """Signal-to-noise ratio of the rounding, in dB."""
        return decibels(self._signal, self._noise)

    @property
    def clipped_share(self) -> float:
        """Share of values outside of the range."""
        return self._clipped / max(self._count, 1)


class ValueRecorder:
    """A recorder that keeps :class:`SiteValues` of every active quantizer, by its ``id``."""

    def __init__(self) -> None:
        self.sites: dict[int, SiteValues] = {}

    def record(self, quantizer: Quantizer, tensor_in: Tensor, tensor_out: Tensor) -> None:
        """Take in what passed a quantizer; stubs are passed over."""
        if not quantizer.is_stub():
            self.sites.setdefault(id(quantizer), SiteValues(quantizer)).take_in(tensor_in, tensor_out)


def _bounds(quantizer: Quantizer) -> tuple[float, float]:
    """The quantizer's fixed range; (0, 0) if it has none (dynamic ones)."""
    found = getattr(quantizer, "quantization_range", None) if quantizer.is_calibrated else None
    if not isinstance(found, tuple) or not all(isinstance(bound, Tensor) and bound.numel() for bound in found):
        return 0.0, 0.0
    return float(found[0].min()), float(found[1].max())
