"""The affine quantizer: 1 to 16 bits, one scale per tensor, channel, group, block or tile."""

import torch
from torch import Tensor

from fastforward.exceptions import CalibrationError
from fastforward.nn.lazy_buffers import LazyBuffers
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.quantization import affine
from fastforward.quantization.granularity import Granularity, PerTensor


class LinearQuantizer(LazyBuffers, Quantizer):
    """Rounds to ``num_bits`` integers with a fixed scale and zero point.

    Args:
        num_bits: 1 to 16.
        symmetric: real zero lies on the middle integer.
        allow_one_sided: a symmetric quantizer whose range has no negative value uses the whole grid for it.
        granularity: which elements share a scale.
        quantized_dtype: integer type of stored values; an unsigned one makes the grid unsigned. By default the
            smallest signed type that holds ``num_bits``.
        param_dtype: accepted for compatibility; parameters are float32, always.
        restricted: leave out the most negative integer, so that a signed grid is exactly symmetric.

    Raises:
        TypeError: ``num_bits`` is no int, or ``granularity`` no granularity.
        ValueError: ``num_bits`` is out of range, or ``quantized_dtype`` too small for it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        num_bits: int,
        *,
        symmetric: bool = True,
        allow_one_sided: bool = True,
        granularity: Granularity | None = None,
        quantized_dtype: torch.dtype | None = None,
        param_dtype: torch.dtype | None = None,
        restricted: bool = False,
        metadata: QuantizerMetadata | None = None,
    ) -> None:
        super().__init__(metadata)
        if granularity is not None and not isinstance(granularity, Granularity):
            msg = f"granularity must be one of ff.granularity, got {granularity!r}"
            raise TypeError(msg)
        del param_dtype
        self.num_bits = num_bits
        self.symmetric = symmetric
        self.allow_one_sided = allow_one_sided
        self.restricted = restricted
        self.granularity = PerTensor() if granularity is None else granularity
        signed = quantized_dtype is None or is_signed(quantized_dtype)
        self.quant_min, self.quant_max = affine.integer_range(num_bits, signed=signed, restricted=restricted)
        self.quantized_dtype = storage_dtype(num_bits, quantized_dtype)
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    @property
    def grid(self) -> affine.AffineGrid:
        """The integers and how ranges are laid over them."""
        return affine.AffineGrid(self.quant_min, self.quant_max, self.symmetric, self.allow_one_sided)

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
        return self.grid.range_for_parameters(self.scale, self.rounded_zero_point())

    @quantization_range.setter
    def quantization_range(self, bounds: tuple[Tensor | float, Tensor | float]) -> None:
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=self.scale.device) for bound in bounds)
        self.set_parameters(*self.parameters_for_range(low, high))

    def parameters_for_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for a range; one that is not finite or upside down raises CalibrationError."""
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all() & (low <= high).all()):
            msg = (
                f"range {low} to {high} of {self.quant_metadata.describe()} is not finite, or its minimum exceeds "
                "its maximum"
            )
            raise CalibrationError(msg)
        return self.grid.parameters_for_range(low, high)

    def set_parameters(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take over a scale and a zero point (by default the middle of the grid), shaped as the granularity asks."""
        scale = scale.detach().to(torch.float32)
        middle = self.grid.middle if zero_point is None else zero_point
        zero_point = torch.as_tensor(middle, device=scale.device).detach().expand(scale.shape)
        self._assign("scale", scale)
        self._assign("zero_point", zero_point)

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

    def simulate(self, x: Tensor) -> Tensor:
        if self.scale.numel() == 0:
            raise self._uncalibrated()
        return affine.fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.granularity)

    def reset_parameters(self) -> None:
        """Forget the range."""
        for name, dtype in (("scale", torch.float32), ("zero_point", torch.int32)):
            device = getattr(self, name).device
            self._parameters.pop(name, None)
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        parts = [f"num_bits={self.num_bits}", f"symmetric={self.symmetric}", f"granularity={self.granularity}"]
        if self.is_calibrated and self.scale.numel() == 1:
            parts.append(f"scale={self.scale.item():.4g}, zero_point={int(self.rounded_zero_point())}")
        return ", ".join(parts)


def is_signed(dtype: torch.dtype) -> bool:
    """Return whether an integer type, sub-byte ones included, has negative values."""
    return not str(dtype).removeprefix("torch.").startswith(("uint", "bits", "quint"))


def storage_dtype(num_bits: int, quantized_dtype: torch.dtype | None) -> torch.dtype:
    """Return the byte-sized type that stores ``num_bits`` integers; sub-byte types are stored in a whole byte."""
    if quantized_dtype is None:
        return torch.int8 if num_bits <= 8 else torch.int16
    name = str(quantized_dtype).removeprefix("torch.")
    width = name.removeprefix("u").removeprefix("int")
    if not width.isdigit():
        msg = f"quantized_dtype must be an integer type, got {quantized_dtype}"
        raise TypeError(msg)
    if int(width) < num_bits:
        msg = f"{quantized_dtype} cannot hold {num_bits} bits"
        raise ValueError(msg)
    if int(width) >= 8:
        return quantized_dtype
    return torch.uint8 if name.startswith("u") else torch.int8
