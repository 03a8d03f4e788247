"""Attention on operands that integer layers computed.

A head's products are too thin for integer kernels to win (32 or 64 wide), so they stay float. What can be saved is the
way there: query, key and value come from one integer product, and their codes become floats without their scales, which
go into the softmax's scale and the result.
"""

import math
import threading
from typing import Any

import torch

from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import rule
from fastforward.integer.grid import Grid
from fastforward.integer.merged import compute_together

_scratch = threading.local()
_attention_of_floats = torch.nn.functional.scaled_dot_product_attention


@rule(torch.nn.functional.scaled_dot_product_attention)
def _attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    operands = (query, key, value)
    if dropout_p or type(attn_mask) is Deferred or not all(_is_coded(x) for x in operands):
        return NotImplemented
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return NotImplemented
    scale = 1 / math.sqrt(query._shape[-1]) if scale is None else scale
    return attend(operands, scale, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)


def attend(operands: tuple[Deferred, Deferred, Deferred], scale: float, **others: Any) -> torch.Tensor:
    """``softmax(q k^T scale) v`` of operands ``[batch, heads, rows, width]``, with their scales applied afterwards."""
    compute_together(operands)
    grids: list[Grid] = [x._grid for x in operands if x._grid is not None]
    q, k, v = (_centred(name, x.codes(grid), grid) for name, x, grid in zip("qkv", operands, grids, strict=True))
    factor = scale * grids[0].scale * grids[1].scale
    return _attention_of_floats(q, k, v, scale=factor, **others).mul_(grids[2].scale)


def _centred(name: str, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes less their zero point as floats, in a buffer whose memory runs in the same order."""
    batch, heads, rows, width = codes.shape
    if codes.stride(1) < codes.stride(2):
        buffer = _buffer(name, (batch, rows, heads, width)).transpose(1, 2)
    else:
        buffer = _buffer(name, (batch, heads, rows, width))
    return buffer.copy_(codes).sub_(grid.zero_point)


def _is_coded(x: Any) -> bool:
    """Whether ``x`` is a deferred result on a grid, four-dimensional, in float32 on the CPU."""
    return (
        type(x) is Deferred
        and x._grid is not None
        and x._value is None
        and len(x._shape) == 4
        and x._dtype == torch.float32
        and x._device.type == "cpu"
    )


def _buffer(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 buffer of this thread, reused while the shape stays."""
    buffers: dict[str, torch.Tensor] = _scratch.__dict__
    known = buffers.get(name)
    if known is None or known.shape != shape:
        with torch.inference_mode(False):
            known = buffers[name] = torch.empty(shape)
    return known
