"""Attention on operands that integer layers computed.

A head's products are too thin for integer kernels to win (32 or 64 wide), so they stay float. What can be saved is the
way there: query, key and value come from one integer product, and their codes become floats without their scales, which
go into the softmax's scale and the result. Between the products stands an exponential of what fits into a core's cache;
the largest score need not be subtracted first unless the sums of the exponentials turn out not to be ordinary numbers.
"""

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import rule
from fastforward.integer.grid import Grid
from fastforward.integer.merged import Merged, compute_together

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_scratch = threading.local()
_attention_of_floats = torch.nn.functional.scaled_dot_product_attention

_BLOCK = 1 << 18
"""Scores computed at once: 1 MB, half of a core's second cache."""
_LEAST_SCORES = 1 << 14
"""Below so many scores at once the calls cost more than what they save."""
_LEAST_ROWS = 16
_SMALLEST, _LARGEST = 1e-30, 1e30


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
    merged = compute_together(operands)
    grids: list[Grid] = [x._grid for x in operands if x._grid is not None]
    q, k, v = _centred(operands, grids) if merged is None else _centred_together(operands, *merged)
    factor = scale * grids[0].scale * grids[1].scale
    if grids[0].scores_fit and _pays(q, k, v, **others):
        result = _by_blocks((q, k, v), factor, grids[2].scale, others["attn_mask"])
        if result is not None:
            return result
        grids[0].scores_fit = False
    return _attention_of_floats(q, k, v, scale=factor, **others).mul_(grids[2].scale)


def _pays(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> bool:
    """Whether computing the scores block by block is right, and faster than torch's operator."""
    if is_causal or enable_gqa or not q.shape[0] or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3]:
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.float32, torch.bool):
        return False
    per_head = q.shape[2] * k.shape[2]
    return (
        min(per_head * q.shape[1], _BLOCK) >= _LEAST_SCORES
        and k.shape[2] * _LEAST_ROWS <= _BLOCK
        and torch.backends.mkl.is_available()
    )


def _by_blocks(
    operands: Operands, factor: float, value_scale: float, attn_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Attention by blocks of scores; ``None`` if exponentials left the range in which float32 is exact enough.

    Args:
        operands: Query, key and value, float32 ``[batch, heads, rows, width]`` with unit stride in their width.
        factor: What scores are multiplied by.
        value_scale: What the result is multiplied by.
        attn_mask: Added to the scores, or where it is false removes them; broadcasts against them.
    """
    q, k, v = operands
    (batch, heads, rows, _), keys, width = q.shape, k.shape[2], v.shape[3]
    mask = None if attn_mask is None else _additive(attn_mask).expand(batch, heads, rows, keys)
    transposed = k.transpose(2, 3)
    result = torch.empty(batch, rows, heads, width).transpose(1, 2)
    sums = torch.empty(batch, heads, rows, 1)
    for b, h, r in _blocks(batch, heads, rows, keys):
        left, into, total = q[b, h, r], result[b, h, r], sums[b, h, r]
        scores = _buffer("scores", (*left.shape[:2], keys))
        torch.baddbmm(scores, left, transposed[b, h], beta=0, alpha=factor, out=scores)
        if mask is not None:
            scores.add_(mask[b, h, r])
        torch.exp(scores, out=scores)
        torch.sum(scores, -1, keepdim=True, out=total)
        product = torch.bmm(scores, v[b, h], out=_buffer("product", tuple(into.shape)))
        torch.div(product, total, out=into)
    least, largest = torch.aminmax(sums)
    # NaN compares false, and so do sums of rows without any score.
    ordinary = float(least) > _SMALLEST and float(largest) < _LARGEST
    return result.mul_(value_scale) if ordinary else None


def _blocks(batch: int, heads: int, rows: int, keys: int) -> Iterator[tuple[int, slice, slice]]:
    """Indices of batch, heads and rows whose scores fit into a block."""
    together = max(1, min(heads, _BLOCK // (rows * keys)))
    step = min(rows, _BLOCK // keys)
    for b in range(batch):
        for h in range(0, heads, together):
            for r in range(0, rows, step):
                yield b, slice(h, h + together), slice(r, r + step)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """A mask to be added to scores."""
    return torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask


def _centred_together(operands: tuple[Deferred, ...], merged: Merged, codes: torch.Tensor) -> Operands:
    """What operands computed together come to, less their zero points, as floats: converted in one go."""
    values = _buffer("together", tuple(codes.shape)).copy_(codes).sub_(merged.zero_points)
    q, k, v = (x.along(part) for x, part in zip(operands, values.split(merged.sizes, -1), strict=True))
    return q, k, v


def _centred(operands: tuple[Deferred, ...], grids: list[Grid]) -> Operands:
    """The same of operands computed one by one, in buffers whose memory runs in the order of that of their codes."""
    coded = ((name, x.codes(grid), grid) for name, x, grid in zip("qkv", operands, grids, strict=True))
    q, k, v = (_ordered(name, codes).copy_(codes).sub_(grid.zero_point) for name, codes, grid in coded)
    return q, k, v


def _ordered(name: str, codes: torch.Tensor) -> torch.Tensor:
    batch, heads, rows, width = codes.shape
    if codes.stride(1) < codes.stride(2):
        return _buffer(name, (batch, rows, heads, width)).transpose(1, 2)
    return _buffer(name, (batch, heads, rows, width))


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
