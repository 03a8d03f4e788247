"""Merged: one product for several linear layers that multiply the same codes.

Query, key and value each become codes on a grid of their own. The scale of a grid goes into the scale per channel and
its zero point into the bias, so that one kernel call over all channels stores every result on its own grid.
"""

from collections.abc import Sequence

import torch

from fastforward.integer import onednn
from fastforward.integer.deferred import Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Epilogue
from fastforward.integer.grid import LEVELS, Grid
from fastforward.integer.linear import IntegerLinear

UNIT = Grid(1.0, 0)


class Merged:
    """The weights of ``layers``, stacked, whose results are codes on ``grids``."""

    def __init__(self, layers: Sequence[IntegerLinear], grids: Sequence[Grid]) -> None:
        self.layers, self.grids = tuple(layers), tuple(grids)
        self.epilogues = tuple(layer.epilogue for layer in layers)
        weight = torch.cat([layer.weight_int8 for layer in layers])
        self.packed = torch.ops.onednn.qlinear_prepack.default(weight, None)
        folded = [epilogue.on(grid) for epilogue, grid in zip(self.epilogues, grids, strict=True)]
        scale, compensated, factor = (
            torch.cat([getattr(e, name) for e in folded]) for name in ("scale", "compensated", "factor")
        )
        self.epilogue = Epilogue(scale, None, compensated, factor)
        self.sizes = [layer.out_features for layer in layers]

    def fits(self, layers: Sequence[IntegerLinear], grids: Sequence[Grid]) -> bool:
        """Whether this is the product for ``layers``, as they are now, and ``grids``."""
        return (
            _identical(self.layers, layers)
            and _identical(self.grids, grids)
            and _identical(self.epilogues, [layer.epilogue for layer in layers])
        )

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of all layers' results side by side, ``[..., sum of features]``."""
        return onednn.linear_onednn(x, self.packed, self.epilogue, NO_ACTIVATION, UNIT)


def compute_together(operands: Sequence[Deferred]) -> None:
    """Compute what ``operands``, deferred results on grids, come from in one product, if they can be.

    Each operand that asks its own source for its codes afterwards finds them there.
    """
    sources = [x.source() for x in operands]
    products = [source.pending for source in sources]
    layers = _layers(products, operands)
    if layers is None:
        return
    codes = products[0].codes  # type: ignore[union-attr]
    merged = _merged(layers, [x.grid for x in operands])  # type: ignore[misc]
    parts = merged.codes(codes).split_with_sizes(merged.sizes, -1)
    for source, layer, grid, part in zip(sources, layers, merged.grids, parts, strict=True):
        layer.used_as_codes((*source._product.fused, "merged"))  # type: ignore[union-attr]
        source._codes = {id(grid): (grid, part)}


def _layers(products: Sequence[Product | None], operands: Sequence[Deferred]) -> list[IntegerLinear] | None:
    """The layers behind ``products`` if one kernel call can compute them all, each on the grid of its operand."""
    layers: list[IntegerLinear] = []
    for product, operand in zip(products, operands, strict=True):
        if type(product) is not Product or product.activation is not NO_ACTIVATION:
            return None
        layer, grid = product.layer, operand.grid
        if not isinstance(layer, IntegerLinear) or layer.float_first or layer in layers:
            return None
        if product.codes is not products[0].codes or grid is None or grid.highest != LEVELS - 1:  # type: ignore[union-attr]
            return None
        rows = product.codes.numel() // layer.in_features
        if layer.kernel_for(rows, to_codes=True) != "onednn":
            return None
        layers.append(layer)
    return layers


def _merged(layers: Sequence[IntegerLinear], grids: Sequence[Grid]) -> Merged:
    """The stacked weights, kept with the first layer; its packed ones and the others' are given up for them."""
    kept: Merged | None = layers[0].__dict__.get("_merged")
    if kept is None or not kept.fits(layers, grids):
        kept = layers[0].__dict__["_merged"] = Merged(layers, grids)
        for layer in layers:
            layer._packed = None
    return kept


def _identical(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
