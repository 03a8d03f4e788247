"""Residual additions: a convolution adds the result of another integer layer before it activates and stores.

Where that result exists as codes only, because a layer before took it so, and the sum is to become codes too, codes are
added: the addend is then rounded. The first call measures how much noise this adds; where it exceeds twice what the
rounded input of the layer brings anyway, or twice that of rounding the sum, floats are added: noise piles up from sum
to sum. With these bounds 4 to 28 sums of residual networks cost 0.3 dB at most.
"""

from typing import TYPE_CHECKING, Any

import torch

from fastforward.integer.deferred import Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.grid import LEVELS, Grid

if TYPE_CHECKING:
    from fastforward.integer.layer import IntegerLayer

Coded = tuple[Grid, torch.Tensor]
OF_INPUT, OF_RESULT = 2.0, 2.0
"""Noise that a rounded addend may add: over that which the rounded input brings into the product, and over that of
rounding the exact sum, of which equal steps of addend and sum give 1."""


class Sum(Product):
    """A product to which a deferred tensor is added, and what is to follow the sum."""

    __slots__ = ("addend", "rounded")

    def __init__(
        self,
        layer: "IntegerLayer",
        codes: torch.Tensor,
        epilogue: Epilogue,
        dtype: torch.dtype,
        activation: Activation,
        fused: tuple[str, ...],
        addend: Deferred,
    ) -> None:
        super().__init__(layer, codes, epilogue, dtype, activation, fused)
        self.addend: Deferred | None = addend
        self.rounded: Coded | None = None

    def activated(self, activation: Activation) -> "Sum":
        return self._with(activation, activation.name)

    def followed_by(self, operator: str) -> "Sum":
        return self._with(self.activation, operator)

    def floats(self) -> torch.Tensor:
        self.layer.used_as_float(self.fused)
        return self._floats()

    def smoothed(self, grid: Grid) -> torch.Tensor:
        return self.on_grid(grid)

    def on_grid(self, grid: Grid) -> torch.Tensor:
        self.layer.used_as_codes(self.fused)
        known = self.rounded or _codes(self.addend)
        if known is None or grid.inverse_smoothing is not None or self.layer.adds_codes is False:
            return grid.codes_in_place(self._floats())
        own, codes = known
        into = codes.clone(memory_format=torch.channels_last)
        total = self._into(into, own.scale, own.zero_point, grid)
        if self.layer.adds_codes is None:
            exact = self._plus(_recomputed(self.addend))  # type: ignore[arg-type]
            self.layer.adds_codes = self._is_near(total, exact, grid)
            if not self.layer.adds_codes:
                return grid.codes_in_place(exact)
        # Otherwise every sum would keep the ones before it alive.
        self.addend, self.rounded = None, known
        return total

    def _with(self, activation: Activation, operator: str) -> "Sum":
        assert self.addend is not None
        fused = (*self.fused, operator)
        return Sum(self.layer, self.codes, self.epilogue, self.dtype, activation, fused, self.addend)

    def _into(
        self, into: torch.Tensor, scale: float = 1.0, zero_point: int = 0, out: Grid | None = None
    ) -> torch.Tensor:
        return self.layer.accumulate(self.codes, self.epilogue, self.activation, into, scale, zero_point, out)

    def _floats(self) -> torch.Tensor:
        if self.addend is None:
            assert self.rounded is not None
            grid, codes = self.rounded
            return self._into(grid.values(codes))
        pending = self.addend.pending
        if type(pending) is Product:
            # Its floats are fresh, and nobody has asked for them yet: the sum may take their memory.
            return self._into(pending.followed_by("add").floats())
        return self._plus(self.addend.computed())

    def _plus(self, floats: torch.Tensor) -> torch.Tensor:
        return self.activation.apply(self.layer.compute(self.codes, self.epilogue).add_(floats))

    def _is_near(self, total: torch.Tensor, exact: torch.Tensor, grid: Grid) -> bool:
        """Compare ``total``, the codes of a sum with a rounded addend, with the exact sum."""
        least = (grid.values(grid.fresh_codes(exact)) - exact).square().mean()
        added = (grid.values(total) - exact).square().mean() - least
        return bool(added <= OF_INPUT * self._noise_of_input()) and bool(added <= OF_RESULT * least)

    def _noise_of_input(self) -> torch.Tensor:
        """The mean square of what rounding the input changes in the product, a twelfth of a squared step per weight."""
        weights = self.layer.filters().flatten(1).float().square().sum(1)
        return (self.epilogue.factor.square() * weights).mean() / 12


def _recomputed(x: Deferred) -> torch.Tensor:
    """The floats of a tensor that was computed as codes, without a trace on it or its layer."""
    if x._value is not None:
        return x._value
    if x._parent is not None:
        assert x._move is not None
        return x._move(_recomputed(x._parent))
    product = x._product
    assert product is not None
    if isinstance(product, Sum):
        return product._floats()
    return product.layer.compute(product.codes, product.epilogue, product.activation)


def plus(owner: Deferred, addend: Any) -> Sum | None:
    """``owner + addend`` as one product, if the layer of ``owner`` can add while it computes."""
    product = owner.pending
    if type(product) is not Product or product.activation is not NO_ACTIVATION or not product.layer.accumulates:
        return None
    if type(addend) is not Deferred or addend is owner or addend._value is not None or addend._grid is not None:
        return None
    if addend._shape != owner._shape or not addend._dtype == owner._dtype == torch.float32 or addend.floats_wanted():
        return None
    fused = (*product.fused, "add")
    return Sum(product.layer, product.codes, product.epilogue, product.dtype, NO_ACTIVATION, fused, addend)


def _codes(addend: Deferred | None) -> Coded | None:
    """Codes of 8 bits that exist of ``addend``, the finest if there are several."""
    if addend is None or addend._value is not None or not addend._codes:
        return None
    pairs = addend._codes.values()
    known = [pair for pair in pairs if pair[0].inverse_smoothing is None and pair[0].highest == LEVELS - 1]
    return min(known, key=lambda pair: pair[0].scale, default=None)


__all__ = ["Sum", "plus"]
