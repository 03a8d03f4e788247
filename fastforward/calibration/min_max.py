"""Observers that follow the smallest and largest value: overall, by moving average, by mean of batches."""

import math
from typing import ClassVar

import torch
import torch.distributed
from torch import Tensor
from typing_extensions import Self

from fastforward.calibration.observer import Observer
from fastforward.calibration.processes import require_others, several
from fastforward.exceptions import CalibrationError
from fastforward.quantization.granularity import Granularity, min_max


class _Extrema(Observer):
    """Reduces each batch to its extrema, ``low`` and ``high`` in float32, and leaves the rest to ``follow``."""

    low: Tensor
    high: Tensor
    checks_values = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    def update(self, x: Tensor) -> None:
        self.take(*extrema_of(x, self))

    def take(self, low: Tensor, high: Tensor) -> None:
        """Take the extrema of a batch."""
        if low.dtype != torch.float32:
            low, high = low.to(torch.float32), high.to(torch.float32)
        self.check(low, high)
        shape = self.bounds()[0].shape
        if shape == (0,):
            self.start(low, high)
            return
        if low.shape != shape:
            low, high = self.share_rows(low, high)
        self.follow(low, high)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``low`` and ``high``, past nn.Module's slow ``__getattr__``: every batch asks for them."""
        low, high = self._buffers["low"], self._buffers["high"]
        assert low is not None and high is not None
        return low, high

    def check(self, low: Tensor, high: Tensor) -> None:
        """Raise CalibrationError for NaN or infinity in the extrema of a batch."""
        if not low.is_cuda:  # there, looking would wait for the GPU at every step: compute_range looks
            self.require_finite(low, high)  # NaN survives amin and amax, so the few extrema tell about all values

    def start(self, low: Tensor, high: Tensor) -> None:
        """Take the first batch; copies, because a reduction over no axis is the data itself."""
        self.low, self.high = low.clone(), high.clone()

    def follow(self, low: Tensor, high: Tensor) -> None:
        """Take a further batch."""
        raise NotImplementedError

    def share_rows(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Let all rows share one range along the leading axis, once a batch has another number of rows."""
        if low.dim() == 0 or low.shape[1:] != self.low.shape[1:]:
            msg = (
                f"{self.site}: the parameters of {self.granularity} have shape {tuple(low.shape)} in this batch and "
                f"{tuple(self.low.shape)} before; only the leading axis may change"
            )
            raise CalibrationError(msg)
        self.low, self.high = self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True)
        return low.amin(0, keepdim=True), high.amax(0, keepdim=True)

    def compute_range(self) -> tuple[Tensor, Tensor]:
        self.require_finite(self.low, self.high)
        return self.low, self.high


class MinMax(_Extrema):
    """The smallest and largest value of all batches. Merging is exact, associative and commutative."""

    def update(self, x: Tensor) -> None:
        low, high = extrema_of(x, self)
        own_low, own_high = self.bounds()
        known = low.numel() == own_low.numel() == 1 and not low.is_cuda
        if known and own_low.item() <= low.item() and high.item() <= own_high.item():
            return  # as for most batches, which calibration is to cost little for; what is inside the range is finite
        self.take(low, high)

    def follow(self, low: Tensor, high: Tensor) -> None:
        own_low, own_high = self.bounds()
        torch.minimum(own_low, low, out=own_low)
        torch.maximum(own_high, high, out=own_high)

    def absorb(self, other: Self) -> None:
        low, high = other.low, other.high
        if low.shape != self.low.shape:
            low, high = self.share_rows(low, high)
        self.follow(low, high)


class MovingAverageMinMax(_Extrema):
    """An exponential average of each batch's extrema: ``low = (1 - momentum) * low + momentum * new``.

    Under ``torch.distributed`` each step takes the extrema over all processes, so that they stay identical; all
    processes must therefore observe the same sites equally often.

    Args:
        momentum: weight of the newest batch, above 0 and at most 1.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            msg = f"momentum must be above 0 and at most 1, got {momentum}"
            raise ValueError(msg)
        self.momentum = momentum

    def check(self, low: Tensor, high: Tensor) -> None:
        """Nothing yet: a process that raises here would leave the others waiting for its extrema."""

    def agreed(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The extrema over all processes; all raise if one of them saw NaN or infinity."""
        low, high = extrema_of_all_processes(low, high)
        super().check(low, high)
        return low, high

    def start(self, low: Tensor, high: Tensor) -> None:
        super().start(*self.agreed(low, high))

    def follow(self, low: Tensor, high: Tensor) -> None:
        low, high = self.agreed(low, high)
        self.low = torch.lerp(self.low, low, self.momentum)
        self.high = torch.lerp(self.high, high, self.momentum)

    def absorb(self, other: Self) -> None:
        if not (torch.equal(self.low, other.low) and torch.equal(self.high, other.high)):
            msg = f"{self.site}: moving averages depend on the order of batches and cannot be merged afterwards"
            raise CalibrationError(msg)


class MeanMinMax(_Extrema):
    """The mean over batches of each batch's extrema; sums in float64, so that merging is associative in practice."""

    def start(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low.to(torch.float64), high.to(torch.float64)

    def follow(self, low: Tensor, high: Tensor) -> None:
        self.low = self.low + low
        self.high = self.high + high

    def share_rows(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        del high
        msg = f"{self.site}: MeanMinMax needs the same parameter shape in all batches, got {tuple(low.shape)}"
        raise CalibrationError(msg)

    def absorb(self, other: Self) -> None:
        self.follow(other.low, other.high)

    def compute_range(self) -> tuple[Tensor, Tensor]:
        self.require_finite(self.low, self.high)
        count = self.count_batches()
        return (self.low / count).to(torch.float32), (self.high / count).to(torch.float32)


class _Latest:
    """The extrema of the tensor looked at last: query, key and value layers observe one and the same input.

    The tensor is held, so that its memory cannot come back as another one's while the entry stands. An observer that
    has used the entry does not use it again: it sees the next batch, in the same memory perhaps.
    """

    entry: tuple[Tensor, int, Granularity, tuple[Tensor, Tensor]] | None = None
    askers: ClassVar[set[int]] = set()


def extrema_of(x: Tensor, observer: Observer) -> tuple[Tensor, Tensor]:
    """Return the extrema of each block of ``x``, from memory if another observer has just asked about it."""
    granularity = observer.granularity
    if x.is_inference():  # has no version to tell whether it was changed in place
        return min_max(x, granularity)
    if _Latest.entry is not None and id(observer) not in _Latest.askers:
        seen, version, blocks, extrema = _Latest.entry
        same_memory = seen.data_ptr() == x.data_ptr() and version == x._version and seen.dtype == x.dtype
        if same_memory and seen.shape == x.shape and seen.stride() == x.stride() and blocks == granularity:
            _Latest.askers.add(id(observer))
            return extrema
    extrema = min_max(x, granularity)
    _Latest.entry = (x, x._version, granularity, extrema)
    _Latest.askers = {id(observer)}
    return extrema


def forget_latest() -> None:
    """Let go of the tensor that ``extrema_of`` remembers."""
    _Latest.entry = None


def extrema_of_all_processes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extrema over all processes of ``torch.distributed``, in one collective; as they are without it.

    NaN in one of them makes the result infinite: whether a maximum keeps NaN depends on the backend.
    """
    if not several():
        return low, high
    require_others()
    both = torch.stack([-low, high]).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    return -both[0], both[1]
