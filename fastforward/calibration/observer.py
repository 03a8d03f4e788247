"""The base of all observers: sees tensors, yields scale and zero point.

An observer of one's own is a subclass with two methods: ``update(x)`` takes a batch of floats in, ``compute_range()``
yields the smallest and largest value worth representing.
"""

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from typing_extensions import Self

from fastforward.exceptions import CalibrationError
from fastforward.nn.lazy_buffers import LazyBuffers
from fastforward.quantization.affine import AffineGrid, Grid
from fastforward.quantization.granularity import Granularity, PerTensor, rows_by_block

_O = TypeVar("_O", bound="Observer")


class Observer(LazyBuffers):
    """Watches the tensors at one site; ``observer(x)`` returns ``x`` itself.

    State belongs in buffers (``register_buffer``), so that it is saved, moved and merged. ``granularity`` and ``grid``
    are those of the quantizer, set by ``bind`` before the first tensor.

    Example:
        >>> class AbsMax(Observer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("largest", torch.zeros(()))
        ...
        ...     def update(self, x):
        ...         self.largest = torch.maximum(self.largest, x.abs().max())
        ...
        ...     def compute_range(self):
        ...         return -self.largest, self.largest
    """

    batches: Tensor
    checks_values = False
    """A subclass that itself refuses NaN and infinity sets this, and saves a pass over the data."""

    def __init__(self) -> None:
        super().__init__()
        self.granularity: Granularity = PerTensor()
        self.grid: Grid = AffineGrid(-128, 127, symmetric=False)
        self.site = "a tensor"
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._pending = 0  # batches that `batches` does not count yet: adding to a tensor at each one would cost

    def update(self, x: Tensor) -> None:
        """Take in one batch: a detached floating tensor, finite and not empty."""
        raise NotImplementedError

    def compute_range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value to represent, shaped as the granularity asks."""
        raise NotImplementedError

    def bind(self, granularity: Granularity, grid: Grid, site: str) -> Self:
        """Say whose range this observer estimates."""
        self.granularity, self.grid, self.site = granularity, grid, site
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it; an empty tensor says nothing and is passed over.

        Raises:
            CalibrationError: ``x`` is no floating tensor, or holds NaN or infinity.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            msg = f"{self.site} cannot be observed: it is {kind}, and only floating tensors are quantized"
            raise CalibrationError(msg)
        if x.numel() == 0:
            return x
        if torch.compiler.is_compiling():
            _take_in_uncompiled(self, x)
        else:
            self.take_in(x)
        return x

    def take_in(self, x: Tensor) -> None:
        """Check and take in one batch."""
        data = x.detach() if x.requires_grad else x
        if not self.checks_values:
            low, high = torch.aminmax(data)
            self.require_finite(low.to(torch.float32), high.to(torch.float32))  # what they compute in
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False):  # a buffer made in it could never be changed outside it
                self.update(data)
        else:
            self.update(data)
        self.__dict__["_pending"] += 1  # past nn.Module's slow __setattr__

    def count_batches(self) -> Tensor:
        """Return the number of batches seen, with the buffer brought up to date."""
        if self._pending:
            self.batches.add_(self._pending)
            self._pending = 0
        return self.batches

    def _save_to_state_dict(self, *args: Any) -> None:
        self.count_batches()
        super()._save_to_state_dict(*args)

    def require_finite(self, low: Tensor, high: Tensor) -> None:
        """Raise CalibrationError if a bound is NaN or infinite."""
        if low.numel() == 1:
            finite = math.isfinite(low.item()) and math.isfinite(high.item())
        else:
            finite = bool((torch.isfinite(low) & torch.isfinite(high)).all())
        if not finite:
            msg = (
                f"{self.site} saw NaN or infinity (values from {low.min().item()} to {high.max().item()}): no range "
                "can hold them. Check the data and the operator before it"
            )
            raise CalibrationError(msg)

    @property
    def has_data(self) -> bool:
        """Whether any tensor was seen."""
        return self._pending > 0 or int(self.batches) > 0

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for what was seen; raises CalibrationError if that is nothing."""
        self.require_data()
        return self.grid.parameters_for_range(*self.compute_range())

    def require_data(self) -> None:
        """Raise CalibrationError if no tensor was seen."""
        if not self.has_data:
            msg = f"{self.site} saw no data: run the model on calibration data before asking for its range"
            raise CalibrationError(msg)

    def merge(self: _O, other: _O) -> _O:
        """Return an observer that has seen what ``self`` and ``other`` have seen; both stay as they are."""
        if type(self) is not type(other):
            msg = f"a {type(self).__name__} of {self.site} cannot be merged with a {type(other).__name__}"
            raise CalibrationError(msg)
        if not other.has_data:
            return copy.deepcopy(self)
        if not self.has_data:
            return copy.deepcopy(other)
        merged = copy.deepcopy(self)
        merged.absorb(other)
        merged.count_batches().add_(copy.deepcopy(other).count_batches())
        return merged

    def succeed(self, other: Self) -> None:
        """Take over from ``other``, this process's observer before merging, what is not sent to other processes."""

    def absorb(self, other: Self) -> None:
        """Add the state of ``other``, which has seen data as ``self`` has; what ``merge`` needs of a subclass."""
        msg = f"{type(self).__name__} of {self.site} cannot be merged: it defines no absorb(other)"
        raise CalibrationError(msg)


class BlockObserver(Observer):
    """Base of observers that see each batch as rows, one for every block that has a scale of its own."""

    dims: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("dims", torch.zeros(0, dtype=torch.int64))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameters; part of the state, because rows alone do not tell it."""
        return tuple(self.dims.tolist())

    def update(self, x: Tensor) -> None:
        rows, shape = rows_by_block(x, self.granularity)
        if not self.has_data:
            self.dims = torch.tensor(shape, dtype=torch.int64)
        elif shape != self.parameter_shape:
            self.share_leading_axis(shape)
            rows = rows.reshape(shape[0], -1, rows.shape[1]).transpose(0, 1).reshape(-1, shape[0] * rows.shape[1])
        self.update_rows(rows.to(torch.float32))

    def update_rows(self, rows: Tensor) -> None:
        """Take in one batch as float32 ``[blocks, elements]``."""
        raise NotImplementedError

    def share_leading_axis(self, shape: tuple[int, ...]) -> None:
        """Let all blocks along the leading axis share a range, once a batch has another number of them."""
        if not shape or shape[1:] != self.parameter_shape[1:]:
            raise self.shapes_differ(shape)
        if self.parameter_shape[0] != 1:
            self.join_leading_axis()
            self.dims = torch.tensor((1, *shape[1:]), dtype=torch.int64)

    def join_leading_axis(self) -> None:
        """Merge what is known of the blocks along the leading axis of the parameters."""
        raise self.shapes_differ((1, *self.parameter_shape[1:]))

    def shapes_differ(self, shape: tuple[int, ...]) -> CalibrationError:
        """Return the error for a batch whose parameters have another shape."""
        msg = (
            f"{self.site}: the parameters of {self.granularity} have shape {shape} in this batch and "
            f"{self.parameter_shape} before, which {type(self).__name__} cannot bring together"
        )
        return CalibrationError(msg)


@_disable_dynamo
def _take_in_uncompiled(observer: Observer, x: Tensor) -> None:
    """Break the graph around an observer in a compiled model: its state changes shape and it reads values."""
    observer.take_in(x)
