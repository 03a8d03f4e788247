"""What one run shows: a model, its generated code and example inputs in, the sites that saw no floating tensor out."""

import ast
import copy
import types
import warnings
from collections.abc import Mapping
from typing import Any

import torch

import fastforward
from fastforward.autoquant.annotation_check import wrong_annotations
from fastforward.autoquant.classtext import ModuleText, StubPath
from fastforward.autoquant.render import render
from fastforward.exceptions import QuantizationWarning


def sites_without_tensors(
    module: torch.nn.Module, text: ModuleText, tree: ast.Module, example_inputs: Any
) -> dict[type, frozenset[StubPath]]:
    """Run a copy of the model, quantized with the generated classes, and see which stubs a floating tensor reached.

    Args:
        module: The float model; it is not changed.
        text: The text of its classes.
        tree: The generated module.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Returns:
        For each class, the ways to sites whose stub no floating tensor reached in any instance.
    """
    args, kwargs = call_arguments(example_inputs)
    _check_annotations(module, text, args, kwargs)
    classes = _generated_classes(text, tree)
    model = fastforward.nn.quantize_model(copy.deepcopy(module), extra_conversion=classes)
    recorder = _Recorder()
    quantizers = fastforward.nn.quantizer
    with (
        fastforward.nn.module.stubs_live(model),
        quantizers.recording(recorder),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
        model(*args, **kwargs)
    reached = _reached(model, text, recorder.seen)
    return {
        cls: frozenset(path for name, paths in stubs.items() if (cls, name) not in reached for path in paths)
        for cls, stubs in text.stubs.items()
    }


def _check_annotations(
    module: torch.nn.Module, text: ModuleText, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not text.graph.use_type_inference:
        return
    model = copy.deepcopy(module)
    with torch.random.fork_rng(), torch.no_grad():
        for message in wrong_annotations(text.graph.units(), lambda: model(*args, **kwargs)):
            warnings.warn(message, QuantizationWarning, stacklevel=4)


class _Recorder:
    def __init__(self) -> None:
        self.seen: set[int] = set()

    def record(self, quantizer: Any, tensor_in: torch.Tensor, tensor_out: torch.Tensor) -> torch.Tensor:
        self.seen.add(id(quantizer))
        return tensor_out


def _reached(model: torch.nn.Module, text: ModuleText, seen: set[int]) -> set[tuple[type, str]]:
    reached: set[tuple[type, str]] = set()
    for part in model.modules():
        cls = getattr(part, "float_class", None) or type(part)
        reached |= {(cls, name) for name in text.stubs.get(cls, ()) if id(part.__dict__.get(name)) in seen}
    return reached


def _generated_classes(text: ModuleText, tree: ast.Module) -> dict[type, type]:
    """The generated classes by float class; they leave no trace in the global map."""
    registered = fastforward.nn.module._module_map
    before = dict(registered)
    module = types.ModuleType("_ff_evidence")
    try:
        exec(compile(render(tree), "<autoquantize evidence>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    finally:
        registered.clear()
        registered.update(before)
    generated = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == "_ff_evidence"
    ]
    return {cls.float_class: cls for cls in generated}  # type: ignore[attr-defined]


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch."""
    if hasattr(example_inputs, "args") and hasattr(example_inputs, "kwargs"):
        return tuple(example_inputs.args), dict(example_inputs.kwargs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}
