"""Observers with torchao's names, arguments and results, for programs written against them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from fastforward.calibration.min_max import MinMax
from fastforward.calibration.observer import Observer
from fastforward.exceptions import CalibrationError
from fastforward.quantization.affine import Grid
from fastforward.quantization.granularity import Granularity, PerTensor, rows_by_block
from fastforward.quantization.mapping import MappingType, ZeroPointDomain, choose_qparams, quant_bounds


class AffineQuantizedObserverBase(Observer):
    """Holds the arguments that torchao's observers share.

    Args:
        mapping_type: how the range is laid over the target's values.
        target_dtype: integer or float8 type to quantize to.
        granularity: which elements share parameters.
        quant_min: smallest integer to use, by default that of the type.
        quant_max: largest integer to use.
        eps: smallest scale.
        scale_dtype: type of the scale, by default that of the data.
        zero_point_dtype: type of the zero point, by default int32.
        preserve_zero: represent zero exactly.
        zero_point_domain: what the zero point is.
        keepdim: give the parameters as many axes as the data.
    """

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity | None = None,
        quant_min: float | None = None,
        quant_max: float | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        keepdim: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(mapping_type, MappingType):
            msg = f"mapping_type must be a MappingType, got {mapping_type!r}"
            raise TypeError(msg)
        quant_bounds(target_dtype, quant_min, quant_max)
        self.mapping_type = mapping_type
        self.target_dtype = target_dtype
        self.granularity = PerTensor() if granularity is None else granularity
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.eps = eps
        self.scale_dtype = scale_dtype
        self.zero_point_dtype = zero_point_dtype
        self.preserve_zero = preserve_zero
        self.zero_point_domain = zero_point_domain
        self.keepdim = keepdim
        self._bound = False
        self._data_dtype = torch.float32
        self._block_size: tuple[int, ...] = ()

    @classmethod
    def with_args(cls, *args: Any, **kwargs: Any) -> Callable[..., Self]:
        """Return a factory with these arguments filled in."""
        return functools.partial(cls, *args, **kwargs)

    def bind(self, granularity: Granularity, grid: Grid, site: str) -> Self:
        """Take over the quantizer's granularity and grid; they win over the observer's own arguments."""
        self._bound = True
        return super().bind(granularity, grid, site)

    def update(self, x: Tensor) -> None:
        self._data_dtype = x.dtype
        self._block_size = self.granularity.block_size(x.shape)
        super().update(x)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as the arguments ask; the zero point is None in domain ``NONE``."""
        self.require_data()
        low, high = self.compute_range()
        if self._bound:
            return self.grid.parameters_for_range(low, high)
        low, high = (self._shaped(bound).to(self._data_dtype) for bound in (low, high))
        parameters = choose_qparams(
            low,
            high,
            self.mapping_type,
            self.target_dtype,
            self.quant_min,
            self.quant_max,
            eps=self.eps,
            scale_dtype=self.scale_dtype,
            zero_point_dtype=self.zero_point_dtype,
            preserve_zero=self.preserve_zero,
            zero_point_domain=self.zero_point_domain,
        )
        return parameters  # type: ignore[return-value]

    def _shaped(self, bound: Tensor) -> Tensor:
        """Return ``bound`` with the axes torchao gives it: at least one, and all of the data's with ``keepdim``."""
        if not self.keepdim:
            return bound.reshape(-1) if bound.dim() == 0 else bound
        kept = self.granularity.kept_dims(len(self._block_size))
        shape = [1] * len(self._block_size)
        for axis, dim in enumerate(kept):
            shape[dim] = bound.shape[axis]
        return bound.reshape(shape)


class AffineQuantizedMinMaxObserver(AffineQuantizedObserverBase, MinMax):
    """The smallest and largest value of all batches, as in torchao; its state is in buffers here."""


class AffineQuantizedMSEObserver(AffineQuantizedObserverBase, MinMax):
    """The clipping threshold of least squared error among ``steps``; the newest batch counts, as in torchao.

    Args:
        steps: number of thresholds, evenly spaced up to the largest magnitude.
        run_once: look at the first batch only.
    """

    def __init__(self, *args: Any, steps: int = 100, run_once: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = steps
        self.run_once = run_once

    def update(self, x: Tensor) -> None:
        if self.run_once and self.has_data:
            return
        self._data_dtype = x.dtype
        self._block_size = self.granularity.block_size(x.shape)
        rows, shape = rows_by_block(x.to(torch.float32), self.granularity)
        largest = rows.abs().amax(1)
        self.require_finite(largest, largest)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(1, self.steps + 1):
            threshold = largest * (step / self.steps)
            error = (self._rounded(rows, threshold) - rows).square().mean(1)
            best, least = torch.where(error < least, threshold, best), torch.minimum(error, least)
        self.low, self.high = -best.reshape(shape), best.reshape(shape)

    def _rounded(self, rows: Tensor, threshold: Tensor) -> Tensor:
        scale, zero_point = choose_qparams(
            -threshold, threshold, self.mapping_type, self.target_dtype, self.quant_min, self.quant_max, eps=self.eps
        )
        low, high = quant_bounds(self.target_dtype, self.quant_min, self.quant_max)
        scale = scale[:, None]
        if self.target_dtype.is_floating_point:
            return (rows / scale).clamp(low, high).to(self.target_dtype).to(torch.float32) * scale
        assert zero_point is not None
        shift = zero_point[:, None]
        return ((torch.round(rows * (1 / scale)) + shift).clamp(low, high) - shift) * scale


class AffineQuantizedFixedQParamObserver(AffineQuantizedObserverBase):
    """Yields the scale and zero point it was given."""

    def __init__(
        self, *args: Any, scale: Tensor | None = None, zero_point: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))
        if scale is not None:
            self.set_qparams(scale, zero_point)

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set what ``calculate_qparams`` yields; the zero point is zero by default."""
        self.scale = scale.detach().clone()
        blank = torch.zeros_like(scale, dtype=self.zero_point_dtype or torch.int32)
        self.zero_point = blank if zero_point is None else zero_point.detach().clone()

    def update(self, x: Tensor) -> None:
        """Pass over the data: the parameters are fixed."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return the given parameters; raises CalibrationError if none were given."""
        if self.scale.numel() == 0:
            msg = f"{self.site}: no scale was given; call set_qparams(scale, zero_point) first"
            raise CalibrationError(msg)
        return self.scale, self.zero_point
