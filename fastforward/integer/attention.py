"""Attention on operands that integer layers computed: query, key and value come from one integer product, as codes."""

import math
from typing import Any

import torch
from fastforward_kernels import cpu_attention
from fastforward_kernels.cpu_attention import Coded

from fastforward.integer.deferred import Deferred
from fastforward.integer.fusion import rule
from fastforward.integer.merged import compute_together


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
    grids = [grid for x in operands if (grid := x.grid) is not None]
    coded = [Coded(x.codes(grid), grid.scale, grid.zero_point) for x, grid in zip(operands, grids, strict=True)]
    result, subtracts = cpu_attention.attend(coded, scale, **others, subtracts=not grids[0].scores_fit)
    grids[0].scores_fit = not subtracts
    return result


def _is_coded(x: Any) -> bool:
    """Whether ``x`` is a deferred result on a grid, four-dimensional, in float32 on the CPU."""
    return (
        type(x) is Deferred
        and x._value is None
        and x.grid is not None
        and len(x._shape) == 4
        and x._dtype == torch.float32
        and x._device.type == "cpu"
    )
