"""Activation smoothing: scale moved from a linear layer's inputs to its weights, before either is quantized.

Some channels of an activation are far larger than the others and set the range of all. Dividing each channel by ``s``
and multiplying the weight's column by it leaves the product as it is (Xiao et al., "SmoothQuant", 2023). Here
``s = max|x| ** strength`` per channel, to a geometric mean of one; the strength is searched for every layer by the
error of its output.

The error is measured on rows that the ranges were not taken from (cross-validation): a strength that fits its own rows
exactly leaves no room for others, and costs 1.3 dB on MiniLM.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastforward.calibration.flow import Flow
from fastforward.calibration.samples import Samples
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.quantization.granularity import Granularity, PerTensor, blocked, min_max

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FOLDS = 4
MARGIN = 0.9
"""Smoothing has to lower the error below this share: it costs a multiplication, and a small gain is chance."""
CLIPPED = 0.9
"""Share of the range that is tried without smoothing: what a tighter range gains takes no multiplication."""
SEARCH_ROWS = 384
SEARCH_CHANNELS = 2048
"""Most output channels of a layer that are judged: they are alike, the few rows are what the error depends on."""
_SMALLEST = 1e-5
_AT_ONCE = 1 << 18
"""Elements of a weight that are rounded at once: temporaries then stay in the cache."""


@dataclasses.dataclass(frozen=True)
class SmoothingGroup:
    """Linear layers that multiply one and the same value, and a sample of that value.

    Attributes:
        layers: By module path.
        rows: ``[rows, in_features]``.
    """

    layers: Mapping[str, QuantizedLinear]
    rows: Tensor


def smoothing_groups(model: torch.nn.Module, flow: Flow, samples: Samples) -> Iterator[SmoothingGroup]:
    """The groups of layers that can be smoothed: a static quantizer per tensor on the input, and a sample of it."""
    rows = sampled_rows(flow, samples)
    layers = {
        f"{path}.input_quantizer" if path else "input_quantizer": (path, module)
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and path in rows and _smoothable(module)
    }
    together = [group for group in flow.shared if all(name in layers for name in group)]
    alone = [frozenset({name}) for name in layers if not any(name in group for group in flow.shared)]
    for group in (*together, *alone):
        members = dict(layers[name] for name in sorted(group))
        yield SmoothingGroup(members, torch.cat(rows[next(iter(members))]))


def sampled_rows(flow: Flow, samples: Samples) -> dict[str, list[Tensor]]:
    """By module path, the sampled inputs of every linear layer that runs at one site only: ``[rows, in]`` a call."""
    found: dict[str, list[Tensor]] = {}
    runs: dict[str, int] = {}
    for site in flow.sites:
        if site.operator == "linear":
            runs[site.module] = runs.get(site.module, 0) + 1
            calls = samples.calls.get(site.number, ())
            found.setdefault(site.module, []).extend(call.arguments["input"] for call in calls)
    return {path: blocks for path, blocks in found.items() if blocks and runs[path] == 1}


def _smoothable(layer: QuantizedLinear) -> bool:
    quantizer, weight = layer.input_quantizer, layer.weight_quantizer
    if not (isinstance(quantizer, LinearQuantizer) and isinstance(weight, LinearQuantizer)):
        return False
    return isinstance(quantizer.granularity, PerTensor) and layer.smoothing is None


@contextlib.contextmanager
def without_smoothing(model: torch.nn.Module) -> Iterator[None]:
    """Within the block linear layers take their input as it comes, and recorders see it so."""
    smoothed = {module: module.smoothing for module in model.modules() if isinstance(module, QuantizedLinear)}
    try:
        for layer in smoothed:
            layer.smoothing = None
        yield
    finally:
        for layer, scale in smoothed.items():
            layer.smoothing = scale


def smooth(group: SmoothingGroup) -> tuple[Tensor | None, float]:
    """Search the strength for a group.

    Returns:
        The divisor of the input, ``[in_features]``, or ``None`` where smoothing does not help; and the strength.
    """
    strength = best_strength(group)
    if strength == 0.0:
        return None, 0.0
    return divisor(group.rows, strength), strength


def divisor(rows: Tensor, strength: float) -> Tensor:
    """``max|x| ** strength`` per channel, divided by its geometric mean."""
    return _divisor(*_extremes(rows.float()), strength)


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel. Dividing keeps their order: they stand for all rows in the search."""
    return rows.amin(0), rows.amax(0)


