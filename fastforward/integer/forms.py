"""Which simulated layers have an integer form, which one it is, and why others have none."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer.conv import IntegerConv, require_kernel
from fastforward.integer.dynamic import IntegerDynamicLinear, require_dynamic
from fastforward.integer.embedding import IntegerEmbedding, IntegerEmbeddingBag
from fastforward.integer.float8 import Float8Linear, require_float8
from fastforward.integer.grid import Grid, grid_of
from fastforward.integer.linear import IntegerLinear
from fastforward.integer.packed_linear import PackedLinear, require_packed
from fastforward.integer.recurrent import IntegerRecurrent, require_recurrent
from fastforward.integer.transposed import IntegerConvTranspose, require_transposed
from fastforward.integer.weight_only import WeightOnlyLinear, require_weight_only
from fastforward.integer.weights import require_integer
from fastforward.nn.call_paths import by_call_path
from fastforward.nn.conv import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from fastforward.nn.dynamic_quantizer import DynamicLinearQuantizer
from fastforward.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from fastforward.nn.float8_quantizer import DynamicFloat8Quantizer, Float8Quantizer
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.module import QuantizedModule
from fastforward.nn.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN

REASON = "_ff_float_reason"
"""Where a layer without integer form keeps the reason."""

Swap = Callable[..., Any]
"""Turns a layer into its integer form: ``swap(layer, keep_float=...)``."""


class Grids:
    """The input grids of a model; layers with equal grids share the object, and with it the codes of one value."""

    def __init__(self) -> None:
        self._known: dict[Any, Grid] = {}

    def of(self, layer: Any) -> Grid:
        """The grid of the layer's input.

        Raises:
            UnsupportedOperatorError: Integer kernels cannot take it.
        """
        return self.share(grid_of(layer.input_quantizer, getattr(layer, "smoothing", None)))

    def share(self, grid: Grid) -> Grid:
        """The grid equal to ``grid`` that was seen first."""
        first = self._known.setdefault(grid.key(), grid)
        first.shared = first is not grid
        return first


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One layer to convert, and how."""

    layer: QuantizedModule
    swap: Swap


def plan(model: torch.nn.Module, *, recursive: bool = True) -> Iterator[Step]:
    """Yield the layers that have an integer form; leave the reason on those that have not.

    Args:
        model: A calibrated model.
        recursive: Look at the modules below it too.
    """
    grids = Grids()
    for module in list(model.modules()) if recursive else [model]:
        form = next((form for cls, form in FORMS.items() if isinstance(module, cls)), None)
        if form is None or module._float_only or getattr(module, "holds_integers", False):
            continue
        try:
            yield Step(module, form(module, grids))  # type: ignore[arg-type]
        except UnsupportedOperatorError as error:
            object.__setattr__(module, REASON, str(error))


def _linear(layer: Any, grids: Grids) -> Swap:
    if layer.input_quantizer.is_stub() and not layer.weight_quantizer.is_stub() and type(layer) is QuantizedLinear:
        if layer.weight.device.type != "cpu":
            require_packed(layer)
            return PackedLinear.swap
        require_weight_only(layer)
        return WeightOnlyLinear.swap
    if isinstance(layer.input_quantizer, DynamicLinearQuantizer) and not layer.weight_quantizer.is_stub():
        require_dynamic(layer)
        return IntegerDynamicLinear.swap
    if isinstance(layer.input_quantizer, Float8Quantizer | DynamicFloat8Quantizer):
        require_float8(layer)
        return Float8Linear.swap
    _require_quantized(layer, "input", "weight")
    require_integer(layer.weight_quantizer, layer.weight.shape)
    _require_one_grid(layer)
    grid = grids.of(layer)
    return lambda layer, **options: IntegerLinear.swap(layer, grid, **options)


def _conv(layer: Any, grids: Grids) -> Swap:
    _require_quantized(layer, "input", "weight")
    require_integer(layer.weight_quantizer, layer.weight.shape)
    require_kernel(layer)
    _require_one_grid(layer)
    grid = grids.of(layer)
    return lambda layer, **options: IntegerConv.swap(layer, grid, **options)


def _transposed(layer: Any, grids: Grids) -> Swap:
    _require_quantized(layer, "input", "weight")
    require_transposed(layer)
    _require_one_grid(layer)
    grid = grids.of(layer)
    return lambda layer, **options: IntegerConvTranspose.swap(layer, grid, **options)


def _embedding(layer: Any, grids: Grids) -> Swap:
    _require_quantized(layer, "weight")
    require_integer(layer.weight_quantizer, layer.weight.shape)
    if layer.max_norm is not None:
        msg = "an embedding with max_norm changes its table on every call"
        raise UnsupportedOperatorError(msg)
    _require_one_grid(layer)
    return IntegerEmbeddingBag.swap if isinstance(layer, QuantizedEmbeddingBag) else IntegerEmbedding.swap


def _recurrent(layer: Any, grids: Grids) -> Swap:
    require_recurrent(layer)
    return IntegerRecurrent.swap


def _require_quantized(layer: Any, *roles: str) -> None:
    for role in roles:
        if getattr(layer, f"{role}_quantizer").is_stub():
            msg = f"its {role} is not quantized"
            raise UnsupportedOperatorError(msg)


def _require_one_grid(layer: QuantizedModule) -> None:
    """An integer layer knows one grid for its input and one for its output, whoever calls it."""
    for name, quantizers in by_call_path(layer).items():
        active = [quantizer for quantizer in quantizers if not quantizer.is_stub()]
        if active and (len(active) < len(quantizers) or len({grid_of(q).key() for q in active}) > 1):
            msg = f"it is called from {len(quantizers)} places, and its {name} has another range in each of them"
            raise UnsupportedOperatorError(msg)


FORMS: dict[type[QuantizedModule], Callable[[Any, Grids], Swap]] = {
    QuantizedLinear: _linear,
    QuantizedConv1d: _conv,
    QuantizedConv2d: _conv,
    QuantizedConv3d: _conv,
    QuantizedConvTranspose1d: _transposed,
    QuantizedConvTranspose2d: _transposed,
    QuantizedConvTranspose3d: _transposed,
    QuantizedEmbedding: _embedding,
    QuantizedEmbeddingBag: _embedding,
    QuantizedLSTM: _recurrent,
    QuantizedGRU: _recurrent,
    QuantizedRNN: _recurrent,
}
