"""The quantizer of block formats, which bring their own scales: mxfp8, mxfp4, nvfp4, nf4."""

from torch import Tensor

from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.quantization.block_formats import block_format, fake_quantize_blocks
from fastforward.quantization.granularity import PerGroup


class BlockFormatQuantizer(Quantizer):
    """Rounds to a block format along the last axis; scales come from each tensor, so nothing is calibrated.

    Args:
        name: one of ``fastforward.quantization.block_formats.BLOCK_FORMATS``, such as ``"mxfp8"`` or ``"nf4"``.

    Raises:
        ValueError: the name is unknown.
    """

    symmetric = True

    def __init__(self, name: str, *, metadata: QuantizerMetadata | None = None) -> None:
        super().__init__(metadata)
        chosen = block_format(name)
        self.name = name
        self.num_bits = chosen.bits
        self.granularity = PerGroup(chosen.block)

    def simulate(self, x: Tensor) -> Tensor:
        return fake_quantize_blocks(x, self.name)

    def extra_repr(self) -> str:
        return repr(self.name)
