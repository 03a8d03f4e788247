"""Float8 quantizers, with a fixed scale or one from each tensor."""

import torch
from torch import Tensor

from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.nn.range_quantizer import RangeQuantizer
from fastforward.quantization.float8 import Float8Grid, fake_quantize_float8, quantize_float8
from fastforward.quantization.granularity import Granularity, PerTensor, min_max
from fastforward.quantization.tensor import QuantizedTensor


class Float8Quantizer(RangeQuantizer):
    """Rounds to a float8 type with a fixed scale; values beyond the type's range saturate.

    Args:
        dtype: ``torch.float8_e4m3fn``, ``float8_e5m2`` or their ``fnuz`` variants.
        granularity: which elements share a scale.

    Raises:
        TypeError: ``dtype`` is no float8 type.
    """

    num_bits = 8
    symmetric = True

    def __init__(
        self,
        dtype: torch.dtype = torch.float8_e4m3fn,
        granularity: Granularity | None = None,
        *,
        metadata: QuantizerMetadata | None = None,
    ) -> None:
        super().__init__(granularity, metadata)
        self._grid = Float8Grid(dtype)
        self.quantized_dtype = dtype

    @property
    def grid(self) -> Float8Grid:
        return self._grid

    @property
    def quant_min(self) -> float:
        """The type's smallest number."""
        return -self._grid.largest

    @property
    def quant_max(self) -> float:
        """The type's largest number."""
        return self._grid.largest

    def simulate(self, x: Tensor) -> Tensor:
        if self.scale.numel() == 0:
            raise self._uncalibrated()
        return fake_quantize_float8(x, self.scale, self.quantized_dtype, self.granularity)

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return ``x`` as stored float8 values."""
        if not self.is_calibrated:
            raise self._uncalibrated()
        block_size = self.granularity.block_size(x.shape)
        values = quantize_float8(x.detach(), self.scale, self.quantized_dtype, block_size)
        return QuantizedTensor(values, self.scale.detach().clone(), None, block_size, x.dtype)

    def extra_repr(self) -> str:
        parts = [f"{self.quantized_dtype}", f"granularity={self.granularity}"]
        return ", ".join([*parts, *(text.partition(",")[0] for text in self._described_parameters())])


class DynamicFloat8Quantizer(Quantizer):
    """Rounds to a float8 type with a scale from each tensor's own largest magnitude.

    Args:
        dtype: a float8 type.
        granularity: which elements share a scale.
    """

    num_bits = 8
    symmetric = True

    def __init__(
        self,
        dtype: torch.dtype = torch.float8_e4m3fn,
        granularity: Granularity | None = None,
        *,
        metadata: QuantizerMetadata | None = None,
    ) -> None:
        super().__init__(metadata)
        self.granularity = PerTensor() if granularity is None else granularity
        self.quantized_dtype = dtype
        self._grid = Float8Grid(dtype)

    def scale_for(self, x: Tensor) -> Tensor:
        """Return the scale of each block of ``x``."""
        return self._grid.parameters_for_range(*min_max(x.detach(), self.granularity))[0]

    def simulate(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        return fake_quantize_float8(x, self.scale_for(x), self.quantized_dtype, self.granularity)

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return ``x`` as stored float8 values."""
        scale, block_size = self.scale_for(x), self.granularity.block_size(x.shape)
        values = quantize_float8(x.detach(), scale, self.quantized_dtype, block_size)
        return QuantizedTensor(values, scale, None, block_size, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.quantized_dtype}, granularity={self.granularity}"
