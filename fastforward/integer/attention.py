"""Attention on operands that integer layers computed.

A head's products are too thin for integer kernels to win (32 or 64 wide), so they stay float. What can be saved is the
way there: query, key and value come from one integer product, and their codes become floats without their scales, which
go into the softmax's scale and the result.

Where the processor multiplies bfloat16 by tiles (AMX), torch's fused operator takes the codes in that type: it holds
integers up to 256 exactly and scores are summed in float32, so that only probabilities are rounded, to 8 bits.
Elsewhere the products are float32, with an exponential of what fits into a core's cache between them; the largest score
need not be subtracted first unless the sums of the exponentials turn out not to be ordinary numbers.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import rule
from fastforward.integer.grid import Grid
from fastforward.integer.merged import compute_together

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
    compute_together(operands)
    grids: list[Grid] = [x._grid for x in operands if x._grid is not None]
    q, k, v = (x.codes(grid) for x, grid in zip(operands, grids, strict=True))
    factor = scale * grids[0].scale * grids[1].scale
    pays = _pays(q, k, v, **others)
    if pays and multiplies_bfloat16():
        return _by_batches((q, k, v), grids, factor, others["attn_mask"], others["is_causal"])
    q, k, v = _centred((q, k, v), [grid.zero_point for grid in grids], torch.float32)
    if pays and grids[0].scores_fit and not others["is_causal"] and torch.backends.mkl.is_available():
        result = _by_blocks((q, k, v), factor, grids[2].scale, others["attn_mask"])
        if result is not None:
            return result
        grids[0].scores_fit = False
    return _attention_of_floats(q, k, v, scale=factor, **others).mul_(grids[2].scale)


@functools.lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies tiles of bfloat16; with vector instructions alone float32 is as fast."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and torch.backends.mkldnn.is_available() and bool(supported())


def _pays(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> bool:
    """Whether going over the operands part by part is right, and faster than torch's operator on all of them."""
    if enable_gqa or not q.shape[0] or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3]:
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.float32, torch.bool):
        return False
    per_head = q.shape[2] * k.shape[2]
    return min(per_head * q.shape[1], _BLOCK) >= _LEAST_SCORES and k.shape[2] * _LEAST_ROWS <= _BLOCK


def _by_batches(
    codes: Operands,
    grids: list[Grid],
    factor: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attention in bfloat16, by as many batches at once as stay in a core's cache.

    Args:
        codes: Query, key and value, uint8 ``[batch, heads, rows, width]``.
        grids: Their grids.
        factor: What scores are multiplied by.
        attn_mask: As of ``torch.nn.functional.scaled_dot_product_attention``.
        is_causal: Whether a row attends to the keys up to its own number only.
    """
    (batch, heads, rows, _), keys, width = codes[0].shape, codes[1].shape[2], codes[2].shape[3]
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, rows, keys)
    result = torch.empty(batch, rows, heads, width).transpose(1, 2)
    # What all keys have in common cancels in the softmax, so that theirs need not be centred.
    offsets = (grids[0].zero_point, 0, grids[2].zero_point)
    together = max(1, _BLOCK // (heads * rows * keys))
    for first in range(0, batch, together):
        part = slice(first, first + together)
        q, k, v = _centred([x[part] for x in codes], offsets, torch.bfloat16)
        some = None if mask is None else mask[part]
        attended = _attention_of_floats(q, k, v, some, is_causal=is_causal, scale=factor)
        result[part].copy_(attended).mul_(grids[2].scale)
    return result


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


def _centred(codes: Sequence[torch.Tensor], zero_points: Sequence[int], dtype: torch.dtype) -> Operands:
    """Codes less their zero points, in buffers whose memory runs in the order of that of the codes."""
    operands = zip("qkv", codes, zero_points, strict=True)
    q, k, v = (_less(_ordered(name, x, dtype).copy_(x), zero_point) for name, x, zero_point in operands)
    return q, k, v


def _less(x: torch.Tensor, offset: int) -> torch.Tensor:
    return x.sub_(offset) if offset else x


def _ordered(name: str, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batch, heads, rows, width = codes.shape
    if codes.stride(1) < codes.stride(2):
        return _buffer(name, (batch, rows, heads, width), dtype).transpose(1, 2)
    return _buffer(name, (batch, heads, rows, width), dtype)


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


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A buffer of this thread, reused while shape and type stay."""
    buffers: dict[str, torch.Tensor] = _scratch.__dict__
    known = buffers.get(name)
    if known is None or known.shape != shape or known.dtype != dtype:
        with torch.inference_mode(False):
            known = buffers[name] = torch.empty(shape, dtype=dtype)
    return known
