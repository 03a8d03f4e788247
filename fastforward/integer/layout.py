"""Images between torch's memory layout, channels outermost, and the kernels', channels innermost."""

import torch
from fastforward_kernels.cpu_chain import channels_inside
from fastforward_kernels.ops_chain import CHANNELS_INSIDE

from fastforward.integer.tracing import fuses

_FEW_CHANNELS = 4
_LARGE = 1 << 16
"""Elements of an image from which its copy is limited by memory."""


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous()``, faster for large images with channels innermost.

    torch copies transposed matrices by blocks, but images element by element.
    """
    if x.dim() != 4 or x.numel() < _LARGE * x.shape[0] or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for source, target in zip(x.flatten(2), result.flatten(2), strict=True):
        target.copy_(source)
    return result


def laid_out(codes: torch.Tensor, memory: torch.memory_format) -> torch.Tensor:
    """``codes`` with channels innermost."""
    return padded(codes, [0] * (codes.dim() - 2), 0, memory)


def padded(codes: torch.Tensor, padding: list[int], value: int, memory: torch.memory_format) -> torch.Tensor:
    """``codes`` with ``value`` around them and channels innermost."""
    if codes.shape[1] <= _FEW_CHANNELS and codes.dim() > 3 and not codes.is_contiguous(memory_format=memory):
        if not torch.compiler.is_compiling():
            return channels_inside(codes, padding, value)
        if fuses("cpu"):
            return CHANNELS_INSIDE(codes, padding, value)
    codes = codes.contiguous(memory_format=memory)
    around = [size for size in reversed(padding) for _ in range(2)]
    return torch.nn.functional.pad(codes, around, value=value) if any(padding) else codes