def _divisor(low: Tensor, high: Tensor, strength: float) -> Tensor:
    largest = torch.maximum(-low, high).clamp_min(_SMALLEST)
    scale = largest**strength
    return scale / scale.log().mean().exp()


@torch.no_grad()
def best_strength(group: SmoothingGroup, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength of least output error on held-out rows; no smoothing where there are too few rows to tell."""
    rows = group.rows.float()
    if rows.shape[0] < 2 * FOLDS:
        return 0.0
    weights = {path: _judged_parts(layer) for path, layer in group.layers.items()}
    errors, clipped = dict.fromkeys(strengths, 0.0), 0.0
    bounds = torch.linspace(0, rows.shape[0], FOLDS + 1).long().tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        others = _extremes(torch.cat([rows[:start], rows[end:]]))
        held_out = rows[start:end][:: max(1, (end - start) * FOLDS // SEARCH_ROWS)]
        exact = {path: _Exact.of(held_out, parts) for path, parts in weights.items()}
        for strength in strengths:
            errors[strength] += _held_out_error(group, strength, others, held_out, exact)
        clipped += _held_out_error(group, 0.0, _clipped(*others), held_out, exact)
    best = min(errors, key=lambda strength: errors[strength])
    return best if errors[best] < MARGIN * min(errors.get(0.0, math.inf), clipped) else 0.0


@dataclasses.dataclass(frozen=True)
class _Exact:
    """What a float layer makes of some rows: parts of its weight, their products with the rows, their squares' sum."""

    parts: tuple[Tensor, ...]
    products: tuple[Tensor, ...]
    squares: float

    @classmethod
    def of(cls, rows: Tensor, parts: tuple[Tensor, ...]) -> "_Exact":
        products = tuple(torch.nn.functional.linear(rows, part) for part in parts)
        return cls(parts, products, sum(float(product.square().sum()) for product in products))


def _judged_parts(layer: QuantizedLinear) -> tuple[Tensor, ...]:
    """The weight of output channels spread over all, float32; those of a part are rounded at once.

    All in one part where the range of a channel depends on others.
    """
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    assert isinstance(quantizer, LinearQuantizer)
    if quantizer.granularity.block_size(weight.shape)[0] > 1 or quantizer.allow_one_sided:
        return (weight.float(),)
    judged = weight[:: -(-len(weight) // SEARCH_CHANNELS)].float()
    return torch.split(judged, max(_AT_ONCE // max(judged.shape[1], 1), 1))


def _clipped(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The extremes of each channel, where those of all channels keep only a share of their range."""
    return low.clamp_min(low.amin() * CLIPPED), high.clamp_max(high.amax() * CLIPPED)


def _held_out_error(
    group: SmoothingGroup,
    strength: float,
    others: tuple[Tensor, Tensor],
    held_out: Tensor,
    exact: Mapping[str, _Exact],
) -> float:
    scale = _divisor(*others, strength)
    layer = next(iter(group.layers.values()))
    low, high = (bound / scale for bound in others)
    quantized = _round_between(layer.input_quantizer, low.amin(), high.amax(), held_out / scale)
    error = 0.0
    for path, member in group.layers.items():
        squares = 0.0
        for part, product in zip(exact[path].parts, exact[path].products, strict=True):
            scaled = part * scale
            bounds = min_max(scaled, _granularity(member.weight_quantizer))
            rounded = _round_between(member.weight_quantizer, *bounds, scaled)
            squares += float(torch.nn.functional.linear(quantized, rounded).sub_(product).square_().sum())
        error += squares / max(exact[path].squares, 1e-30)
    return error


def _granularity(quantizer: object) -> Granularity:
    assert isinstance(quantizer, LinearQuantizer)
    return quantizer.granularity


def _round_between(quantizer: object, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    """Round ``x`` with ``low`` to ``high`` as the range."""
    assert isinstance(quantizer, LinearQuantizer)
    granularity = quantizer.granularity
    parameters = quantizer.grid.parameters_for_range(low, high)
    spread = (granularity.spread(parameter, x.shape) for parameter in parameters)
    return quantizer.grid.round(blocked(x, granularity.block_size(x.shape)), *spread).reshape(x.shape)
