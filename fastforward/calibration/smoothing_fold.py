"""Folding a smoothing into the layer that makes the value, so that nothing is left to multiply at run time.

It is allowed where the recorded flow says that a norm or linear layer makes the value, and that the smoothed layers
alone use it. Between them may stand activations ``f`` for which ``f(s * x) = s * f(x)`` with any positive ``s``.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastforward.calibration.flow import Flow, Site
from fastforward.calibration.undo import Undo
from fastforward.nn.linear import QuantizedLinear

_PRODUCERS: Mapping[str, tuple[type[torch.nn.Module], ...]] = {
    "layer_norm": (torch.nn.LayerNorm,),
    "rms_norm": (torch.nn.RMSNorm,),
    "linear": (torch.nn.Linear,),
}
_HOMOGENEOUS = ("relu", "leaky_relu")


def producer(
    model: torch.nn.Module, flow: Flow, layers: Iterable[str], shared: frozenset[int]
) -> torch.nn.Module | None:
    """The module that alone makes the input of ``layers`` and feeds nothing else; ``None`` if there is none.

    Args:
        model: The model.
        flow: Recorded from it.
        layers: Module paths of linear layers that share their input.
        shared: Ids of parameters that several modules hold; they are not folded into.
    """
    paths = set(layers)
    sites = [site for site in flow.sites if site.operator == "linear" and site.module in paths]
    inputs = [operand for site in sites for operand in site.operands if operand.argument == "input"]
    made_by = {operand.producer if operand.direct else None for operand in inputs}
    number = made_by.pop() if len(made_by) == 1 else None
    if number is None or flow.consumers.get(number) != frozenset(site.number for site in sites):
        return None
    source = _before_activations(flow, number)
    return None if source is None else _foldable(model, flow, source, shared)


def _before_activations(flow: Flow, number: int) -> Site | None:
    """The site ``number``, or what alone feeds it through homogeneous activations; ``None`` if others do or are fed."""
    site = flow.sites[number]
    while site.operator in _HOMOGENEOUS:
        sources = [source for source, consumers in flow.consumers.items() if site.number in consumers]
        if len(sources) != 1 or flow.consumers[sources[0]] != frozenset({site.number}):
            return None
        # More calls than of the source: other values, which have no source among the sites, come here too.
        if (sources[0], site.number) in flow.moved or flow.sites[sources[0]].calls != site.calls:
            return None
        site = flow.sites[sources[0]]
    return site


def _foldable(model: torch.nn.Module, flow: Flow, site: Site, shared: frozenset[int]) -> torch.nn.Module | None:
    module = dict(model.named_modules()).get(site.module)
    if not isinstance(module, _PRODUCERS.get(site.operator, ())):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    alone = sum(other.module == site.module for other in flow.sites) == 1
    free = not any(id(parameter) in shared for parameter in (weight, bias) if parameter is not None)
    vector = isinstance(module, torch.nn.Linear) or (weight is not None and weight.dim() == 1)
    return module if alone and free and vector and weight is not None else None


def fold_into(module: torch.nn.Module, layers: Iterable[QuantizedLinear], scale: Tensor, undo: Undo) -> None:
    """Divide what ``module`` makes by ``scale``, and multiply the weights that use it."""
    layers = list(layers)
    for changed in (module, *layers):
        undo.keep_values(changed)
    with torch.no_grad():
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        weight.div_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.div_(scale.to(bias.dtype))
        for layer in layers:
            layer.weight.mul_(scale.to(layer.weight.dtype))
