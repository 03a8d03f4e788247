"""Integer products in a module's own code: ``F.linear(x, self.weight)``, ``x @ self.w``, ``torch.addmm``.

There no layer stands that could be swapped. What the quantizers at the site hand to the operator carries the integers
instead: the input's gives codes (``islands``), the parameter's a :class:`SiteWeight`. The operator then runs the
kernels of an ``IntegerLinear`` made of both. To every other operator the two are ordinary floats.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastforward.integer.deferred import Deferred, same
from fastforward.integer.epilogue import make_epilogue
from fastforward.integer.fusion import rule
from fastforward.integer.grid import Grid
from fastforward.integer.linear import IntegerLinear
from fastforward.nn.simulated_weight import version_of
from fastforward.quantization.tensor import MOVES, QuantizedTensor

F = torch.nn.functional
Tensor = torch.Tensor


@dataclasses.dataclass(slots=True)
class SiteProduct:
    """The product of one weight with inputs on one grid."""

    layer: IntegerLinear
    _bias: Callable[[], Any] = lambda: None
    _version: int = 0

    def with_bias(self, bias: Tensor | None) -> IntegerLinear:
        """The layer with this bias, which a program may put together anew for each call."""
        layer, known = self.layer, self.layer.epilogue.bias
        if bias is None or known is None:
            changed = bias is not known
        elif self._bias() is bias and self._version == version_of(bias):
            return layer
        else:
            changed = not torch.equal(known, bias.detach().float())
        if changed:
            grid = layer.grid
            own = None if bias is None else bias.detach().clone()
            layer.epilogue = make_epilogue(layer.weight_int8, layer.weight_scale, own, grid.scale, grid.zero_point)
        if bias is not None:
            self._bias, self._version = weakref.ref(bias), version_of(bias)
        return layer


class SiteWeight(QuantizedTensor):
    """The integers of a weight where a function reads it, with the products that were made of them and of its pieces.

    Attributes:
        start: Prepares an ``IntegerLinear`` for its first call: says which kernel, or that it is to be measured.
    """

    start: Callable[[IntegerLinear], None]
    _products: list["SiteProduct"]
    _pieces: dict[Any, Any]
    _floats: Tensor | None

    @classmethod
    def of(cls, stored: QuantizedTensor, start: Callable[[IntegerLinear], None]) -> "SiteWeight":
        """The weight that ``stored`` holds."""
        parts = stored.int_data, stored.scale, stored.zero_point, stored.block_size, stored.dtype
        self = cls(*parts, stored.quant_min, stored.quant_max)
        self.start, self._products, self._pieces, self._floats = start, [], {}, None
        return self

    def layers(self) -> Iterator[IntegerLinear]:
        """The products that were made so far of this weight and its pieces."""
        yield from (product.layer for product in self._products)
        for pieces in self._pieces.values():
            for piece in pieces if isinstance(pieces, tuple | list) else (pieces,):
                if type(piece) is SiteWeight:
                    yield from piece.layers()

    def multiplied(self, x: Any, bias: Tensor | None) -> Any:
        """``F.linear(x, self, bias)`` in integers, NotImplemented where there are none."""
        grid = x.grid if type(x) is Deferred else None
        if grid is None or not self._fits(x, bias):
            return NotImplemented
        return self._layer(grid, bias).forward(x)

    def _fits(self, x: Deferred, bias: Tensor | None) -> bool:
        if self.dim() != 2 or not x._shape or x._shape[-1] != self.shape[1] or 0 in x._shape:
            return False
        if self.scale.numel() > 1 and tuple(self.block_size) != (1, self.shape[1]):
            return False
        return bias is None or (type(bias) in (Tensor, torch.nn.Parameter) and bias.shape == self.shape[:1])

    def _layer(self, grid: Grid, bias: Tensor | None) -> IntegerLinear:
        product = next((known for known in self._products if same(known.layer.grid, grid)), None)
        if product is None:
            scale = self.scale.reshape(-1).float().expand(self.shape[0]).contiguous()
            own = None if bias is None else bias.detach().clone()  # to be compared with later ones
            product = SiteProduct(IntegerLinear.of(self.int_data.contiguous(), scale, own, grid))
            self.start(product.layer)
            self._products.append(product)
        return product.with_bias(bias)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The floats, kept: they are asked for where the other operand of the product is not on a grid."""
        if self._floats is None or self._floats._version or self._floats.dtype != (output_dtype or self.dtype):
            self._floats = super().dequantize(output_dtype)
        return self._floats

    def piece(self, move: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a data-movement operator makes of this weight: the same object each time."""
        key = move, _key(args), _key(tuple(kwargs.items()))
        if key not in self._pieces:
            with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
                self._pieces[key] = self._as_site(move(self, *args, **kwargs))
        return self._pieces[key]

    def _as_site(self, moved: Any) -> Any:
        if isinstance(moved, tuple | list):
            return type(moved)(self._as_site(item) for item in moved)
        return SiteWeight.of(moved, self.start) if isinstance(moved, QuantizedTensor) else moved

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in MOVES and type(args[0]) is SiteWeight and _is_plain((args[1:], tuple(kwargs.values()))):
            return args[0].piece(func, args[1:], kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _is_plain(value: Any) -> bool:
    """Whether an argument says where data goes and holds none: such arguments can be compared and kept."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or value is Ellipsis or isinstance(value, int | str | slice | torch.memory_format)


def _key(value: Any) -> Any:
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else value


# ---------------------------------------------------------------- the operators
@rule(F.linear)
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    return weight.multiplied(input, bias) if type(weight) is SiteWeight else NotImplemented


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(func: Any, input: Any, other: Any) -> Any:
    if type(other) is not SiteWeight or other.dim() != 2:
        return NotImplemented
    columns: Any = other.t()
    return columns.multiplied(input, None)


@rule(torch.addmm, Tensor.addmm)
def _addmm(func: Any, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if type(mat2) is not SiteWeight or (beta, alpha) != (1, 1):
        return NotImplemented
    columns: Any = mat2.t()
    return columns.multiplied(mat1, input)
