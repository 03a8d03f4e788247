"""Attention on codes, on CPUs: operands become floats without their scales, which go into the softmax's and the result.

A head's products are too thin for integer kernels to win (32 or 64 wide), so they stay float. Where the processor
multiplies bfloat16 by tiles (AMX), torch's fused operator takes the codes in that type: it holds integers up to 256
exactly and scores are summed in float32, so that only probabilities are rounded, to 8 bits. Elsewhere the products are
float32, with an exponential of what fits into a core's cache between them; the largest score need not be subtracted
first unless the sums of the exponentials turn out not to be ordinary numbers.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastforward_kernels import reference_matmul as reference

Operands = tuple[Tensor, Tensor, Tensor]
_scratch = threading.local()
_attention_of_floats = torch.nn.functional.scaled_dot_product_attention

BLOCK = 1 << 18
"""Scores computed at once: 1 MB, half of a core's second cache."""
_LEAST_SCORES = 1 << 14
"""Below so many scores at once the calls cost more than what they save."""
_LEAST_ROWS = 16
_SMALLEST, _LARGEST = 1e-30, 1e30


class Coded(NamedTuple):
    """An operand ``[batch, heads, rows, width]``: uint8 codes, and what they stand for: ``(codes - zero) * step``."""

    codes: Tensor
    step: float
    zero: int


def attend(
    operands: Sequence[Coded],
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    subtracts: bool = False,
) -> tuple[Tensor, bool]:
    """``softmax(q k^T scale) v``, the arguments as of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        operands: Query, key and value.
        scale: What their scores are multiplied by.
        attn_mask: Added to the scores, or where it is false removes them.
        is_causal: Whether a row attends to the keys up to its own number only.
        enable_gqa: Whether several heads of the query share one of key and value.
        subtracts: Whether exponentials of such operands are known to need the largest score subtracted first.

    Returns:
        float32 ``[batch, heads, rows, width]``, and ``subtracts`` for the next call.
    """
    codes: Operands = tuple(x.codes for x in operands)  # type: ignore[assignment]
    zeros = [x.zero for x in operands]
    factor, step = scale * operands[0].step * operands[1].step, operands[2].step
    pays = _pays(*codes, attn_mask, enable_gqa)
    if pays and multiplies_bfloat16():
        return _by_batches(codes, zeros, factor, step, attn_mask, is_causal), subtracts
    q, k, v = _centred(codes, zeros, torch.float32)
    if pays and not subtracts and not is_causal and torch.backends.mkl.is_available():
        result = _by_blocks((q, k, v), factor, step, attn_mask)
        if result is not None:
            return result, False
        subtracts = True
    attended = _attention_of_floats(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=factor, enable_gqa=enable_gqa
    )
    return attended.mul_(step), subtracts


def attention_of_integers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_step: Tensor,
    k_step: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See :func:`reference_matmul.attention_of_integers`."""
    mask = attn_mask if attn_mask is None or attn_mask.dtype in (q.dtype, torch.bool) else attn_mask.to(q.dtype)
    whole = q.dtype == torch.float32 and not is_causal and torch.backends.mkl.is_available()
    if whole and _pays(q, k, v, mask, enable_gqa=False):
        y = _by_blocks((q, k, v), scale * float(q_step) * float(k_step), 1.0, mask)
        if y is not None:
            return y
    return reference.attention_of_integers(q, k, v, q_step, k_step, mask, is_causal, scale)


@functools.lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies tiles of bfloat16; with vector instructions alone float32 is as fast."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and torch.backends.mkldnn.is_available() and bool(supported())


def _pays(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
) -> bool:
    """Whether going over the operands part by part is right, and faster than torch's operator on all of them."""
    if enable_gqa or not q.shape[0] or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3]:
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.float32, torch.bool):
        return False
    per_head = q.shape[2] * k.shape[2]
    return min(per_head * q.shape[1], BLOCK) >= _LEAST_SCORES and k.shape[2] * _LEAST_ROWS <= BLOCK


def _by_batches(
    codes: Operands,
    zeros: Sequence[int],
    factor: float,
    step: float,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Attention in bfloat16, by as many batches at once as stay in a core's cache.

    Args:
        codes: Query, key and value, uint8 ``[batch, heads, rows, width]``.
        zeros: Their zero points.
        factor: What scores are multiplied by.
        step: What the result is multiplied by.
        attn_mask: As of ``torch.nn.functional.scaled_dot_product_attention``.
        is_causal: Whether a row attends to the keys up to its own number only.
    """
    (batch, heads, rows, _), keys, width = codes[0].shape, codes[1].shape[2], codes[2].shape[3]
    mask = None if attn_mask is None else _additive(attn_mask).expand(batch, heads, rows, keys)
    result = torch.empty(batch, rows, heads, width).transpose(1, 2)
    # What all keys have in common cancels in the softmax, so that theirs need not be centred.
    offsets = (zeros[0], 0, zeros[2])
    together = max(1, BLOCK // (heads * rows * keys))
    for first in range(0, batch, together):
        part = slice(first, first + together)
        q, k, v = _centred([x[part] for x in codes], offsets, torch.bfloat16)
        some = None if mask is None else mask[part]
        attended = _attention_of_floats(q, k, v, some, is_causal=is_causal, scale=factor)
        result[part].copy_(attended).mul_(step)
    return result


def _by_blocks(operands: Operands, factor: float, value_scale: float, attn_mask: Tensor | None) -> Tensor | None:
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
    together = max(1, min(heads, BLOCK // (rows * keys)))
    step = min(rows, BLOCK // keys)
    for b in range(batch):
        for h in range(0, heads, together):
            for r in range(0, rows, step):
                yield b, slice(h, h + together), slice(r, r + step)


def _additive(mask: Tensor) -> Tensor:
    """A mask to be added to scores."""
    return torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask


def _centred(codes: Sequence[Tensor], zero_points: Sequence[int], dtype: torch.dtype) -> Operands:
    """Codes less their zero points, in buffers whose memory runs in the order of that of the codes."""
    operands = zip("qkv", codes, zero_points, strict=True)
    q, k, v = (_less(_ordered(name, x, dtype).copy_(x), zero_point) for name, x, zero_point in operands)
    return q, k, v


def _less(x: Tensor, offset: int) -> Tensor:
    return x.sub_(offset) if offset else x


def _ordered(name: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, rows, width = codes.shape
    if codes.stride(1) < codes.stride(2):
        return _buffer(name, (batch, rows, heads, width), dtype).transpose(1, 2)
    return _buffer(name, (batch, heads, rows, width), dtype)


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A buffer of this thread, reused while shape and type stay."""
    buffers: dict[str, Tensor] = _scratch.__dict__
    known = buffers.get(name)
    if known is None or known.shape != shape or known.dtype != dtype:
        with torch.inference_mode(False):
            known = buffers[name] = torch.empty(shape, dtype=dtype)
    return known
