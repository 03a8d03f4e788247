"""``ff.quantize``: a float model and data in, the quantized model out, in one call.

The steps: stubs, one recorded run of the data, the scheme's quantizers where that run says they belong, smoothing, one
observed run, ranges, weight rounding and bias correction, a coverage summary, integers if asked for.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforward.autoquant.annotation_watch import watching
from fastforward.calibration import steps as calibration_steps
from fastforward.calibration.batches import Batches, Call, Data
from fastforward.calibration.choose import automatic
from fastforward.calibration.estimate import estimate_ranges, observable, observer_factory
from fastforward.calibration.flow import Flow, eager, in_eval_mode, passing_through
from fastforward.calibration.processes import failing_together, require_others
from fastforward.calibration.recorder import FlowRecorder
from fastforward.calibration.samples import Samples
from fastforward.calibration.smoothing import without_smoothing
from fastforward.calibration.undo import Undo
from fastforward.diagnostics.covering import Coverage, measure, unreached
from fastforward.exceptions import CalibrationError, QuantizationError, QuantizationWarning
from fastforward.nn.call_paths import share_unreached
from fastforward.nn.conversion import dequantize_model, integer_layers, quantize_model
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer, QuantizerStub
from fastforward.selection import schemes
from fastforward.selection.config import QuantizationConfig
from fastforward.selection.scheme import Choice, Scheme
from fastforward.state import broadcast_quantization

_ROUNDS = 4

if TYPE_CHECKING:
    from fastforward.autoquant.optable import OperatorTable
    from fastforward.autoquant.patterns import PatternRule

__all__ = ["Call", "quantize"]


def quantize(
    model: torch.nn.Module,
    data: Data,
    *,
    scheme: str | Scheme | QuantizationConfig = "w8a8",
    observer: Any = None,
    convert: bool = False,
    operator_table: "OperatorTable | None" = None,
    replacement_patterns: "Sequence[PatternRule]" = (),
    progress: bool = True,
) -> torch.nn.Module:
    """Quantize a float model with calibration data, in place.

    Args:
        model: The model. It runs in evaluation mode and without gradients here; afterwards it is in the mode it was in.
        data: Iterable of batches: a tensor, a tuple (positional arguments), a mapping (keyword arguments) or
            ``ff.Call(args, kwargs)``. Or a function that runs the model, with or without the model as its argument.
        scheme: Which values are quantized and how: a name in ``ff.schemes``, a scheme, or a ``QuantizationConfig``.
        observer: An observer class, instance or factory for all ranges. By default each site gets the one that
            costs its operator's output least.
        convert: Go on to integers, as ``ff.convert`` does.
        operator_table: Operators to know beside torch's, as in ``ff.quantize_model``.
        replacement_patterns: Patterns to replace in the source, likewise.
        progress: Show a progress bar, and print the coverage at the end.

    Returns:
        ``model``. If anything raises, it is left as it was, and under ``torch.distributed`` all processes raise.

    Raises:
        CalibrationError: No data, a site that saw NaN or infinity, or another process has raised.
        QuantizationError: The model is quantized already, or the scheme finds nothing to quantize.
        TypeError: ``model`` is no module, ``data`` is neither, or a batch is none of the above.
        ValueError: Unknown scheme; the message lists the known ones.

    Example:
        >>> import fastforward as ff, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = ff.quantize(model, [torch.randn(16, 4)], progress=False)
        >>> ff.coverage(model, torch.randn(16, 4)).share
        1.0
    """
    inner = _uncompiled(model)
    undo = Undo()
    try:
        with failing_together("ff.quantize"):
            chosen = scheme if isinstance(scheme, QuantizationConfig) else schemes.get(scheme)
            calibration_steps.require_known(chosen.steps)
            batches = Batches(data)
            _add_stubs(inner, operator_table, replacement_patterns, undo)
            with in_eval_mode(inner), eager():
                calibration = _Calibration(inner, batches, chosen, observer, progress, undo, operator_table)
                never = (*unreached(inner, calibration.run()), *calibration.unseen)
                if convert:
                    require_others()  # integers are there to stay
                    _convert(inner, batches)
                if progress:
                    print(_summary(inner, batches, never).summary(chosen.name))
    except BaseException:
        if not integer_layers(inner):  # once it does the float weights are gone: it stays an integer model
            undo.roll_back()
        raise
    _warn_unreached(never)
    return model


@dataclasses.dataclass
class _Calibration:
    """One call of ``quantize``, after stubs are in place."""

    model: torch.nn.Module
    batches: Batches
    scheme: Scheme | QuantizationConfig
    observer: Any
    progress: bool
    undo: Undo
    table: Any
    unseen: tuple[str, ...] = ()

    def run(self) -> Flow:
        """All steps from the recorded run to the last correction; returns that run."""
        flow, samples = self._record()
        if "fold_batch_norm" in self.scheme.steps:
            samples_hold = calibration_steps.fold_batch_norms(self.model, flow, samples, self.undo)
            if not samples_hold:
                flow, samples = self._record()
        self._place(flow)
        if self._settle():
            flow, samples = self._record()
        smoothing: dict[str, Tensor] = {}
        if "smooth" in self.scheme.steps:
            self._keep_smoothing()
            smoothing, samples_hold = calibration_steps.smooth_linears(self.model, flow, samples, self.undo)
            if not samples_hold:
                flow, samples = self._record()
        self._observe(flow, samples, smoothing)
        share_unreached(self.model, lambda path: flow.reached.isdisjoint(path))
        self._give_up_unseen()
        if {"round_weights", "correct_bias"} & set(self.scheme.steps):
            calibration_steps.refine_linears(self.model, flow, samples, self.scheme.steps, self.undo)
        if "correct_bias" in self.scheme.steps:
            calibration_steps.correct_conv_biases(self.model, flow, samples, self.undo)
        # Processes have judged, smoothed and rounded by samples of their own; from here on they are to agree.
        require_others()
        broadcast_quantization(self.model)
        return flow

    def _record(self) -> tuple[Flow, Samples]:
        samples = Samples(len(self.batches))
        recorder = FlowRecorder(self.model, table=self.table, listener=samples)
        with without_smoothing(self.model), passing_through(self.model), recorder, watching(self.model):
            self.batches.run(self.model, "recording", progress=self.progress, each=recorder.output)
        return recorder.flow(), samples

    def _place(self, flow: Flow) -> None:
        choices = self.scheme.apply(self.model, flow.governing())
        placed = [choice for choice in choices if choice.quantizer is not None]
        _back_to_stubs(self.model, [choice.site for choice in placed if choice.site not in flow.reached])
        if not any(choice.site in flow.reached for choice in placed):
            raise _nothing_quantized(self.model, self.scheme.name, flow, choices)

    def _settle(self) -> bool:
        """Look again with quantizers in place, since code may take another branch then; return whether it did.

        A quantizer returns another object than it was given. Where the source asks ``key is value``, as torch's
        attention does, other sites matter from then on: they get quantizers, and those that govern nothing any
        more lose theirs.
        """
        changed = False
        for _ in range(_ROUNDS):
            recorder = FlowRecorder(self.model, table=self.table)
            with passing_through(self.model), recorder:
                self.batches.run_first(self.model)
            flow = recorder.flow()
            added = [
                choice for choice in self.scheme.apply(self.model, flow.governing()) if choice.quantizer is not None
            ]
            _back_to_stubs(self.model, [choice.site for choice in added if choice.site not in flow.reached])
            if not any(choice.site in flow.reached for choice in added):
                break
            changed = True
            _back_to_stubs(self.model, _idle(self.model, flow))
        return changed

    def _keep_smoothing(self) -> None:
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                self.undo.keep_values(module)

    def _observe(self, flow: Flow, samples: Samples, smoothing: dict[str, Tensor]) -> None:
        if not any(True for _ in observable(self.model)):
            return  # nothing but dynamic quantizers
        wanted = self.observer
        if wanted is None and self.scheme.observer != "auto":
            from fastforward.calibration import observers

            wanted = getattr(observers, self.scheme.observer)
        automatically = wanted is None or (isinstance(wanted, str) and wanted == "auto")
        factory = automatic(flow, samples, smoothing) if automatically else observer_factory(wanted, (), {})
        with estimate_ranges(self.model, factory, missing="ignore"):
            self.batches.run(self.model, "calibrating", progress=self.progress)

    def _give_up_unseen(self) -> None:
        """Take back quantizers of what the recorded run reached and the observed one did not.

        Quantizers that need no range are at work while others observe, and a router may send its tokens elsewhere then.
        """
        sites = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, Quantizer) and not module.is_stub() and not module.is_calibrated
        ]
        _back_to_stubs(self.model, sites)
        self.unseen = tuple(dict.fromkeys(site.rpartition(".")[0] or "the model" for site in sites))


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        msg = f"quantize: expected a torch.nn.Module, got {type(model).__name__}"
        raise TypeError(msg)
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else model


def _add_stubs(model: torch.nn.Module, table: Any, patterns: Any, undo: Undo) -> None:
    """Swap the model's classes, unless the user has done so and nothing is quantized yet."""
    active = [name for name, module in model.named_modules() if isinstance(module, Quantizer) and not module.is_stub()]
    if active:
        msg = f"the model is quantized already ({active[0]}); ff.dequantize_model(model) takes it back to float"
        raise QuantizationError(msg)
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        undo.add(lambda: _remove_quantizers(model))
    else:
        quantize_model(model, operator_table=table, replacement_patterns=patterns)
        undo.add(lambda: dequantize_model(model))


