"""``estimate_ranges``: run data in float, observe every quantizer's input, then set the ranges."""

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
from torch import Tensor

from fastforward.autoquant.annotation_watch import watching
from fastforward.calibration.min_max import MinMax, forget_latest
from fastforward.calibration.observer import Observer
from fastforward.calibration.processes import failing_together, several
from fastforward.exceptions import CalibrationError, QuantizationWarning
from fastforward.nn.call_paths import share_unreached
from fastforward.nn.quantizer import OverrideHandle, Quantizer
from fastforward.quantization.affine import Grid
from fastforward.quantization.granularity import Granularity

ObserverFactory = Callable[[str, Quantizer], Observer]


@runtime_checkable
class RangeSettable(Protocol):
    """A quantizer with a fixed range that an observer can set."""

    granularity: Granularity

    @property
    def grid(self) -> Grid: ...

    def set_parameters(self, scale: Tensor, zero_point: Tensor | None = None) -> None: ...


class ObservedSite:
    """One quantizer with its observer, for as long as the quantizer is observed."""

    def __init__(self, name: str, quantizer: Quantizer, observer: Observer, *, simulate: bool) -> None:
        assert isinstance(quantizer, RangeSettable)
        self.name = name
        self.quantizer = quantizer
        self.observer = observer.bind(quantizer.granularity, quantizer.grid, site_name(name, quantizer))
        self.handle: OverrideHandle | None = None
        self._simulate = simulate
        self._last: tuple[weakref.ref[Tensor], int] | None = None
        self._device: torch.device | None = None

    def attach(self) -> None:
        """Start to observe."""
        if any(isinstance(getattr(override, "__self__", None), ObservedSite) for override in self.quantizer.overrides):
            msg = f"{self.observer.site} is observed already: estimate_ranges cannot be nested"
            raise CalibrationError(msg)
        self.handle = self.quantizer.register_override(self._observe)

    def detach(self) -> None:
        """Stop observing."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _observe(self, quantizer: Quantizer, inner: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        (x,) = args
        if not self._seen_before(x):
            self._move_to(x.device)
            self.observer.forward(x)
            if self._simulate:
                self.apply(self.observer.calculate_qparams())
        # Another object, as from a quantizer: code that asks `key is value` takes the same branch in both cases.
        result: Tensor = inner(*args, **kwargs) if self._simulate else x.view_as(x)
        return result

    def _move_to(self, device: torch.device) -> None:
        if self._device != device:
            self.observer.to(device)
            self._device = device

    def _seen_before(self, x: Tensor) -> bool:
        """Return whether ``x`` is the parameter observed last, unchanged: weights are looked at once, not per batch."""
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return True
        if type(x) is Tensor:  # asking an activation twice would cost
            if isinstance(x._base, torch.nn.Parameter):
                self.quantizer.note_parameter(x)
            return False
        if isinstance(x, torch.nn.Parameter):
            self._last = (weakref.ref(x), x._version)
            self.quantizer.note_parameter(x)
        return False

    def apply(self, parameters: tuple[Tensor, Tensor]) -> None:
        """Give the quantizer its scale and zero point."""
        assert isinstance(self.quantizer, RangeSettable)
        self.quantizer.set_parameters(*parameters)


class RangeEstimation:
    """The observed sites of one ``estimate_ranges`` block, or of a quantization-aware training run.

    Attributes:
        sites: by name; each has ``quantizer`` and ``observer``.
    """

    def __init__(self, sites: Iterable[ObservedSite]) -> None:
        self.sites = {site.name: site for site in sites}

    @property
    def observers(self) -> dict[str, Observer]:
        """The observer of each site."""
        return {name: site.observer for name, site in self.sites.items()}

    @property
    def unseen(self) -> list[str]:
        """Names of the sites that no floating tensor has reached."""
        return [name for name, site in self.sites.items() if not site.observer.has_data]

    def attach(self) -> None:
        """Start to observe all sites, or none if one of them cannot be observed."""
        try:
            for site in self.sites.values():
                site.attach()
        except BaseException:
            self.freeze()
            raise

    def freeze(self) -> None:
        """Stop observing; ranges stay as they are from here on."""
        for site in self.sites.values():
            site.detach()
        forget_latest()

    def merge_processes(self) -> None:
        """Give every process of ``torch.distributed`` the observations of all, in one collective."""
        if not several():
            return
        mine = {name: copy.deepcopy(site.observer).cpu() for name, site in self.sites.items()}
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, mine)
        for name, site in self.sites.items():
            device = site.observer.batches.device
            merged = gathered[0][name]
            for other in gathered[1:]:
                merged = merged.merge(other[name])
            merged.succeed(site.observer)
            site.observer = merged.to(device)

    def set_ranges(self) -> None:
        """Compute the parameters of every site that saw data, then set them all: an error changes nothing."""
        ready = [site for site in self.sites.values() if site.observer.has_data]
        parameters = [site.observer.calculate_qparams() for site in ready]
        for site, values in zip(ready, parameters, strict=True):
            site.apply(values)


@contextlib.contextmanager
def estimate_ranges(
    target: torch.nn.Module | Quantizer | Iterable[Any] | Mapping[str, Quantizer],
    observer: type[Observer] | Observer | ObserverFactory = MinMax,
    *args: Any,
    missing: str = "warn",
    simulate: bool = False,
    **kwargs: Any,
) -> Iterator[RangeEstimation]:
    """Observe quantizers while the block runs data through the model, and set their ranges at its end.

    Inside the block the quantizers pass tensors through as they are, so the model computes in float. If the block
    raises, ranges stay as they were. Under ``torch.distributed`` the observations of all processes are merged at the
    end of the block, in one collective; if the block raises in one process, it raises in all, and no ranges are set.

    Args:
        target: a model, a quantizer, several of either, or a mapping from names to quantizers. Stubs and quantizers
            without a fixed range (dynamic ones) are passed over.
        observer: an observer class, an instance (copied for each quantizer), or a function
            ``(name, quantizer) -> Observer``.
        args: arguments of the observer class.
        missing: what to do about quantizers that no floating tensor has reached: "warn", "error" or "ignore". Reaching
            none at all is always an error.
        simulate: set the range and quantize at every step instead (quantization-aware training).
        kwargs: keyword arguments of the observer class.

    Yields:
        The observed sites; ``.unseen`` and ``.observers`` say what happened.

    Raises:
        CalibrationError: nothing to observe, no data, NaN or infinity, a quantizer observed already, or another process
            has raised.

    Example:
        >>> import fastforward as ff
        >>> quantizer = ff.nn.LinearQuantizer(8)
        >>> with ff.estimate_ranges(quantizer, ff.observers.MovingAverageMinMax, momentum=0.5):
        ...     _ = quantizer(torch.tensor([-1.0, 0.5]))
        >>> quantizer.quantization_range
        (tensor(-1.), tensor(0.9922))
    """
    if missing not in {"warn", "error", "ignore"}:
        msg = f"missing must be 'warn', 'error' or 'ignore', got {missing!r}"
        raise ValueError(msg)
    make = observer_factory(observer, args, kwargs)
    estimation = RangeEstimation(
        ObservedSite(name, quantizer, make(name, quantizer), simulate=simulate)
        for name, quantizer in observable(target)
    )
    if not estimation.sites:
        msg = (
            "there is no quantizer to observe: quantize the model with a scheme or replace stubs by quantizers before "
            "estimating ranges"
        )
        raise CalibrationError(msg)
    estimation.attach()
    try:
        with failing_together("estimate_ranges"), watching(target):
            yield estimation
    finally:
        estimation.freeze()
    estimation.merge_processes()
    if isinstance(target, torch.nn.Module):
        _share_unseen(target, estimation)
    report_unseen(estimation, missing)
    estimation.set_ranges()


def _share_unseen(model: torch.nn.Module, estimation: RangeEstimation) -> None:
    """A call of a shared layer that did not run takes the ranges of one that did."""
    unseen = set(estimation.unseen)

    def is_dead(path: Mapping[str, Quantizer]) -> bool:
        active = [name for name, quantizer in path.items() if not quantizer.is_stub()]
        return bool(active) and unseen.issuperset(active)

    share_unreached(model, is_dead)
    left = {id(quantizer) for _, quantizer in observable(model)}
    estimation.sites = {name: site for name, site in estimation.sites.items() if id(site.quantizer) in left}


def observe_once(quantizer: Quantizer, x: Tensor) -> None:
    """Widen a quantizer's range to the values of ``x``: what ``quantizer.observe(x)`` does."""
    assert isinstance(quantizer, RangeSettable)
    observer = MinMax().bind(quantizer.granularity, quantizer.grid, site_name(type(quantizer).__name__, quantizer))
    observer.to(x.device)(x)
    seen = getattr(quantizer, "_observer", None)
    merged = observer if seen is None else seen.merge(observer)
    quantizer.__dict__["_observer"] = merged  # not a submodule: it is no part of the model's state
    quantizer.set_parameters(*merged.calculate_qparams())


