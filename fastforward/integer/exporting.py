"""export(): a quantized model as a program of ATen operators alone, which runs where fastforward is not installed."""

from collections.abc import Mapping
from typing import Any

import torch

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer.own_weights import as_floats
from fastforward.nn.module import QuantizedModule
from fastforward.nn.ways import off_way

# Namespaces of operators that every torch brings along.
_BUNDLED = frozenset({"aten", "prims", "onednn", "quantized", "quantized_decomposed", "higher_order", "_operator"})


def export(model: torch.nn.Module, inputs: Any, *, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    """Lower a simulated or integer model to operators that torch itself brings along.

    The program, and its AOTInductor package, load and run in a process without fastforward::

        program = ff.export(model, inputs)
        torch.export.save(program, "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path="model_aoti.pt2")

    Args:
        model: A quantized model; it is exported in evaluation mode and without gradients.
        inputs: A tensor, a tuple (positional arguments) or a mapping (keyword arguments).
        dynamic_shapes: As in ``torch.export.export``.

    Returns:
        The exported program.

    Raises:
        TypeError: ``model`` is no module.
        UnsupportedOperatorError: The program holds an operator that only fastforward or the user's code defines; names
            each with its place in the source.
    """
    if not isinstance(model, torch.nn.Module):
        msg = f"export: expected a torch.nn.Module, got {type(model).__name__}"
        raise TypeError(msg)
    args, kwargs = _arguments(inputs)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Before torch 2.7 the exporter looks for the code of the outermost module.
        with torch.no_grad(), as_floats(model), off_way(model):
            if any(isinstance(module, QuantizedModule) for module in model.modules()):
                model(*args, **kwargs)  # call sites learn what they reach; a tracer could not tell them
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    finally:
        for module in training:
            module.training = True
    _require_bundled(program)
    return program


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if hasattr(inputs, "args") and hasattr(inputs, "kwargs"):  # an ff.Call
        return tuple(inputs.args), dict(inputs.kwargs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _require_bundled(program: torch.export.ExportedProgram) -> None:
    foreign = {
        str(node.target): (node.stack_trace or "").strip().splitlines()[-2:]
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _BUNDLED
    }
    if foreign:
        listed = "; ".join(f"{name} at {' '.join(place).strip()}" for name, place in sorted(foreign.items()))
        msg = (
            f"export: these operators exist only where their library is installed: {listed}. Skip the layer in "
            "ff.quantize_model, or convert it with a backend that lowers to ATen."
        )
        raise UnsupportedOperatorError(msg)
