"""Deferred: the result of an integer layer before it is computed.

A layer cannot know whether its result will be activated, added to something, normalized, or handed to another
integer layer. So it returns a tensor that remembers the operands. Operators that the kernel can do on the way (see
``fusion``) only change what is remembered; an integer layer asks for codes on its own grid; anything else asks for
floats. Each of these then runs the kernel once, with everything fused. To user code the result is an ordinary float
tensor: every operator without a rule works on its computed value, and so does code below Python's dispatch.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.grid import Grid, in_blocks, joined
from fastforward.integer.layout import contiguous

if TYPE_CHECKING:
    from fastforward.integer.layer import IntegerLayer

Rule = Callable[..., Any]
LEARNING_CALLS = 2
"""Calls after which a program that asks for floats alone is taken to go on doing so."""


class Product:
    """The operands of an integer layer and what is to follow the product."""

    __slots__ = ("activation", "codes", "dtype", "epilogue", "fused", "layer")

    def __init__(
        self,
        layer: "IntegerLayer",
        codes: torch.Tensor,
        epilogue: Epilogue,
        dtype: torch.dtype,
        activation: Activation = NO_ACTIVATION,
        fused: tuple[str, ...] = (),
    ) -> None:
        self.layer, self.codes, self.epilogue, self.dtype = layer, codes, epilogue, dtype
        self.activation, self.fused = activation, fused

    def activated(self, activation: Activation) -> "Product":
        """The same product followed by ``activation``."""
        fused = (*self.fused, activation.name)
        return Product(self.layer, self.codes, self.epilogue, self.dtype, activation, fused)

    def followed_by(self, operator: str) -> "Product":
        """The same product, its result known to go to ``operator``."""
        fused = (*self.fused, operator)
        return Product(self.layer, self.codes, self.epilogue, self.dtype, self.activation, fused)

    def batch_normalized(self, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
        """The same product with a batch normalization in its scale and bias; NotImplemented where that cannot be."""
        layer = self.layer
        if type(self) is not Product or self.activation is not NO_ACTIVATION or not layer.channels_first:
            return NotImplemented
        if mean is None or var is None:
            return NotImplemented
        folded = layer.folded(self.epilogue, mean, var, weight, bias, eps)
        return Product(layer, self.codes, folded, self.dtype, NO_ACTIVATION, (*self.fused, "batch_norm"))

    def floats(self) -> torch.Tensor:
        """Compute as a fresh tensor of ``dtype``."""
        self.layer.used_as_float(self.fused)
        y = self.layer.compute_floats(self.codes, self.epilogue, self.activation)
        return y if y.dtype == self.dtype else y.to(self.dtype)

    def smoothed(self, grid: Grid) -> torch.Tensor:
        """Compute as codes on a grid whose channels are scaled first: no kernel does that before it rounds."""
        self.layer.used_as_codes(self.fused)
        rows = self.codes.reshape(-1, self.codes.shape[-1])
        width = self.epilogue.scale.numel()
        codes = joined(
            [
                grid.codes_in_place(self.layer.compute(block, self.epilogue, self.activation))
                for block in in_blocks(rows, width)
            ]
        )
        return codes.view(*self.codes.shape[:-1], codes.shape[-1])

    def codes_on(self, grid: Grid) -> torch.Tensor:
        """Compute as codes on any grid, by way of floats where its layer's are known to be wanted."""
        if self.floats_wanted():
            return grid.codes(self.floats())
        return self.on_grid(grid) if grid.inverse_smoothing is None else self.smoothed(grid)

    def floats_wanted(self) -> bool:
        """Whether earlier results of this layer were wanted as floats, so that rounding them saves a second product."""
        return self.layer.float_first

    def on_grid(self, grid: Grid) -> torch.Tensor:
        """Compute as uint8 codes."""
        self.layer.used_as_codes(self.fused)
        return self.layer.compute(self.codes, self.epilogue, self.activation, grid)


class Usage:
    """What became of the tensors that a quantizer handed out as codes."""

    __slots__ = ("codes", "floats")

    def __init__(self) -> None:
        self.codes = self.floats = 0

    def pays(self) -> bool:
        """Whether codes are taken, or may be: floats alone are had more cheaply without a detour."""
        return self.codes > 0 or self.floats < LEARNING_CALLS


