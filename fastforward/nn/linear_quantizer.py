"""The affine quantizer: 1 to 16 bits, one scale per tensor, channel, group, block or tile."""

import torch
from torch import Tensor

from fastforward.nn.one_pass import can_round, round_in_one_pass
from fastforward.nn.quantizer import QuantizerMetadata
from fastforward.nn.range_quantizer import RangeQuantizer
from fastforward.quantization import affine
from fastforward.quantization.granularity import Granularity
from fastforward.quantization.tensor import QuantizedTensor

SMALLEST_SCALE = 1e-10


class LinearQuantizer(RangeQuantizer):
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

    Example:
        >>> quantizer = LinearQuantizer(8, symmetric=False)
        >>> quantizer.quantization_range = (-1.0, 1.55)
        >>> quantizer(torch.tensor([0.124, 9.0]))
        tensor([0.1200, 1.5500])
    """

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
        super().__init__(granularity, metadata)
        del param_dtype
        signed = quantized_dtype is None or is_signed(quantized_dtype)
        self.quant_min, self.quant_max = affine.integer_range(num_bits, signed=signed, restricted=restricted)
        self.num_bits = num_bits
        self.symmetric = symmetric
        self.allow_one_sided = allow_one_sided
        self.restricted = restricted
        self.quantized_dtype = storage_dtype(num_bits, quantized_dtype)
        self.gradient_scale: float | None = None

    @property
    def grid(self) -> affine.AffineGrid:
        """The integers, and how ranges are laid over them."""
        return affine.AffineGrid(self.quant_min, self.quant_max, self.symmetric, self.allow_one_sided)

    def default_zero_point(self, scale: Tensor) -> Tensor:
        return torch.full_like(scale, self.grid.middle, dtype=torch.int32)

    def simulate(self, x: Tensor) -> Tensor:
        scale = self.scale
        if scale.numel() == 0:
            if x.numel() == 0:
                return x.view_as(x)  # nothing to round: a layer without features never gets a scale per channel
            raise self._uncalibrated()
        if can_round(x, (scale, self.zero_point, self.quant_min, self.quant_max)):
            return round_in_one_pass(x, scale, self.zero_point, self.quant_min)
        factor = 1.0
        if "scale" in self._parameters:
            scale = positive(scale)
            factor = factor if self.gradient_scale is None else self.lsq_gradient_scale(x)
        return affine.fake_quantize(
            x, scale, self.zero_point, self.quant_min, self.quant_max, self.granularity, gradient_scale=factor
        )

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return ``x`` as stored integers; NaN is refused with ValueError."""
        if not self.is_calibrated:
            raise self._uncalibrated()
        scale, zero_point = self.effective_scale(), self.rounded_zero_point()
        low, high = self.quant_min, self.quant_max
        values = affine.quantize(x.detach(), scale, zero_point, low, high, self.quantized_dtype, self.granularity)
        block_size = self.granularity.block_size(x.shape)
        scale, zero_point = affine.fitted(self.granularity, x.shape, scale, zero_point)
        return QuantizedTensor(values, scale.clone(), zero_point, block_size, x.dtype, low, high)

    def effective_scale(self) -> Tensor:
        """Return the scale that is used, detached: a learned one is kept above zero."""
        scale = self.scale.detach()
        return positive(scale) if "scale" in self._parameters else scale

    def learn_range(self, *, zero_point: bool | None = None, scale_gradient: bool = True) -> "LinearQuantizer":
        """Turn the scale into a parameter, so that training learns it (LSQ), and the zero point with it (LSQ+).

        Args:
            zero_point: learn the zero point too; by default if the quantizer is asymmetric.
            scale_gradient: multiply the gradients by ``1 / sqrt(elements per block * quant_max)``, as LSQ does.

        Returns:
            The quantizer itself.

        Raises:
            CalibrationError: no range was set to start from.
        """
        if not self.is_calibrated:
            raise self._uncalibrated()
        learned = {"scale": self.scale}
        if not self.symmetric if zero_point is None else zero_point:
            learned["zero_point"] = self.zero_point
        for name, value in learned.items():
            self._buffers.pop(name, None)
            self.register_parameter(name, torch.nn.Parameter(value.detach().to(torch.float32).clone()))
        self.gradient_scale = 1.0 if scale_gradient else None
        return self

    def freeze_range(self) -> "LinearQuantizer":
        """Turn learned scales and zero points back into buffers, the zero point rounded."""
        scale, zero_point = self.effective_scale().clone(), self.rounded_zero_point()
        self.reset_parameters()
        self.set_parameters(scale, zero_point)
        self.gradient_scale = None
        return self

    def lsq_gradient_scale(self, x: Tensor) -> float:
        """Return ``1 / sqrt(n * quant_max)`` for blocks of ``n`` elements (Esser et al. 2020, section 2.2)."""
        elements = max(x.numel() // self.scale.numel(), 1)
        return float((elements * max(self.quant_max, 1)) ** -0.5)

    def extra_repr(self) -> str:
        parts = [f"num_bits={self.num_bits}", f"symmetric={self.symmetric}", f"granularity={self.granularity}"]
        return ", ".join([*parts, *self._described_parameters()])


def positive(scale: Tensor) -> Tensor:
    """Return ``scale`` kept above zero, which a step of an optimizer may cross; its gradient passes unchanged."""
    kept = scale.detach().clamp(min=SMALLEST_SCALE)
    return kept + (scale - scale.detach()) if scale.requires_grad else kept


def is_signed(dtype: torch.dtype) -> bool:
    """Return whether an integer type, sub-byte ones included, has negative values."""
    return not str(dtype).removeprefix("torch.").startswith("u")


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
