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
        self.zero_points = torch.cat(
            [torch.full((size,), float(grid.zero_point)) for size, grid in zip(self.sizes, grids, strict=True)]
        )

    def fits(self, layers: Sequence[IntegerLinear], grids: Sequence[Grid]) -> bool:
        """Whether this is the product for ``layers``, as they are now, and ``grids``."""
        return (
            _identical(self.layers, layers)
            and _identical(self.grids, grids)
            and _identical(self.epilogues, [layer.epilogue for layer in layers])
        )

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of all layers' results side by side, ``[..., sum of features]``."""
        scale = self.layers[0].grid.scale
        return onednn.linear_onednn(x, scale, self.packed, self.epilogue, NO_ACTIVATION, UNIT)


def compute_together(operands: Sequence[Deferred]) -> tuple[Merged, torch.Tensor] | None:
    """Compute what ``operands``, deferred results on grids, come from in one product, if they can be.

    Returns:
        The product and the codes of all results side by side; ``None`` if nothing was computed. Each operand that asks
        its own source for its codes afterwards finds them there.
    """
    sources = [_source(x) for x in operands]
    products = [source.pending for source in sources]
    if not all(_mergeable(product) for product in products):
        return None
    known = [product for product in products if product is not None]
    layers = [product.layer for product in known if isinstance(product.layer, IntegerLinear)]
    grids = [x._grid for x in operands if x._grid is not None and x._grid.highest == LEVELS - 1]
    mergeable = len(set(map(id, layers))) == len(grids) == len(operands) and len({id(p.codes) for p in known}) == 1
    rows = known[0].codes.numel() // known[0].codes.shape[-1]
    if not mergeable or not all(layer.kernel_for(rows, to_codes=True) == "onednn" for layer in layers):
        return None
    merged = _merged(layers, grids)
    together = merged.codes(known[0].codes)
    for source, product, grid, codes in zip(sources, known, grids, together.split(merged.sizes, -1), strict=True):
        product.layer.used_as_codes((*product.fused, "merged"))
        source._codes = {id(grid): (grid, codes)}
    return merged, together


def _merged(layers: Sequence[IntegerLinear], grids: Sequence[Grid]) -> Merged:
    """The stacked weights, kept with the first layer; its packed ones and the others' are given up for them."""
    kept: Merged | None = layers[0].__dict__.get("_merged")
    if kept is None or not kept.fits(layers, grids):
        kept = layers[0].__dict__["_merged"] = Merged(layers, grids)
        for layer in layers:
            layer._packed = None
    return kept


def _source(x: Deferred) -> Deferred:
    while x._parent is not None:
        x = x._parent
    return x


def _mergeable(product: Product | None) -> bool:
    return (
        type(product) is Product
        and product.activation is NO_ACTIVATION
        and isinstance(product.layer, IntegerLinear)
        and not product.layer.float_first
    )


def _identical(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
