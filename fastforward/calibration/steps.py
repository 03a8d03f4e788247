"""The steps that a scheme can name: what is done to a model beside rounding, so that rounding costs less.

``fold_batch_norm``
    A batch norm that alone follows a convolution or linear layer becomes part of its weights.
``smooth``
    Scale is moved from the inputs of linear layers to their weights; layers that share an input share the scale. It is
    folded into the norm or linear layer before where that feeds nothing else, and stays a multiplication where not.
``round_weights``
    Weights of linear layers are rounded with error feedback instead of each to its nearest integer.
``correct_bias``
    The mean error at a layer's output is taken off its bias.

Steps change parameters: the model's float values are then those that rounding leaves.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastforward.calibration import batch_norm, bias_correction, weight_rounding
from fastforward.calibration.error_feedback import LastFeedback
from fastforward.calibration.flow import Flow
from fastforward.calibration.linear_inputs import LinearInputs, linear_inputs
from fastforward.calibration.samples import SampledCall, Samples
from fastforward.calibration.smoothing import SmoothingGroup, smooth, smoothing_groups
from fastforward.calibration.smoothing_fold import fold_into, producer
from fastforward.calibration.undo import Undo
from fastforward.nn.rewritten import RewrittenModule

STEPS = ("fold_batch_norm", "smooth", "round_weights", "correct_bias")


def require_known(steps: Iterable[str]) -> None:
    """Raise ValueError for a step that does not exist."""
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        msg = f"unknown step {unknown[0]!r}; known steps: {', '.join(STEPS)}"
        raise ValueError(msg)


def fold_batch_norms(model: torch.nn.Module, flow: Flow, samples: Samples, undo: Undo) -> bool:
    """Fold every batch norm that can be.

    Returns:
        Whether ``samples`` still hold: they follow the change where they can.
    """
    modules = dict(model.named_modules())
    sites = {site.module: site for site in flow.sites}
    hold = True
    for pair in list(batch_norm.foldable(model, flow)):
        layer, norm = modules[pair.layer], modules[pair.norm]
        undo.keep_values(layer)
        undo.keep_values(norm)
        without_bias = layer.bias is None
        batch_norm.fold(layer, norm)
        if without_bias:
            samples.replace(sites[pair.layer], bias=layer.bias)
            hold = hold and not isinstance(layer, RewrittenModule)  # what such code does with a bias shows in a run
        hold = hold and samples.refer_to(sites[pair.layer], _weight(layer))
    return hold


def _weight(layer: torch.nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def smooth_linears(model: torch.nn.Module, flow: Flow, samples: Samples, undo: Undo) -> tuple[dict[str, Tensor], bool]:
    """Search and set the smoothing of every linear layer that can have one.

    Returns:
        The smoothings that the layers apply themselves, by input quantizer; and whether ``samples`` still hold: they
        follow where a smoothing is folded into what comes before instead, as far as they can.
    """
    chosen: dict[str, Tensor] = {}
    hold = True
    shared = shared_parameters(model)
    for group in smoothing_groups(model, flow, samples):
        scale, _ = smooth(group)
        if scale is None:
            continue
        owned = all(id(layer.weight) not in shared for layer in group.layers.values())
        source = producer(model, flow, group.layers, shared) if owned else None
        if source is not None:
            fold_into(source, group.layers.values(), scale, undo)
            hold = _follow(model, flow, samples, group, source, scale) and hold
            continue
        for path, layer in group.layers.items():
            layer.smoothing = scale.clone()
            chosen[f"{path}.input_quantizer" if path else "input_quantizer"] = scale
    return chosen, hold


def _follow(
    model: torch.nn.Module, flow: Flow, samples: Samples, group: SmoothingGroup, source: torch.nn.Module, scale: Tensor
) -> bool:
    """Let ``samples`` follow a smoothing folded into ``source``; return whether they do."""
    linear = [site for site in flow.sites if site.operator == "linear"]
    samples.divide_inputs([site for site in linear if site.module in group.layers], scale)
    changed = {source, *group.layers.values()}
    paths = {path: module for path, module in model.named_modules() if module in changed}
    return all(samples.refer_to(site, _weight(paths[site.module])) for site in linear if site.module in paths)


def refine_linears(model: torch.nn.Module, flow: Flow, samples: Samples, steps: Iterable[str], undo: Undo) -> None:
    """Round weights and correct biases of linear layers, as far as ``steps`` says."""
    steps = frozenset(steps)
    shared, last = shared_parameters(model), LastFeedback()
    for inputs in linear_inputs(model, flow, samples):
        corrected = "correct_bias" in steps and _owns_bias(inputs.layer, shared)
        rounded = "round_weights" in steps and id(inputs.layer.weight) not in shared
        undo.keep_values(inputs.layer)
        with torch.no_grad():
            exact = inputs.exact() if corrected else None
            if rounded and weight_rounding.can_round(inputs):
                weight = weight_rounding.round_weight(inputs, mean_absorbed=corrected, last=last)
                inputs.layer.weight.copy_(weight)
            if exact is not None:
                _add_to_bias(inputs.layer, bias_correction.linear_shift(inputs, exact))


def correct_conv_biases(model: torch.nn.Module, flow: Flow, samples: Samples, undo: Undo) -> None:
    """Correct the biases of convolutions that run at one site."""
    modules = dict(model.named_modules())
    shared = shared_parameters(model)
    for path, call in _conv_calls(flow, samples):
        layer = modules[path]
        if _owns_bias(layer, shared):
            undo.keep_values(layer)
            with torch.no_grad():
                _add_to_bias(layer, bias_correction.conv_shift(call, layer))


def _conv_calls(flow: Flow, samples: Samples) -> list[tuple[str, SampledCall]]:
    sites = [site for site in flow.sites if site.operator in ("conv1d", "conv2d", "conv3d")]
    modules = [site.module for site in sites]
    return [
        (site.module, samples.calls[site.number][0])
        for site in sites
        if modules.count(site.module) == 1 and samples.calls.get(site.number)
    ]


def _owns_bias(layer: torch.nn.Module, shared: frozenset[int]) -> bool:
    bias = getattr(layer, "bias", None)
    return isinstance(bias, Tensor) and id(bias) not in shared


def _add_to_bias(layer: torch.nn.Module, shift: Tensor) -> None:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    if bool(torch.isfinite(shift).all()):
        bias.add_(shift.to(bias.dtype))


def shared_parameters(model: torch.nn.Module) -> frozenset[int]:
    """Ids of parameters that more than one module holds, such as tied embeddings."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return frozenset(shared)


__all__ = [
    "STEPS",
    "LinearInputs",
    "correct_conv_biases",
    "fold_batch_norms",
    "refine_linears",
    "require_known",
    "shared_parameters",
    "smooth_linears",
]
