"""One root module under the toggle: quantized at its first call, then observed or trained, call by call."""

import contextlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastforward.calibration.batches import Call
from fastforward.calibration.choose import automatic, uses_by_quantizer
from fastforward.calibration.flow import Flow, eager
from fastforward.calibration.recorder import FlowRecorder
from fastforward.calibration.samples import Samples
from fastforward.calibration.tracking import Phase, RangeTracking, make_tracking
from fastforward.diagnostics.covering import Coverage, from_flow
from fastforward.exceptions import QuantizationError
from fastforward.nn.conversion import quantize_model
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer, QuantizerStub
from fastforward.selection import schemes
from fastforward.selection.config import QuantizationConfig
from fastforward.selection.scheme import Scheme
from fastforward.toggle.debug import show_choices, show_modules
from fastforward.toggle.settings import Settings


class Session:
    """What happens at the calls of one root module, which is quantized in place right away.

    Args:
        root: The module.
        settings: The toggle's variables.

    Attributes:
        name: The root's class.
        phase: What the root's quantizers do at present.
        flow: The recorded call that did most of the work.
        coverage: What it says about the quantizers there are now; None until a call has finished.
        quantized_modules: How many modules have a quantizer.
        failure: Why the root could not be quantized further; empty if it could.
        kept: For the report at exit: the root and the input of its first call. None unless a report is asked for.
    """

    _recording: ClassVar[bool] = False  # one at a time: a root may be called within another

    def __init__(self, root: torch.nn.Module, settings: Settings) -> None:
        self.name = f"{type(root).__module__}.{type(root).__qualname__}"
        self.settings = settings
        self._running = False
        self.phase = _phase_of(root) or Phase()
        self._selection = _selection(settings.scheme)
        self._root = weakref.ref(root)
        self._recorded = 0
        self._observed = 0
        self._trained = False
        self._pending: tuple[torch.nn.Module, Flow, Samples] | None = None
        self.flow: Flow | None = None
        self.coverage: Coverage | None = None
        self.quantized_modules = 0
        self.failure = ""
        self.kept: tuple[torch.nn.Module, Call] | None = None
        with torch.inference_mode(False):
            quantize_rest(root, settings.left_out(root))
        if settings.debug:
            show_modules(root, self.name)

    @property
    def root(self) -> torch.nn.Module | None:
        """The root module, unless the program has dropped it."""
        return self._root()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
        """Let the program's ``call(*args, **kwargs)`` of the root happen in the mode that is due."""
        root = self._root()
        if self._running or Session._recording or root is None:  # a root that calls itself, or is called by another
            return call(*args, **kwargs)
        self._running = True
        try:
            self._place_pending()
            self._choose_phase(training)
            if self._recorded >= self.settings.calibration:
                return call(*args, **kwargs)
            self._recorded += 1
            if self.settings.report and self.kept is None:
                self.kept = root, Call(args, kwargs)
            return self._record(root, lambda: call(*args, **kwargs))
        finally:
            self._running = False

    def _choose_phase(self, training: bool) -> None:
        if training:
            self._trained = True
        observing = not self._trained and self._observed < self.settings.calibration
        self._observed += observing
        if self.phase.observing and not observing:
            self.settle()
        self.phase.observing = observing

    def settle(self) -> None:
        """Turn what was observed into ranges."""
        self.phase.observing = False
        for quantizer in self.quantizers():
            quantizer.settle()

    def quantizers(self) -> list[RangeTracking]:
        """The quantizers of the root that find their own range."""
        root = self._root()
        return [] if root is None else [module for module in root.modules() if isinstance(module, RangeTracking)]

    def _record(self, root: torch.nn.Module, call: Callable[[], Any]) -> Any:
        """Run the call with the flow of values recorded, then put quantizers where it shows that they belong."""
        samples = Samples()
        recorder = FlowRecorder(root, listener=samples)
        Session._recording = True
        try:
            # What the program compiled runs as plain Python meanwhile; the compiler is not loaded for that alone.
            with eager() if "torch._dynamo" in sys.modules else contextlib.nullcontext(), recorder:
                result = call()
                recorder.output(result)
        finally:
            Session._recording = False
        self._pending = root, recorder.flow(), samples
        # Activation checkpointing repeats parts of the call in the backward pass: until then nothing may change.
        if not torch.is_grad_enabled():
            self._place_pending()
        return result

    def finish(self) -> None:
        """At the end of the program: record no more, and turn what was seen into quantizers and ranges."""
        self._recorded = self.settings.calibration
        self._place_pending()

    def _place_pending(self) -> None:
        if self._pending is None:
            return
        root, flow, samples = self._pending
        self._pending = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._place(root, flow, samples)
        except Exception as error:  # the program goes on in float, and is told at its end
            self._give_up(root, f"{type(error).__name__}: {error}")
        self._take_stock(root, flow)

    def _place(self, root: torch.nn.Module, flow: Flow, samples: Samples) -> None:
        choices = self._selection.apply(root, flow.governing())
        if self.settings.debug:
            show_choices(choice for choice in choices if self.flow is None or choice.quantizer is not None)
        observer_for = automatic(flow, samples)
        uses = uses_by_quantizer(flow, samples, {})
        for choice in choices:
            quantizer = choice.quantizer
            if quantizer is None or not make_tracking(quantizer, self.phase):
                continue
            assert isinstance(quantizer, RangeTracking)
            if self.phase.observing:
                quantizer.observe_with(observer_for(choice.site, quantizer))
                kept = [call.arguments[use.argument] for use in uses.get(choice.site, ()) for call in use.calls]
                quantizer.look_at(kept)
        helpless = [choice.site for choice in choices if choice.quantizer and not _finds_its_range(choice.quantizer)]
        if helpless:
            msg = (
                f"{helpless[0]} has a quantizer whose range the toggle cannot find; quantize the model with ff.quantize"
            )
            raise QuantizationError(msg)

    def _give_up(self, root: torch.nn.Module, reason: str) -> None:
        """Leave the root usable: quantizers that nobody will calibrate make way for stubs."""
        self.failure = reason
        self._recorded = self.settings.calibration
        for module in root.modules():
            for name, quantizer in module.own_quantizers().items() if isinstance(module, QuantizedModule) else ():
                if not _finds_its_range(quantizer):
                    setattr(module, name, QuantizerStub(metadata=quantizer.quant_metadata))

    def _take_stock(self, root: torch.nn.Module, flow: Flow) -> None:
        """Note how the root stands, while it is certainly there: the program may drop it before the end."""
        if self.flow is None or flow.macs >= self.flow.macs:
            self.flow = flow
        self.coverage = from_flow(root, _with_present_quantizers(self.flow, root))
        modules = [module for module in root.modules() if isinstance(module, QuantizedModule)]
        self.quantized_modules = sum(
            any(not quantizer.is_stub() for quantizer in module.own_quantizers().values()) for module in modules
        )


