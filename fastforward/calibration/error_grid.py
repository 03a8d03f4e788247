"""Observers that try ranges on the data itself: squared error on a grid, and half-quadratic for weights."""

import torch
from torch import Tensor
from typing_extensions import Self

from fastforward.calibration.min_max import extrema_of_all_processes
from fastforward.calibration.observer import BlockObserver, Observer
from fastforward.exceptions import CalibrationError
from fastforward.quantization.granularity import rows_by_block

_AT_ONCE = 1 << 17
"""Elements: temporaries then stay in the cache; those of a whole weight would be fresh memory each time."""


class MeanSquaredError(BlockObserver):
    """The range with the least squared error, out of a grid that the first batch fixes.

    A symmetric quantizer gets ``steps`` fractions of the first batch's largest magnitude, up to ``1 + margin`` times
    it; an asymmetric one about ``sqrt(steps)`` fractions per side. Errors add up over batches. Under
    ``torch.distributed`` the processes agree on the grid in their first step.

    Args:
        steps: number of candidate ranges.
        margin: how far beyond the first batch the grid reaches, for later batches that are wider.
    """

    low: Tensor
    high: Tensor
    errors: Tensor

    def __init__(self, steps: int = 100, margin: float = 0.25) -> None:
        super().__init__()
        if steps < 1:
            msg = f"steps must be positive, got {steps}"
            raise ValueError(msg)
        self.steps = steps
        self.margin = margin
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))
        self.register_buffer("errors", torch.empty(0, dtype=torch.float64))

    def update_rows(self, rows: Tensor) -> None:
        if self.errors.numel() == 0:
            self._fix_grid(rows)
        at_once = max(_AT_ONCE // max(rows.shape[1], 1), 1)
        for candidate in range(self.low.shape[0]):
            scale, zero_point = self.grid.parameters_for_range(self.low[candidate], self.high[candidate])
            parts = (rows, scale[:, None], zero_point[:, None], self.errors[candidate])
            for part, step, zero, errors in zip(*(part.split(at_once) for part in parts), strict=True):
                rounded = self.grid.round(part, step, zero)
                errors += rounded.sub_(part).square_().sum(1, dtype=torch.float64)

    def _fix_grid(self, rows: Tensor) -> None:
        low, high = extrema_of_all_processes(rows.amin(1), rows.amax(1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        margin = 1 + self.margin
        if self.grid.symmetric:
            part = fractions(self.steps, margin, low.device)
            self.low, self.high = part[:, None] * low, part[:, None] * high
        else:
            side = fractions(max(round(self.steps**0.5), 1), margin, low.device)
            pairs = torch.cartesian_prod(side, side)
            self.low, self.high = pairs[:, :1] * low, pairs[:, 1:] * high
        self.errors = torch.zeros(self.low.shape, dtype=torch.float64, device=low.device)

    def compute_range(self) -> tuple[Tensor, Tensor]:
        best = self.errors.argmin(0, keepdim=True)
        shape = self.parameter_shape
        return self.low.gather(0, best).reshape(shape), self.high.gather(0, best).reshape(shape)

    def absorb(self, other: Self) -> None:
        if not (torch.equal(self.low, other.low) and torch.equal(self.high, other.high)):
            msg = f"{self.site}: MeanSquaredError observers with different grids cannot be merged"
            raise CalibrationError(msg)
        self.errors += other.errors


class HalfQuadratic(Observer):
    """Scale and zero point of a weight by half-quadratic splitting, robust to outliers; the newest tensor counts.

    Minimises ``|W - dequantize(quantize(W))| ** p`` with ``p < 1`` by alternating a shrinkage step for the outliers
    and a closed form for scale and zero point (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
    Learning Models"), from several fractions of the plain range. Where nothing is better, the plain range stays.

    Args:
        p: exponent of the norm.
        iterations: number of alternations.
        beta: weight of the quadratic term in the first alternation.
        kappa: its growth from one alternation to the next.
    """

    scale: Tensor
    zero_point: Tensor
    starts = (1.0, 0.85, 0.7, 0.55)

    def __init__(self, p: float = 0.7, iterations: int = 20, beta: float = 10.0, kappa: float = 1.01) -> None:
        super().__init__()
        self.p, self.iterations, self.beta, self.kappa = p, iterations, beta, kappa
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    def update(self, x: Tensor) -> None:
        rows, shape = rows_by_block(x, self.granularity)
        rows = rows.to(torch.float32)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale, zero_point = self.grid.parameters_for_range(low, high)
        best = (scale, zero_point, self._error(rows, scale, zero_point))
        for fraction in self.starts:
            best = self._alternate(rows, *self.grid.parameters_for_range(low * fraction, high * fraction), best)
        self.scale, self.zero_point = best[0].reshape(shape), best[1].reshape(shape)

    def _alternate(
        self, rows: Tensor, scale: Tensor, zero_point: Tensor, best: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        beta = self.beta
        magnitude = rows.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        for _ in range(self.iterations):
            rounded = self.grid.round(rows, scale, zero_point)
            # the weights are brought to unit size, so that one beta serves layers of any size
            outliers = shrink((rows - rounded) / magnitude, beta, self.p) * magnitude
            scale, zero_point = self._refit(rows - outliers, rounded, scale, zero_point)
            error = self._error(rows, scale, zero_point)
            wins = error < best[2]
            best = (
                torch.where(wins, scale, best[0]),
                torch.where(wins, zero_point, best[1]),
                torch.where(wins, error, best[2]),
            )
            beta *= self.kappa
        return best

    def _refit(self, target: Tensor, rounded: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point that fit ``target`` best with the integers of ``rounded``."""
        steps = rounded / scale
        if not self.grid.symmetric:
            shift = (steps - target / scale).mean(1, keepdim=True)
            moved = self.grid.nearest_zero_point(zero_point + shift)
            steps = steps - (moved - zero_point)
            zero_point = moved
        fitted = (steps * target).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True)
        usable = torch.isfinite(fitted) & (fitted > 0)
        return torch.where(usable, fitted, scale), zero_point

    def _error(self, rows: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (self.grid.round(rows, scale, zero_point) - rows).abs().pow(self.p).mean(1, keepdim=True)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        self.require_data()
        return self.scale, self.zero_point

    def absorb(self, other: Self) -> None:
        if not (torch.equal(self.scale, other.scale) and torch.equal(self.zero_point, other.zero_point)):
            msg = f"{self.site}: half-quadratic observers of different tensors cannot be merged; they are for weights"
            raise CalibrationError(msg)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Return the generalised soft threshold ``sign(x) relu(|x| - |x| ** (p - 1) / beta)``."""
    size = x.abs()
    return torch.sign(x) * torch.relu(size - size.clamp(min=1e-8).pow(p - 1) / beta)


def fractions(count: int, largest: float, device: torch.device) -> Tensor:
    """Return ``count`` evenly spaced factors up to ``largest``; exactly 1 is among them, so that min-max competes."""
    values = torch.arange(1, count + 1, device=device) * (largest / count)
    nearest = (values - 1).abs().argmin()
    values[nearest] = 1.0
    return values