class Deferred(torch.Tensor):
    """A floating tensor that an integer layer will compute when it is known how it is used.

    Exactly one of these is the source: a product; a value that is computed but whose memory is not yet laid out as
    torch would; codes, of what a quantizer rounded; or a parent from which a data-movement operator takes the values.
    """

    _ff_works_everywhere = True

    # Most of these keep their defaults: setting them all would double what an object costs.
    _product: Product | None = None
    _value: torch.Tensor | None = None
    _parent: "Deferred | None" = None
    _move: Callable[[torch.Tensor], torch.Tensor] | None = None
    _codes: dict[int, tuple[Grid, torch.Tensor]] | None = None
    _children: list["weakref.ref[Deferred]"] | None = None
    _grid: Grid | None = None
    _strided: bool = False
    _usage: "Usage | None" = None
    _shape: tuple[int, ...]
    _dtype: torch.dtype

    @staticmethod
    def __new__(
        cls: type["Deferred"],
        product: Product | None,
        shape: tuple[int, ...],
        *,
        value: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Deferred":
        if product is not None:
            self = _wrapper(shape, product.dtype)
            self._product = product
        else:
            assert value is not None
            self = _wrapper(shape, value.dtype if dtype is None else dtype)
            self._value = value
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def of_codes(cls, codes: torch.Tensor, grid: Grid, dtype: torch.dtype, usage: "Usage") -> "Deferred":
        """The tensor that ``codes`` on ``grid`` stand for; ``usage`` learns whether floats are made of them."""
        self = _wrapper(tuple(codes.shape), dtype)
        self._grid, self._usage, self._strided = grid, usage, not codes.is_contiguous()
        self._codes = {id(grid): (grid, codes)}
        return self

    @property
    def _device(self) -> torch.device:
        if self._parent is not None:
            return self._parent._device
        if self._product is not None:
            return self._product.codes.device
        if self._value is not None:
            return self._value.device
        assert self._codes is not None
        return next(iter(self._codes.values()))[1].device

    @property
    def grid(self) -> Grid | None:
        """The grid that the values were rounded to last, with only data movement since."""
        x: Deferred | None = self
        while x is not None:
            # Floats that were made of codes may have been changed in what they were moved from since.
            if x._value is not None and (x._parent is not None or x._grid is None):
                return None
            if x._grid is not None:
                return x._grid
            x = x._parent
        return None

    @property
    def pending(self) -> Product | None:
        """The product, if nothing has been computed or handed out yet."""
        return self._product if self._value is None and self._codes is None else None

    def computed(self) -> torch.Tensor:
        """The floats, in whatever memory layout the kernel produced."""
        if self._value is None:
            if self._grid is not None:
                if self._usage is not None:
                    self._usage.floats += 1
                self._value = self._grid.values(self._own_codes(self._grid)).to(self._dtype)
            elif self._parent is not None and self._move is not None:
                parent = self._parent
                self._value = self._move(parent.materialize() if self._strided else parent.computed())
            elif self._product is not None:
                if self._codes is not None:
                    # Wanted as codes and as floats: from now on compute floats once and round them.
                    self._product.layer.float_first = True
                self._value = self._product.floats()
        assert self._value is not None
        return self._value

    def materialize(self) -> torch.Tensor:
        """The plain tensor that this one stands for; its memory is contiguous, as torch's own result would be."""
        value = self.computed()
        if not value.is_contiguous() and not self._strided:
            value = self._value = contiguous(value)
        return value

    def codes(self, grid: Grid) -> torch.Tensor:
        """The values as codes on ``grid``, without a detour over floats where the kernel can store codes itself."""
        own = self.grid
        if own is not None and same(own, grid):
            if (usage := self.source()._usage) is not None:
                usage.codes += 1
            return self._own_codes(own)
        if self._value is not None or self._grid is not None or self.floats_wanted():
            return grid.codes(self.computed())
        if self._parent is not None and grid.inverse_smoothing is not None:
            return grid.codes(self.computed())
        known = self._codes or {}
        if id(grid) not in known:
            known[id(grid)] = (grid, self._fresh_codes(grid))
            self._codes = known
        return known[id(grid)][1]

    def _own_codes(self, own: Grid) -> torch.Tensor:
        """The codes on the grid that the values are on."""
        known = self._codes or {}
        if id(own) in known:
            return known[id(own)][1]
        assert self._parent is not None
        if self._grid is not None:
            return self._parent.codes(own)
        assert self._move is not None
        codes = self._move(self._parent._own_codes(own))
        self._codes = {id(own): (own, codes)}
        return codes

    def _fresh_codes(self, grid: Grid) -> torch.Tensor:
        if self._parent is not None and self._move is not None:
            return self._move(self._parent.codes(grid))
        assert self._product is not None
        return self._product.codes_on(grid)

    def source(self) -> "Deferred":
        """The result that this one's values come from through data movement: itself, if it has no parent."""
        source = self
        while source._parent is not None:
            source = source._parent
        return source

    def floats_wanted(self) -> bool:
        """Whether floats exist, or were wanted by earlier calls, so that rounding them saves a second product."""
        source = self.source()
        return source._value is not None or (source._product is not None and source._product.floats_wanted())

    def moved(
        self, move: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], *, strided: bool = False
    ) -> "Deferred":
        """The result of a data-movement operator on this tensor, floats or codes alike.

        ``strided`` says that torch's own result would not be contiguous.
        """
        child = self._child(shape)
        child._move = move
        child._strided = strided or self._strided
        return child

    def rounded(self, grid: Grid) -> "Deferred":
        """This tensor with its values on ``grid``: what a quantizer outside of an integer layer asks for."""
        child = self._child(self._shape)
        child._grid, child._strided = grid, self._strided
        return child

    def _child(self, shape: tuple[int, ...]) -> "Deferred":
        child = _wrapper(shape, self._dtype)
        child._parent = self
        return self._remember(child)

    def _remember(self, child: "Deferred") -> "Deferred":
        if self._children is None:
            self._children = []
        self._children.append(weakref.ref(child))
        return child

    def settle(self) -> None:
        """Compute what depends on this tensor's present values, because they are about to change in place.

        Views then share memory with this tensor, as in torch; results of pooling keep the old values.
        """
        self.materialize()
        for reference in self._children or ():
            if (child := reference()) is not None:
                child.computed()
        self._children = self._grid = self._codes = None

    @property
    def watched(self) -> bool:
        """Whether results of data movement depend on this tensor's values and have not been computed."""
        return any(reference() is not None for reference in self._children or ())

    def become(self, product: Product | None = None, value: torch.Tensor | None = None) -> "Deferred":
        """Take the result of an in-place operator."""
        self._product, self._value, self._parent, self._codes, self._grid = product, value, None, None, None
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        if rule is not None and (not kwargs or takes(rule, kwargs)):
            result = rule(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return call_with_values(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call_with_values(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)


def _wrapper(shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
    """A deferred tensor without a source yet."""
    self: Deferred = _make_wrapper(Deferred, shape, dtype=dtype)
    self._shape, self._dtype = shape, dtype
    return self


_make_wrapper = torch.Tensor._make_wrapper_subclass

RULES: dict[Any, Rule] = {}
"""What to do with a torch function: ``rule(func, *args, **kwargs)`` returns its result, or NotImplemented."""


def takes(rule: Rule, keywords: Iterable[str]) -> bool:
    """Whether ``rule`` knows these keywords; torch has more names for its arguments than a rule need care for."""
    known = _keywords(rule)
    return known is None or known.issuperset(keywords)


@functools.cache
def _keywords(rule: Rule) -> frozenset[str] | None:
    """The keywords of ``rule``, ``None`` for any."""
    parameters = inspect.signature(rule).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL)


def call_with_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function on computed values; an in-place operator keeps returning the object it was given."""
    if args and type(args[0]) is Deferred and _in_place(func, kwargs):
        args[0].settle()
    originals: dict[int, Deferred] = {}
    values = [_value_of(arg, originals) for arg in args]
    named = {name: _value_of(arg, originals) for name, arg in kwargs.items()}
    result = func(*values, **named)
    return originals.get(id(result), result) if isinstance(result, torch.Tensor) else result


def _value_of(x: Any, originals: dict[int, Deferred]) -> Any:
    """``x`` with its deferred tensors computed; ``originals`` learns which one each value came from."""
    if type(x) is Deferred:
        value = x.materialize()
        originals[id(value)] = x
        return value
    # Not a closure: one that calls itself would keep every tensor of this call until garbage is collected.
    if type(x) in (list, tuple):
        return type(x)(_value_of(item, originals) for item in x)
    return x


def same(a: Grid, b: Grid) -> bool:
    """Whether codes on one grid are codes on the other."""
    if a is b:
        return True
    plain = a.inverse_smoothing is None and b.inverse_smoothing is None
    return plain and (a.scale, a.zero_point, a.highest) == (b.scale, b.zero_point, b.highest)


def _in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
