"""What quantizers with a fixed scale have in common: buffers, ranges, learning the range."""

import torch
from torch import Tensor

from fastforward.exceptions import CalibrationError
from fastforward.nn.lazy_buffers import LazyBuffers
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.quantization.affine import Grid
from fastforward.quantization.granularity import Granularity, PerTensor


class RangeQuantizer(LazyBuffers, Quantizer):
    """A quantizer whose ``scale`` (float32) and ``zero_point`` (int32) are fixed before it is used.

    Both are empty buffers until a range is set, and keep their types under ``.half()``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, granularity: Granularity | None = None, metadata: QuantizerMetadata | None = None) -> None:
        Quantizer.__init__(self, metadata)
        if granularity is not None and not isinstance(granularity, Granularity):
            msg = f"granularity must be one of ff.granularity, got {granularity!r}"
            raise TypeError(msg)
        self.granularity = PerTensor() if granularity is None else granularity
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    @property
    def grid(self) -> Grid:
        """The number format, and how ranges are laid over it."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        return self.scale.numel() > 0

    @property
    def quantization_range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value on the grid, float32.

        Setting a pair ``(min, max)`` of tensors or numbers sets scale and zero point.
        """
        if not self.is_calibrated:
            raise self._uncalibrated()
        return self.grid.range_for_parameters(self.scale.detach(), self.rounded_zero_point())

    @quantization_range.setter
    def quantization_range(self, bounds: tuple[Tensor | float, Tensor | float]) -> None:
        known = self.is_calibrated  # a quantizer without a range lies wherever it was made
        low, high = (
            torch.as_tensor(
                bound,
                dtype=torch.float32,
                device=bound.device if isinstance(bound, Tensor) and not known else self.scale.device,
            )
            for bound in bounds
        )
        self.set_parameters(*self.parameters_for_range(low, high))

    def parameters_for_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for a range; one that is not finite or upside down raises CalibrationError."""
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
            msg = (
                f"range {low} to {high} of {self.quant_metadata.describe()} is not finite, or its minimum exceeds "
                "its maximum"
            )
            raise CalibrationError(msg)
        return self.grid.parameters_for_range(low, high)

    def set_parameters(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take over a scale and a zero point (zero by default), shaped as the granularity asks."""
        scale = scale.detach().to(torch.float32)
        if zero_point is None:
            zero_point = self.default_zero_point(scale)
        self._assign("scale", scale)
        self._assign("zero_point", zero_point.detach().to(scale.device).expand(scale.shape))

    def default_zero_point(self, scale: Tensor) -> Tensor:
        """Return the zero point that belongs to ``scale`` when none is given."""
        return torch.zeros_like(scale, dtype=torch.int32)

    def _assign(self, name: str, value: Tensor) -> None:
        current = getattr(self, name)
        value = value.to(current.dtype)
        if current.shape == value.shape and current.device == value.device:
            with torch.no_grad():
                current.copy_(value)  # optimizers and compiled code keep the tensor they know
        elif name in self._parameters:
            setattr(self, name, torch.nn.Parameter(value.clone()))
        else:
            setattr(self, name, value.clone())

    def rounded_zero_point(self) -> Tensor:
        """Return the zero point as int32, whether it is learned or not."""
        return torch.round(self.zero_point.detach()).to(torch.int32)

    def observe(self, x: Tensor) -> None:
        """Widen the range to what ``x`` holds (min-max over all calls), without a ``with`` block."""
        from fastforward.calibration.estimate import observe_once  # nn lies below calibration

        observe_once(self, x)

    def reset_parameters(self) -> None:
        """Forget the range."""
        for name, dtype in (("scale", torch.float32), ("zero_point", torch.int32)):
            device = getattr(self, name).device
            self._parameters.pop(name, None)
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=device))

    def _described_parameters(self) -> list[str]:
        if not self.is_calibrated or self.scale.numel() != 1 or self.scale.device.type == "meta":
            return []
        return [f"scale={self.scale.item():.4g}, zero_point={int(self.rounded_zero_point())}"]
