"""Number formats: the affine formula, granularity, quantized tensors."""

from fastforward.quantization.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerChannel,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PerToken,
)

__all__ = [
    "Granularity",
    "PerAxis",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerTile",
    "PerToken",
]