def _remove_quantizers(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, QuantizedModule):
            for name, quantizer in module.own_quantizers().items():
                if not quantizer.is_stub():
                    setattr(module, name, QuantizerStub(metadata=quantizer.quant_metadata))


def _back_to_stubs(model: torch.nn.Module, sites: Sequence[str]) -> None:
    """Sites that no data reached keep no quantizer: it would have no range."""
    modules = dict(model.named_modules())
    for site in sites:
        owner, _, name = site.rpartition(".")
        quantizer = modules[site]
        assert isinstance(quantizer, Quantizer)
        setattr(modules[owner], name, QuantizerStub(metadata=quantizer.quant_metadata))


def _idle(model: torch.nn.Module, flow: Flow) -> list[str]:
    """Active quantizers that were reached, and whose value another one rounds again before anything multiplies it."""
    governed = flow.governed()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and not module.is_stub() and name in flow.reached and name not in governed
    ]


def _nothing_quantized(
    model: torch.nn.Module, scheme: str, flow: Flow, choices: Sequence[Choice]
) -> QuantizationError | CalibrationError:
    if not flow.sites:
        msg = f"no operator of {type(model).__name__} ran: the calibration data never reached the model"
        return CalibrationError(msg)
    reasons = sorted({choice.reason for choice in choices if choice.quantizer is None})
    shown = "; ".join(reasons[:3]) or "it has no sites: see ff.show_source(type(model)) and ff.coverage(model, *inputs)"
    msg = f"scheme {scheme} quantized nothing in {type(model).__name__}: {shown}"
    return QuantizationError(msg)


def _summary(model: torch.nn.Module, batches: Batches, never: tuple[str, ...]) -> Coverage:
    return dataclasses.replace(measure(model, lambda: batches.run_first(model)), unreached=never)


def _convert(model: torch.nn.Module, batches: Batches) -> None:
    from fastforward.integer import convert

    convert(model, example_inputs=batches.first)


def _warn_unreached(sites: Sequence[str]) -> None:
    if sites:
        more = f" and {len(sites) - 10} more" if len(sites) > 10 else ""
        where = ", ".join(sites[:10]) + more
        msg = f"calibration never reached {where}: they stay float. Add data that does, or leave them so"
        warnings.warn(msg, QuantizationWarning, stacklevel=3)
