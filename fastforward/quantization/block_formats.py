"""Block formats, simulated bit by bit: mxfp8, mxfp6, mxfp4, nvfp4 and nf4.

Blocks lie along the last axis; a last block that is shorter is treated as if filled up with zeros.

- MX (OCP Microscaling Formats specification 1.0, sections 5 and 6.3): blocks of 32 share the power of two
  ``2 ** (floor(log2(largest magnitude)) - emax)``, where ``emax`` is the exponent of the element type's largest number;
  elements are rounded half to even and saturate.
- NVFP4 (NVIDIA 2025, "Pretraining Large Language Models with NVFP4", appendix C): blocks of 16 elements of e2m1 with a
  scale in e4m3, and one float32 scale of the whole tensor, ``largest magnitude / (6 * 448)``.
- NF4 (Dettmers et al. 2023, "QLoRA", appendix E): blocks of 64, divided by their largest magnitude, to the nearest of
  16 quantiles of the normal distribution.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class MiniFloat:
    """A small floating type without infinities, given by its numbers.

    Attributes:
        mantissa_bits: number of explicit mantissa bits.
        min_exponent: exponent of the smallest normal number.
        largest: the largest number.
        max_exponent: exponent of the largest number.
    """

    mantissa_bits: int
    min_exponent: int
    largest: float
    max_exponent: int

    def round(self, x: Tensor) -> Tensor:
        """Return float32 ``x`` rounded half to even to the type's numbers; larger ones saturate."""
        exponent = floor_log2(x).clamp(min=self.min_exponent)
        step = exponent - self.mantissa_bits
        return torch.ldexp(torch.round(torch.ldexp(x, -step)), step).clamp(-self.largest, self.largest)


E2M1 = MiniFloat(1, 0, 6.0, 2)
E2M3 = MiniFloat(3, 0, 7.5, 2)
E3M2 = MiniFloat(2, -2, 28.0, 4)
E4M3 = MiniFloat(3, -6, 448.0, 8)
E5M2 = MiniFloat(2, -14, 57344.0, 15)

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def floor_log2(x: Tensor) -> Tensor:
    """Return ``floor(log2(|x|))`` exactly, as int32; a very small exponent for zero."""
    exponent = torch.frexp(x.abs())[1] - 1
    return torch.where(x == 0, -200, exponent).to(torch.int32)


def mx(element: MiniFloat, blocks: Tensor) -> Tensor:
    """Round float32 ``[..., 32]`` blocks to an MX format."""
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = (floor_log2(largest) - element.max_exponent).clamp(-127, 127)
    return torch.ldexp(element.round(torch.ldexp(blocks, -exponent)), exponent)


def nvfp4(blocks: Tensor) -> Tensor:
    """Round float32 ``[..., 16]`` blocks of one tensor to NVFP4."""
    # The two roundings of scales below follow the paper's order of operations, which fixes every bit.
    tensor_encode = E2M1.largest * E4M3.largest / blocks.abs().amax()
    tensor_encode = torch.where(torch.isinf(tensor_encode), 1.0, tensor_encode)  # a tensor of zeros
    tensor_decode = 1.0 / tensor_encode
    block_decode = blocks.abs().amax(-1, keepdim=True) / E2M1.largest
    stored = E4M3.round(block_decode * tensor_encode)
    encode = 1.0 / (stored * tensor_decode)
    quantized = E2M1.round(torch.where(stored == 0, 0.0, blocks * encode))
    return quantized * (stored * tensor_decode)


def nf4(blocks: Tensor) -> Tensor:
    """Round float32 ``[..., 64]`` blocks to NF4; halfway between two levels goes to the lower one."""
    levels = torch.tensor(NF4_LEVELS, device=blocks.device)
    scale = blocks.abs().amax(-1, keepdim=True)
    normalized = blocks / torch.where(scale == 0, 1.0, scale)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(normalized, middles)] * scale
    return torch.where(torch.isnan(blocks), blocks, nearest)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A named block format.

    Attributes:
        bits: bits of one element, without scales.
        block: number of elements that share a scale.
        round_blocks: rounds float32 ``[..., block]``.
    """

    bits: int
    block: int
    round_blocks: Callable[[Tensor], Tensor]


def _mx(bits: int, element: MiniFloat) -> BlockFormat:
    return BlockFormat(bits, 32, lambda blocks: mx(element, blocks))


BLOCK_FORMATS = {
    "mxfp8": _mx(8, E4M3),
    "mxfp8_e4m3": _mx(8, E4M3),
    "mxfp8_e5m2": _mx(8, E5M2),
    "mxfp6_e2m3": _mx(6, E2M3),
    "mxfp6_e3m2": _mx(6, E3M2),
    "mxfp4": _mx(4, E2M1),
    "nvfp4": BlockFormat(4, 16, nvfp4),
    "nf4": BlockFormat(4, 64, nf4),
}


def block_format(name: str) -> BlockFormat:
    """Return the format called ``name``; an unknown name raises ValueError with the known ones."""
    if name not in BLOCK_FORMATS:
        msg = f"unknown block format {name!r}; known are {', '.join(BLOCK_FORMATS)}"
        raise ValueError(msg)
    return BLOCK_FORMATS[name]


def fake_quantize_blocks(x: Tensor, name: str) -> Tensor:
    """Round ``x`` to a block format: same shape and dtype, computed in float32; straight-through gradient."""
    chosen = block_format(name)
    if x.numel() == 0 or x.dim() == 0:
        return x if x.dim() else fake_quantize_blocks(x.reshape(1), name).reshape(())
    length = x.shape[-1]
    data = F.pad(x.detach().to(torch.float32), (0, -length % chosen.block))
    rounded = chosen.round_blocks(data.unflatten(-1, (-1, chosen.block))).flatten(-2)
    result = rounded[..., :length].to(x.dtype)
    return _StraightThrough.apply(x, result) if x.requires_grad else result


class _StraightThrough(torch.autograd.Function):
    """Yields given values with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor, result: Tensor) -> Tensor:
        del ctx, x
        return result

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None
