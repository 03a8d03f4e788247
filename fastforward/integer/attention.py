"""Attention on operands that integer layers computed.

A head's products are too thin for integer kernels to win (32 or 64 wide), so they stay float. What can be saved is the
way there: the codes of query, key and value become floats already in the layout that batched products want, without
their scales, which go into the softmax's scale and the result.
"""

import math
import threading
from typing import Any

import torch

from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import rule
from fastforward.integer.grid import Grid

SCORES_LIMIT = 1 << 19
"""Scores of one sample up to this many elements (2 MB) stay in a core's cache; beyond, torch's blocked kernel wins."""
_scratch = threading.local()


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
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or not all(_is_coded(x) for x in operands):
        return NotImplemented
    batch, heads, rows, width = query._shape
    columns = key._shape[2]
    if heads * rows * columns > SCORES_LIMIT or key._shape != (batch, heads, columns, width):
        return NotImplemented
    if value._shape != key._shape or query._dtype != torch.float32:
        return NotImplemented
    return attend(operands, 1 / math.sqrt(width) if scale is None else scale)


def attend(operands: tuple[Deferred, Deferred, Deferred], scale: float) -> torch.Tensor:
    """``softmax(q k^T scale) v`` sample by sample, with buffers that stay in the cache and never leave here."""
    grids: list[Grid] = [x._grid for x in operands if x._grid is not None]
    codes = [x.codes(grid) for x, grid in zip(operands, grids, strict=True)]
    batch, heads, rows, width = codes[0].shape
    columns = codes[1].shape[2]
    q, k, v = (_buffer(name, (heads, x.shape[2], width)) for name, x in zip("qkv", codes, strict=True))
    scores = _buffer("scores", (heads, rows, columns))
    # torch's own kernel returns this layout too: heads side by side in memory.
    result = torch.empty(batch, rows, heads, width).transpose(1, 2)
    factor = scale * grids[0].scale * grids[1].scale
    for sample in range(batch):
        for buffer, x, grid in zip((q, k, v), codes, grids, strict=True):
            torch.sub(x[sample], float(grid.zero_point), out=buffer)
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=factor, out=scores)
        torch.softmax(scores, -1, out=scores)
        result[sample] = torch.bmm(scores, v)
    return result.mul_(grids[2].scale)


def _is_coded(x: Any) -> bool:
    """Whether ``x`` is a deferred result on a grid, four-dimensional, on the CPU."""
    return (
        type(x) is Deferred
        and x._grid is not None
        and x._value is None
        and len(x._shape) == 4
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
