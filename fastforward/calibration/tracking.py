"""Quantizers that find their own range while the program runs: what the toggle puts at the sites of a model.

Unlike an override, a tracking quantizer can be copied, pickled and compiled with its model, so a program that knows
nothing of quantization can go on treating the model as its own. For the same reason a ``state_dict`` of the program
holds no quantizers: a checkpoint written with the toggle loads without it, and the other way round.
"""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from fastforward.calibration.estimate import RangeSettable
from fastforward.calibration.histogram import Histogram
from fastforward.calibration.min_max import MovingAverageMinMax
from fastforward.calibration.observer import Observer
from fastforward.exceptions import CalibrationError
from fastforward.nn.float8_quantizer import Float8Quantizer
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.granularity import min_max


class Phase:
    """What the tracking quantizers of one model do; they share one of these.

    Attributes:
        observing: Pass values on in float and look at them (the first batches in eval mode).
        refused: How many tensors held NaN or infinity and were not looked at.
    """

    def __init__(self) -> None:
        self.observing = False
        self.refused = 0


class RangeTracking(Quantizer):
    """Mixin for quantizers with a fixed range: it follows moving averages in training mode and stands in eval mode."""

    _phase: Phase
    _observer: Observer | None

    def simulate(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, or ``x`` itself while the model is being observed."""
        if x.numel() == 0 or torch.compiler.is_compiling():
            return super().simulate(x)
        if self._phase.observing:
            self._look(x, Histogram)
            return x
        if not self.is_calibrated or (self.training and not _in_backward()):
            self._look(x, MovingAverageMinMax)
            self.settle()
            if not self.is_calibrated:  # only NaN or infinity so far
                return x
        return super().simulate(x)

    def _look(self, x: Tensor, default: type[Observer]) -> None:
        # Ranges outlive an inference_mode block of the program, in which new tensors could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            try:
                if "parameter" in self.quant_metadata:
                    self._set_range(*_range_of_parameter(x, self))
                else:
                    self._observer_on(x.device, default)(x)
            except CalibrationError:
                self._phase.refused += 1

    def _observer_on(self, device: torch.device, default: type[Observer]) -> Observer:
        if self._observer is None:
            self.observe_with(default())
        assert self._observer is not None
        if self._observer.batches.device != device:
            self._observer.to(device)
        return self._observer

    def observe_with(self, observer: Observer) -> None:
        """Let ``observer`` find the range until the next ``settle`` in eval mode."""
        target = cast(RangeSettable, self)
        bound = observer.bind(target.granularity, target.grid, self.quant_metadata.describe())
        self.__dict__["_observer"] = bound  # not as a submodule: the program may count those

    def look_at(self, tensors: Iterable[Tensor]) -> None:
        """Observe values that were kept of an earlier call."""
        for tensor in tensors:
            self._look(tensor, Histogram)

    def settle(self) -> None:
        """Take the range that was seen so far."""
        with torch.inference_mode(False), torch.no_grad():
            if self._observer is not None and self._observer.has_data:
                self._set_range(*self._observer.calculate_qparams())
            elif self.is_calibrated:  # a weight: what was computed with it while observing is float and out of date
                scale, zero_point = self._buffers["scale"], self._buffers.get("zero_point")
                assert scale is not None  # it has a range
                self._set_range(scale.clone(), scale if zero_point is None else zero_point.clone())
        if not isinstance(self._observer, MovingAverageMinMax):
            self.__dict__["_observer"] = None

    def __getstate__(self) -> dict[str, Any]:
        # An observer that compares candidates holds functions, which cannot be pickled.
        return {**super().__getstate__(), "_observer": None}

    def fixed(self) -> Quantizer:
        """A quantizer with the range that this one has now, of a kind that any program can load."""
        plain = copy.copy(self)
        for name in ("_phase", "_observer"):
            del plain.__dict__[name]
        plain.__class__ = next(base for base, kind in _TRACKING.items() if kind is type(self))  # type: ignore[assignment]
        return plain

    def _set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        # New tensors, not new values: a graph that waits for its backward pass still holds the old ones.
        self._buffers["scale"] = scale.detach().to(torch.float32)
        if "zero_point" in self._buffers:
            self._buffers["zero_point"] = zero_point.detach().expand(scale.shape).to(torch.int32)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: see the module's docstring."""
        return kwargs.get("destination", args[0] if args else {})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest)


class TrackingLinearQuantizer(RangeTracking, LinearQuantizer):
    """A :class:`~fastforward.nn.LinearQuantizer` that finds its own range."""


class TrackingFloat8Quantizer(RangeTracking, Float8Quantizer):
    """A :class:`~fastforward.nn.Float8Quantizer` that finds its own scale."""


_TRACKING: dict[type[Quantizer], type[RangeTracking]] = {
    LinearQuantizer: TrackingLinearQuantizer,
    Float8Quantizer: TrackingFloat8Quantizer,
}


def make_tracking(quantizer: Quantizer, phase: Phase) -> bool:
    """Let ``quantizer`` find its own range from now on; False if it needs none (a dynamic one)."""
    kind = _TRACKING.get(type(quantizer))
    if kind is None:
        return False
    quantizer.__class__ = kind
    quantizer.__dict__.update(_phase=phase, _observer=None)
    return True


def _range_of_parameter(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a parameter, from its present values alone."""
    low, high = (bound.to(torch.float32) for bound in min_max(x.detach(), quantizer.granularity))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        msg = f"{quantizer.quant_metadata.describe()} holds NaN or infinity"
        raise CalibrationError(msg)
    parameters: tuple[Tensor, Tensor] = quantizer.grid.parameters_for_range(low, high)
    return parameters


def _in_backward() -> bool:
    """Whether the forward pass is one that activation checkpointing repeats; it must see the same ranges."""
    return torch._C._current_graph_task_id() != -1
