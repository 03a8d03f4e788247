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

    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The codes of every layer's result, views of one tensor ``[..., sum of features]``."""
        scale = self.layers[0].grid.scale
        together = onednn.linear_onednn(x, scale, self.packed, self.epilogue, NO_ACTIVATION, UNIT)
        results: tuple[torch.Tensor, ...] = together.split(self.sizes, -1)
        return results


def compute_together(operands: Sequence[Deferred]) -> None:
    """Compute what ``operands``, deferred results on grids, come from in one product, if they can be.

    Afterwards each asks its own source for its codes, as it would anyway, and finds them there.
    """
    sources = [_source(x) for x in operands]
    products = [source.pending for source in sources]
    if not all(_mergeable(product) for product in products):
        return
    known = [product for product in products if product is not None]
    layers = [product.layer for product in known if isinstance(product.layer, IntegerLinear)]
    grids = [x._grid for x in operands if x._grid is not None and x._grid.highest == LEVELS - 1]
    together = len(set(map(id, layers))) == len(grids) == len(operands) and len({id(p.codes) for p in known}) == 1
    rows = known[0].codes.numel() // known[0].codes.shape[-1]
    if not together or not all(layer.kernel_for(rows, to_codes=True) == "onednn" for layer in layers):
        return
    results = _merged(layers, grids).codes(known[0].codes)
    for source, product, grid, codes in zip(sources, known, grids, results, strict=True):
        product.layer.used_as_codes((*product.fused, "merged"))
        source._codes = {id(grid): (grid, codes)}


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