def _with_present_quantizers(flow: Flow, root: torch.nn.Module) -> Flow:
    """The flow as it would be recorded now: where there was a stub, a quantizer may have come."""
    active = {name for name, module in root.named_modules() if isinstance(module, Quantizer) and not module.is_stub()}
    sites = [
        replace(site, operands=tuple(replace(operand, active=operand.quantizer in active) for operand in site.operands))
        for site in flow.sites
    ]
    return replace(flow, sites=sites)


def quantize_rest(module: torch.nn.Module, left_out: Callable[[str, torch.nn.Module], bool], path: str = "") -> None:
    """Give stubs to ``module`` and everything below that has none yet: parts of it may have been roots before."""
    if isinstance(module, Quantizer):
        return
    below = any(isinstance(part, QuantizedModule) for part in module.modules())

    def skip(inner: str, part: torch.nn.Module) -> bool:
        return left_out(".".join(filter(None, (path, inner))), part)

    if not below:
        quantize_model(module, skip=skip)
        return
    for name, child in module.named_children():
        quantize_rest(child, left_out, f"{path}.{name}" if path else name)
    if not isinstance(module, QuantizedModule):
        quantize_model(module, recursive=False, skip=skip)


def _finds_its_range(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, RangeTracking) or quantizer.is_calibrated


def _selection(scheme: str) -> Scheme | QuantizationConfig:
    """The scheme of that name, or the configuration in that file."""
    if scheme.endswith((".yaml", ".yml")) or Path(scheme).is_file():
        return QuantizationConfig.from_yaml(Path(scheme))
    return schemes.get(scheme)


def _phase_of(root: torch.nn.Module) -> Phase | None:
    """The phase that a copied or unpickled root brings along."""
    return next((module._phase for module in root.modules() if isinstance(module, RangeTracking)), None)
