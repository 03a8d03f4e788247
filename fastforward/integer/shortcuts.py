"""Modules between integer layers: norms, activations and poolings handed a deferred result take it over directly.

Their own forward would do the same by way of ``torch.nn.functional`` and Python's dispatch, which costs more than what
remains of them once they are fused. In a ``torch.nn.Sequential`` nobody sees the tensors between a layer and what
follows it, so that none are made: the product itself goes from one to the next.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastforward.integer import epilogue
from fastforward.integer.deferred import Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation
from fastforward.integer.fusion import activate, fold_batch_norm
from fastforward.integer.layer import IntegerLayer
from fastforward.nn.ways import may_take_way, take_way, way_of

nn = torch.nn
Shortcut = Callable[[Any, Deferred], Any]
Follower = Callable[[Any, Product], Any]
"""What a module makes of the product before it; NotImplemented where it needs values."""


def _statistics(module: Any) -> tuple[Any, ...] | None:
    """The operands of a batch norm that uses running statistics, ``None`` of another."""
    # Past Module.__getattr__, which takes longer than what follows; a parametrized norm has no such parameters.
    parameters, buffers = module._parameters, module._buffers
    if module.training or "weight" not in parameters or "running_mean" not in buffers:
        return None
    return buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"], module.eps


def _batch_norm(module: Any, x: Deferred) -> Any:
    statistics = _statistics(module)
    return NotImplemented if statistics is None else fold_batch_norm(x, *statistics)


def _batch_norm_next(module: Any, product: Product) -> Any:
    statistics = _statistics(module)
    return NotImplemented if statistics is None else product.batch_normalized(*statistics)


def _dropout(module: Any, x: Any) -> Any:
    return NotImplemented if module.training else x


def _activation(of: Callable[[Any], Activation]) -> tuple[Shortcut, Follower]:
    """Both ways to take over a module whose activation ``of`` tells."""

    def shortcut(module: Any, x: Deferred) -> Any:
        return activate(x, of(module), getattr(module, "inplace", False))

    def follower(module: Any, product: Product) -> Any:
        return product.activated(of(module)) if product.activation is NO_ACTIVATION else NotImplemented

    return shortcut, follower


_RELU6 = epilogue.hardtanh(0.0, 6.0)
SHORTCUTS: dict[type[nn.Module], tuple[Shortcut, Follower]] = {
    nn.BatchNorm1d: (_batch_norm, _batch_norm_next),
    nn.BatchNorm2d: (_batch_norm, _batch_norm_next),
    nn.BatchNorm3d: (_batch_norm, _batch_norm_next),
    nn.Dropout: (_dropout, _dropout),
    nn.ReLU: _activation(lambda _: epilogue.RELU),
    nn.ReLU6: _activation(lambda _: _RELU6),
    nn.SiLU: _activation(lambda _: epilogue.SILU),
    nn.Hardswish: _activation(lambda _: epilogue.HARDSWISH),
    nn.GELU: _activation(lambda m: epilogue.GELU_TANH if m.approximate == "tanh" else epilogue.GELU_ERF),
}


def _float_class(cls: Any) -> Any:
    """The class that ``cls`` quantizes; of one that does not, itself."""
    return getattr(cls, "float_class", getattr(cls, "_ff_before", cls))


def take_shortcuts(model: nn.Module) -> None:
    """Let the modules of ``model`` that have a shortcut take it whenever they are handed a deferred result."""
    for module in model.modules():
        if may_take_way(module) and _float_class(type(module)) in SHORTCUTS:
            take_way(module, _with_shortcut)


def _with_shortcut(cls: Any) -> Callable[..., Any]:
    shortcut = SHORTCUTS[_float_class(cls)][0]

    def forward(self: Any, input: Any) -> Any:
        if type(input) is Deferred and _is_float_only(self):
            result = shortcut(self, input)
            if result is not NotImplemented:
                return result
        return cls.forward(self, input)

    return forward


def join_sequences(model: nn.Module) -> None:
    """Let the sequences of ``model`` hand the products of their layers on without making tensors of them."""
    for module in model.modules():
        forward = getattr(_float_class(type(module)), "forward", None)
        own = may_take_way(module) and forward is nn.Sequential.forward
        if own and any(isinstance(child, IntegerLayer) for child in module.children()):
            take_way(module, _joined)


def _joined(cls: Any) -> Callable[..., Any]:
    """``torch.nn.Sequential.forward`` for products."""

    def forward(self: Any, input: Any) -> Any:
        if torch.compiler.is_compiling() or _all_are_observed() or not _is_float_only(self):
            return cls.forward(self, input)
        value: Any = input
        for child in self._modules.values():
            result = NotImplemented if _is_observed(child) else _unseen(child, value)
            value = child(_tensor(value)) if result is NotImplemented else result
        return _tensor(value)

    return forward


def _unseen(module: Any, value: Any) -> Any:
    """What ``module`` makes of a tensor or product: either of them; NotImplemented if it is to be called."""
    if "forward" in module.__dict__:
        return NotImplemented
    if isinstance(module, IntegerLayer):
        result = module.follow(value) if isinstance(value, Product) else module.begin(value)
        return NotImplemented if result is None else result
    if way_of(module) is not _with_shortcut or not isinstance(value, Product) or not _is_float_only(module):
        return NotImplemented
    return SHORTCUTS[_float_class(type(module))][1](module, value)


def _is_float_only(module: Any) -> bool:
    """Whether no quantizer of ``module`` is active; most have none, for which ``getattr`` would look everywhere."""
    only: bool = module.__dict__.get("_float_only", True)
    return only


def _tensor(value: Any) -> Any:
    return value.layer.defer(value) if isinstance(value, Product) else value


def _all_are_observed() -> bool:
    """Whether hooks or a tracer see the calls of all modules."""
    m = torch.nn.modules.module
    forward = m._global_forward_hooks or m._global_forward_pre_hooks
    return bool(forward or m._global_backward_hooks or m._global_backward_pre_hooks or torch._C._get_tracing_state())


def _is_observed(module: Any) -> bool:
    """Whether hooks see the calls of ``module``."""
    state = module.__dict__
    forward = state["_forward_hooks"] or state["_forward_pre_hooks"]
    return bool(forward or state["_backward_hooks"] or state["_backward_pre_hooks"])
