"""convert(): a calibrated model becomes an integer one, in place."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fastforward.exceptions import CalibrationError, QuantizationError
from fastforward.integer import attention, fusion, onednn, own_code, own_weights
from fastforward.integer.bypass import bypass_rewriting
from fastforward.integer.deferred import Deferred
from fastforward.integer.forms import plan
from fastforward.integer.islands import speed_up
from fastforward.integer.linear import IntegerLinear
from fastforward.integer.measured import MeasuredLayer
from fastforward.integer.measured_rows import MeasuredRows
from fastforward.integer.recurrent import IntegerRecurrent
from fastforward.integer.shared import forget
from fastforward.integer.shortcuts import join_sequences, take_shortcuts
from fastforward.nn.call_paths import pending_quantizers
from fastforward.nn.conversion import integer_layers
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer

BACKENDS = ("auto", "onednn", "int_mm", "kernels")
_LEARNING_RUNS = 3
_MEASURING_RUNS = 8
"""At most so many where layers time their kernels in place."""
_MEASURED = (IntegerLinear, MeasuredLayer, MeasuredRows, IntegerRecurrent)
"""Layers whose kernels may be chosen by measurement."""


def convert(
    model: torch.nn.Module, *, backend: str = "auto", example_inputs: Any = None, keep_float: bool = False
) -> torch.nn.Module:
    """Turn calibrated linear and recurrent layers, convolutions and embeddings into integer ones, in place.

    Weights become int8 once and their float form is released. A layer whose quantizers have no integer form stays
    simulated; :func:`fastforward.integer.explain` says why.

    Args:
        model: A model whose quantizers are calibrated.
        backend: ``"auto"``, or the kernel of every linear layer: ``"onednn"``, ``"int_mm"`` (torch's plain integer
            product) or ``"kernels"`` (the operators of ``fastforward_kernels``; what GPUs use).
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments. The model runs on it a few
            times: kernels are chosen by measurement for its shapes, and layers learn what follows them. Without it
            kernels follow a table of defaults, and layers learn from the first calls.
        keep_float: Keep the float weights beside the integers.

    Returns:
        ``model``.

    Raises:
        CalibrationError: A quantizer has no range yet; the message names it. The model is unchanged.
        QuantizationError: There is nothing to convert.
        ValueError: ``backend`` is unknown.
    """
    if backend not in BACKENDS:
        msg = f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
        raise ValueError(msg)
    require_calibrated(model)
    steps = list(plan(model))
    for step in steps:
        step.swap(step.layer, keep_float=keep_float)
    finish(model, [step.layer for step in steps], backend, example_inputs)
    if not keep_float:
        own_weights.release(model)
    return model


def finish(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], backend: str = "auto", example_inputs: Any = None
) -> torch.nn.Module:
    """What follows once every layer of ``model`` that has an integer form has got it.

    Args:
        model: The model.
        layers: Those that have got it now.
        backend: As in :func:`convert`.
        example_inputs: As in :func:`convert`.

    Returns:
        ``model``.
    """
    for layer in layers:
        if isinstance(layer, _MEASURED):
            layer.start(backend, measure=example_inputs is not None)
    for _, quantizer in (*_quantizers(model), *pending_quantizers(model)):
        if not quantizer.is_stub() and "parameter" not in quantizer.quant_metadata:
            speed_up(quantizer)
    own_weights.take_over(model, backend, measure=example_inputs is not None)
    take_shortcuts(model)
    join_sequences(model)
    bypass_rewriting(model)
    if example_inputs is not None:
        learn(model, example_inputs)
    return model


def require_calibrated(model: torch.nn.Module) -> None:
    """Raise unless the model has active quantizers and all of them have a range."""
    known = (*_quantizers(model), *pending_quantizers(model))
    active = [(name, quantizer) for name, quantizer in known if not quantizer.is_stub()]
    missing = [name for name, quantizer in active if not quantizer.is_calibrated]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        msg = (
            f"cannot convert: {len(missing)} of {len(active)} quantizers have no range yet: {shown}. Run data inside "
            "'with ff.estimate_ranges(model, ff.observers.MinMax):' first, or use ff.quantize(model, data)"
        )
        raise CalibrationError(msg)
    if not active:
        what = "is integer already" if integer_layers(model) else "has no quantizers"
        msg = f"nothing to convert: {type(model).__name__} {what}. Call ff.quantize(model, data) on a float model first"
        raise QuantizationError(msg)


def learn(model: torch.nn.Module, example_inputs: Any) -> None:
    """Run the model a few times without gradients, so that layers measure kernels and see what follows them."""
    in_place = [module for module in model.modules() if isinstance(module, MeasuredRows)]
    with torch.no_grad():
        for run in range(_MEASURING_RUNS):
            if run >= _LEARNING_RUNS and not any(layer.undecided for layer in in_place):
                break
            forget()  # what a layer makes of its input counts, though this input comes again
            for result in torch.utils._pytree.tree_leaves(call(model, example_inputs)):
                if type(result) is Deferred:
                    result.materialize()
    for module in model.modules():
        if isinstance(module, _MEASURED):
            module.measures = False
    for layer in in_place:
        layer.settle()
    for _, rounding in own_weights.roundings(model):
        rounding.settle()


def call(model: torch.nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of positional or a mapping of keyword arguments."""
    if hasattr(inputs, "args") and hasattr(inputs, "kwargs"):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _quantizers(model: torch.nn.Module) -> Iterator[tuple[str, Quantizer]]:
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for name, quantizer in module.own_quantizers().items():
                yield f"{path}.{name}" if path else name, quantizer


__all__ = ["BACKENDS", "attention", "convert", "fusion", "learn", "onednn", "own_code", "require_calibrated"]