def track_ranges(
    target: torch.nn.Module | Quantizer | Iterable[Any] | Mapping[str, Quantizer],
    observer: type[Observer] | Observer | ObserverFactory,
    *args: Any,
    **kwargs: Any,
) -> RangeEstimation:
    """Observe and simulate from now on, for quantization-aware training; ``.freeze()`` ends the observing.

    Arguments are those of :func:`estimate_ranges`. Each step sets the range from what was seen so far and quantizes
    with it.
    """
    make = observer_factory(observer, args, kwargs)
    estimation = RangeEstimation(
        ObservedSite(name, quantizer, make(name, quantizer), simulate=True) for name, quantizer in observable(target)
    )
    estimation.attach()
    return estimation


def observer_factory(observer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ObserverFactory:
    """Return a function that makes a fresh observer for each quantizer."""
    if isinstance(observer, type) and issubclass(observer, Observer):
        return lambda name, quantizer: observer(*args, **kwargs)
    if args or kwargs:
        msg = f"arguments {args or kwargs} go to an observer class, but {observer!r} is none"
        raise ValueError(msg)
    if isinstance(observer, Observer):
        return lambda name, quantizer: copy.deepcopy(observer)
    if callable(observer):
        made: ObserverFactory = observer
        return made
    msg = f"observer must be an observer class, an instance or a function, got {observer!r}"
    raise TypeError(msg)


def observable(target: Any) -> Iterator[tuple[str, Quantizer]]:
    """Yield name and quantizer of everything below ``target`` that has a fixed range to set, each once."""
    seen: set[int] = set()
    for name, quantizer in _candidates(target):
        if id(quantizer) not in seen and not quantizer.is_stub() and isinstance(quantizer, RangeSettable):
            seen.add(id(quantizer))
            yield name, quantizer


def _candidates(target: Any) -> Iterator[tuple[str, Quantizer]]:
    if isinstance(target, torch.nn.Module):
        for name, module in target.named_modules():
            if isinstance(module, Quantizer):
                yield name or "quantizer", module
    elif isinstance(target, Mapping):
        yield from target.items()
    elif hasattr(target, "named_modules"):  # a collection of found quantizers
        yield from ((name, module) for name, module in target.named_modules() if isinstance(module, Quantizer))
    else:
        for index, item in enumerate(target):
            if isinstance(item, tuple):
                yield item
            else:
                for name, quantizer in _candidates(item):
                    yield f"{index}.{name}", quantizer


def site_name(name: str, quantizer: Quantizer) -> str:
    """Return the words by which error messages call a site."""
    described = quantizer.quant_metadata.describe()
    return name if described == "without metadata" else f"{name} ({described})"


def report_unseen(estimation: RangeEstimation, missing: str) -> None:
    """Raise if nothing was seen; warn or raise about sites that were not reached."""
    unseen = estimation.unseen
    if not unseen:
        return
    shown = ", ".join(unseen[:10]) + (f" and {len(unseen) - 10} more" if len(unseen) > 10 else "")
    if len(unseen) == len(estimation.sites) or missing == "error":
        msg = f"no floating tensor reached {shown}: run the model on calibration data inside the 'with' block"
        raise CalibrationError(msg)
    if missing == "warn":
        msg = f"calibration never reached {shown}: using them raises until data that does is observed"
        warnings.warn(msg, QuantizationWarning, stacklevel=4)
