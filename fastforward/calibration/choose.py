"""``observer="auto"``: at each site the observer whose range costs the operator's output least.

No single observer is right everywhere: on MiniLM the range of least squared error is 3 dB better than min-max after a
GELU and 10 dB worse at the inputs of attention. What counts is the error of the operator's output, so that is
measured, on a sample of its operands.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from fastforward.calibration.error_grid import MeanSquaredError
from fastforward.calibration.estimate import ObserverFactory, RangeSettable
from fastforward.calibration.flow import Flow
from fastforward.calibration.histogram import Histogram, Percentile
from fastforward.calibration.min_max import MinMax
from fastforward.calibration.observer import Observer
from fastforward.calibration.samples import SampledCall, Samples
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.affine import Grid
from fastforward.quantization.granularity import Granularity, PerTensor

MARGIN = 0.8
"""A later candidate replaces an earlier one only if it lowers the error below this share: ranges that clip look better
on the data they were made from than on any other."""
_JUDGED_ROWS = 128
"""Rows of each sampled call of a linear layer that errors are measured on."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A way to round a tensor: one scale and zero point on a grid."""

    grid: Grid
    scale: float
    zero_point: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded."""
        scale, zero_point = (torch.tensor(value, device=x.device) for value in (self.scale, self.zero_point))
        return self.grid.round(x.float(), scale, zero_point).to(x.dtype)


Judge = Callable[[Sequence[Rounding]], int]


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a quantizer's value is multiplied: a sampled call, the operand, and how the value gets there.

    Attributes:
        calls: Sampled calls of the operator.
        argument: The operand.
        smoothing: What the operand is divided by before the quantizer; ``None`` for nothing.
    """

    calls: tuple[SampledCall, ...]
    argument: str
    smoothing: Tensor | None = None

    def errors(self, candidates: Sequence[Callable[[Tensor], Tensor]]) -> list[float]:
        """Relative squared error of the operator's output, when this operand is quantized by each of the candidates."""
        errors, reference = [0.0] * len(candidates), 0.0
        for call in self.calls:
            call = call.thinned(_JUDGED_ROWS)
            exact = call.run()
            reference += _squared(exact)
            for number, quantize in enumerate(candidates):
                errors[number] += _squared(call.run(**{self.argument: self._through(quantize, call)}) - exact)
        return [error / reference if reference else 0.0 for error in errors]

    def _through(self, quantize: Callable[[Tensor], Tensor], call: SampledCall) -> Tensor:
        x: Tensor = call.arguments[self.argument]
        return quantize(x) if self.smoothing is None else quantize(x / self.smoothing) * self.smoothing


class Candidates(Observer):
    """One histogram per site, several ways to read a range from it; the judge says which is taken.

    Args:
        judge: Gets one rounding per way, and returns the number of the best; min-max is number 0.

    Attributes:
        chosen: What was taken: ``"min-max"``, ``"percentile 99.99"``, ``"percentile 99.9"`` or ``"mse"``.
    """

    checks_values = True  # the histogram checks

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.histogram = Histogram(method="mse", candidates=32)
        self.judge = judge
        self.chosen: str | None = None
        self._range: tuple[Tensor, Tensor] | None = None

    def bind(self, granularity: Granularity, grid: Grid, site: str) -> Self:
        """Say whose range this observer estimates."""
        self.histogram.bind(granularity, grid, site)
        return super().bind(granularity, grid, site)

    def __getstate__(self) -> dict[str, Any]:
        """All but the judge, whose samples are this process's own."""
        return {**self.__dict__, "judge": None}

    def succeed(self, other: Self) -> None:
        """Take over the judge."""
        self.judge = other.judge

    def update(self, x: Tensor) -> None:
        """Take in one batch."""
        self.histogram(x)
        self.chosen = self._range = None

    def absorb(self, other: Self) -> None:
        """Add what ``other`` has seen."""
        self.histogram.absorb(other.histogram)
        self.chosen = self._range = None

    def compute_range(self) -> tuple[Tensor, Tensor]:
        """The range whose rounding the judge prefers."""
        if self._range is None:
            ranges = dict(self.ranges())
            parameters = (self.grid.parameters_for_range(*bounds) for bounds in ranges.values())
            roundings = [Rounding(self.grid, *(float(value) for value in values)) for values in parameters]
            self.chosen = list(ranges)[self.judge(roundings)]
            self._range = ranges[self.chosen]
        return self._range

    def ranges(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Every candidate by name."""
        yield "min-max", (self.histogram.extremes[0], self.histogram.extremes[1])
        for share in (99.99, 99.9):
            percentile = Percentile(share).bind(self.granularity, self.grid, self.site).to(self.histogram.counts.device)
            percentile.load_state_dict(self.histogram.state_dict())
            yield f"percentile {share}", percentile.compute_range()
        yield "mse", self.histogram.compute_range()


def automatic(flow: Flow, samples: Samples, smoothing: Mapping[str, Tensor] | None = None) -> ObserverFactory:
    """The observer of each site when none is asked for.

    Args:
        flow: Recorded while ``samples`` listened.
        samples: What the operators were given.
        smoothing: For each input quantizer whose layer divides its input, the divisor.
    """
    uses = uses_by_quantizer(flow, samples, smoothing or {})
    judges = {id(shared): _judge(shared) for shared in uses.values()}  # one for quantizers that share their uses

    def make(name: str, quantizer: Quantizer) -> Observer:
        if "parameter" in quantizer.quant_metadata:
            few_bits = getattr(quantizer, "num_bits", 8) <= 4
            return MeanSquaredError() if few_bits else MinMax()
        if (
            name not in uses
            or not isinstance(quantizer, RangeSettable)
            or not isinstance(quantizer.granularity, PerTensor)
        ):
            return MinMax()
        return Candidates(judges[id(uses[name])])

    return make


def uses_by_quantizer(flow: Flow, samples: Samples, smoothing: Mapping[str, Tensor]) -> dict[str, Sequence[Use]]:
    """For each quantizer, every sampled use of its value; quantizers that see one value share their uses."""
    own: dict[str, list[Use]] = {}
    for name, governed in flow.governed().items():
        for site, operand in governed:
            calls = tuple(samples.calls.get(site.number, ()))
            if calls and isinstance(calls[0].arguments.get(operand.argument), Tensor):
                own.setdefault(name, []).append(Use(calls, operand.argument, smoothing.get(name)))
    joint: dict[str, Sequence[Use]] = dict(own)
    for group in flow.shared:
        together = tuple(use for name in sorted(group) for use in own.get(name, ()))
        joint.update({name: together for name in group if name in own})
    return joint


def _judge(uses: Sequence[Use]) -> Judge:
    known: dict[tuple[Rounding, ...], int] = {}

    def best(candidates: Sequence[Rounding]) -> int:
        key = tuple(candidates)
        if key not in known:
            known[key] = _least([sum(each) for each in zip(*(use.errors(key) for use in uses), strict=True)])
        return known[key]

    return best


def _least(errors: Sequence[float]) -> int:
    """The number of the first error, or of a later one that is clearly less."""
    found = 0
    for number, error in enumerate(errors):
        if error < errors[found] * MARGIN:
            found = number
    return found


def _squared(x: Tensor) -> float:
    return float(x.float().square().sum())
