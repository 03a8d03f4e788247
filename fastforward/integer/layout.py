"""Images between torch's memory layout, channels outermost, and the kernels', channels innermost."""

import torch

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
    if codes.is_contiguous(memory_format=memory):
        return codes
    if codes.shape[1] > _FEW_CHANNELS or torch.compiler.is_compiling():
        return codes.contiguous(memory_format=memory)
    return _by_channel(codes, torch.empty_like(codes, memory_format=memory))


def padded(codes: torch.Tensor, padding: list[int], value: int, memory: torch.memory_format) -> torch.Tensor:
    """``codes`` with ``value`` around them and channels innermost."""
    around = [size for size in reversed(padding) for _ in range(2)]
    if codes.shape[1] > _FEW_CHANNELS or codes.is_contiguous(memory_format=memory) or torch.compiler.is_compiling():
        return torch.nn.functional.pad(laid_out(codes, memory), around, value=value)
    sizes = [size + 2 * extra for size, extra in zip(codes.shape[2:], padding, strict=True)]
    result = torch.empty((*codes.shape[:2], *sizes), dtype=torch.uint8, memory_format=memory).fill_(value)
    inside = result
    for axis, (extra, size) in enumerate(zip(padding, codes.shape[2:], strict=True), start=2):
        inside = inside.narrow(axis, extra, size)
    _by_channel(codes, inside)
    return result


def _by_channel(codes: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Copy a channel at a time: torch's own copy would take the few channels of a pixel for its innermost loop."""
    for source, target in zip(codes.unbind(1), into.unbind(1), strict=True):
        target.copy_(source)
    return into
