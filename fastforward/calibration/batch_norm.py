"""Batch-norm folding: a batch norm that alone follows a convolution or linear layer becomes part of its weights.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
section 3.2.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastforward.calibration.flow import Flow, Site

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
# Layer class of each operator, and how many axes follow that of the channels in its output.
_LAYERS = {
    "linear": (torch.nn.Linear, 0),
    "conv1d": (torch.nn.Conv1d, 1),
    "conv2d": (torch.nn.Conv2d, 2),
    "conv3d": (torch.nn.Conv3d, 3),
}


@dataclasses.dataclass(frozen=True)
class FoldablePair:
    """A layer and the batch norm that alone uses its result, by module path."""

    layer: str
    norm: str


def foldable(model: torch.nn.Module, flow: Flow) -> Iterator[FoldablePair]:
    """The pairs that one run shows: each module runs at one site, and the norm alone uses the channels of the layer."""
    modules = dict(model.named_modules())
    sites: dict[str, list[Site]] = {}
    for site in flow.sites:
        sites.setdefault(site.module, []).append(site)
    for producer, consumers in flow.consumers.items():
        layer = flow.sites[producer]
        if len(consumers) != 1 or min(consumers) < 0:
            continue
        norm = flow.sites[min(consumers)]
        alone = all(len(sites[site.module]) == 1 for site in (layer, norm))
        if not alone or norm.operator != "batch_norm" or layer.operator not in _LAYERS:
            continue
        if _fits(modules[layer.module], layer, modules[norm.module]) and _same_channels(flow, layer, norm):
            yield FoldablePair(layer.module, norm.module)


def _same_channels(flow: Flow, layer: Site, norm: Site) -> bool:
    """Whether the axis that the norm works on, the second, is that of the layer's output channels."""
    after = _LAYERS[layer.operator][1] + 1
    layouts = flow.layouts.get((layer.number, norm.number), frozenset())
    return all(layout.axes[1] == layout.dims - after for layout in layouts)


def _fits(layer: torch.nn.Module, site: Site, norm: torch.nn.Module) -> bool:
    if not isinstance(layer, _LAYERS[site.operator][0]) or not isinstance(norm, _NORMS):
        return False
    owned = "weight" in layer._parameters and layer.weight is not None
    return owned and isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)


def fold(layer: torch.nn.Module, norm: torch.nn.Module) -> None:
    """Move the norm's scale and shift into the layer; the norm is left as an identity.

    Args:
        layer: A convolution or linear layer; it gets a bias if it has none.
        norm: A batch norm with running statistics, in evaluation mode.
    """
    assert isinstance(norm, _NORMS)
    weight, mean, variance = layer.weight, norm.running_mean, norm.running_var
    assert isinstance(weight, Tensor) and isinstance(mean, Tensor) and isinstance(variance, Tensor)
    with torch.no_grad():
        scale = torch.rsqrt(variance.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -mean.double() * scale if norm.bias is None else norm.bias.double() - mean.double() * scale
        if isinstance(layer.bias, Tensor):
            shift = shift + layer.bias.double() * scale
            layer.bias.copy_(shift)
        else:
            layer.bias = torch.nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
        mean.zero_()
        variance.fill_(1 - norm.eps)
        for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if isinstance(parameter, Tensor):
                parameter.fill_(value)
