"""Modules between integer layers: norms, activations and poolings handed a deferred result take it over directly.

Their own forward would do the same by way of ``torch.nn.functional`` and Python's dispatch, which costs more than what
remains of them once they are fused.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastforward.integer import epilogue
from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import activate, fold_batch_norm

nn = torch.nn
Shortcut = Callable[[Any, Deferred], Any]


def _batch_norm(module: Any, x: Deferred) -> Any:
    if module.training:
        return NotImplemented
    # Past Module.__getattr__, which takes longer than what follows; a parametrized norm has no such parameters.
    parameters, buffers = module._parameters, module._buffers
    if "weight" not in parameters or "running_mean" not in buffers:
        return NotImplemented
    statistics = buffers["running_mean"], buffers["running_var"]
    return fold_batch_norm(x, *statistics, parameters["weight"], parameters["bias"], module.eps)


def _relu(module: Any, x: Deferred) -> Any:
    return activate(x, epilogue.RELU, module.inplace)


def _relu6(module: Any, x: Deferred) -> Any:
    return activate(x, epilogue.hardtanh(0.0, 6.0), module.inplace)


def _silu(module: Any, x: Deferred) -> Any:
    return activate(x, epilogue.SILU, module.inplace)


def _hardswish(module: Any, x: Deferred) -> Any:
    return activate(x, epilogue.HARDSWISH, module.inplace)


def _gelu(module: Any, x: Deferred) -> Any:
    return activate(x, epilogue.GELU_TANH if module.approximate == "tanh" else epilogue.GELU_ERF)


SHORTCUTS: dict[type[nn.Module], Shortcut] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.SiLU: _silu,
    nn.Hardswish: _hardswish,
    nn.GELU: _gelu,
}


def take_shortcuts(model: nn.Module) -> None:
    """Let the modules of ``model`` that have a shortcut take it whenever they are handed a deferred result."""
    for module in model.modules():
        shortcut = SHORTCUTS.get(getattr(type(module), "float_class", type(module)))
        if shortcut is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = functools.partial(_forward, module, shortcut)


def _forward(module: Any, shortcut: Shortcut, input: Any) -> Any:
    if type(input) is Deferred and getattr(module, "_float_only", True):
        result = shortcut(module, input)
        if result is not NotImplemented:
            return result
    return type(module).forward(module, input)
