"""Weights prepared once for the matrix kernels: signed int8 or packed int4, scales, and precomputed sums.

The tensors are ordinary, so that they can be buffers of a module, be traced and be saved. What oneDNN wants besides
(its blocked copy of a weight) is kept beside them in :class:`PackCache`.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastforward_kernels import epilogue


class PackedWeight(NamedTuple):
    """An int8 weight for :func:`int8_linear` (``[n, k]``) or :func:`int8_conv` (``[n, k / groups, ...]``).

    Attributes:
        weight: int8, contiguous.
        scale: float32 [n].
        zero_point: int32 [n], None if all are zero.
        sums: int32 [n], the sum of ``weight - zero_point`` over all but the first axis; the activation's zero point
            times this is what it adds to the product.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sums: Tensor


class PackedWeightOnly(NamedTuple):
    """An int4 or int8 weight for :func:`weight_only_linear`.

    Attributes:
        weight: int8 [n, k], or uint8 [n, k / 2] with column ``2 i`` in the low half of a byte, ``2 i + 1`` in the high.
        scale: float32 [n, k / group_size].
        zero_point: int32 like ``scale``, None if all are zero. For int4 both are in unsigned terms (0 to 15).
        group_size: columns that share a scale.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int


def pack_linear_weight(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> PackedWeight:
    """Prepare an int8 or uint8 ``weight [n, k]`` with one scale (and zero point) per row, or one for all.

    Raises:
        TypeError: the weight is not int8 or uint8.
        ValueError: ``k`` is so large that sums may overflow int32.
    """
    return _pack(weight, scale, zero_point)


def pack_conv_weight(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> PackedWeight:
    """Prepare an int8 or uint8 ``weight [n, channels / groups, ...]`` for :func:`int8_conv`, as for a linear one."""
    return _pack(weight, scale, zero_point)


def _pack(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> PackedWeight:
    if weight.dtype not in epilogue.INTEGER_RANGES:
        msg = f"an integer weight must be int8 or uint8, got {weight.dtype}"
        raise TypeError(msg)
    n = weight.shape[0]
    scale = _per_row("scale", scale, n).to(torch.float32)
    zero_point = None if zero_point is None else _per_row("zero_point", zero_point, n).to(torch.int32)
    if weight.dtype == torch.uint8:
        zero_point = (zero_point if zero_point is not None else torch.zeros_like(scale, dtype=torch.int32)) - 128
        weight = (weight ^ 128).view(torch.int8)
    if zero_point is not None and not zero_point.any():
        zero_point = None
    weight = weight.contiguous()
    k = weight[0].numel() if n else 0
    epilogue.check_depth(k, 1 + (zero_point is not None))
    sums = weight.reshape(n, -1 if n else 0).sum(1, dtype=torch.int32)
    if zero_point is not None:
        sums -= k * zero_point
    return PackedWeight(weight, scale, zero_point, sums)


def _per_row(name: str, value: Tensor, n: int) -> Tensor:
    if value.numel() not in (1, n):
        msg = f"{name} has {value.numel()} elements for a weight with {n} output channels"
        raise ValueError(msg)
    return value.detach().reshape(-1).expand(n).contiguous()


def pack_weight_only(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, group_size: int
) -> PackedWeightOnly:
    """Prepare signed integers ``q [n, k]`` (int8 storage) for :func:`weight_only_linear`.

    Args:
        q: -8 to 7 for ``bits=4``, -128 to 127 for ``bits=8``.
        scale: float32 ``[n, k / group_size]``.
        zero_point: like ``scale``; None means zero.
        bits: 4 or 8.
        group_size: columns that share a scale; divides ``k``.
    """
    if bits not in (4, 8) or q.dim() != 2 or q.shape[1] % group_size or (bits == 4 and q.shape[1] % 2):
        msg = (
            f"weight-only kernels take 4 or 8 bits and [n, k] with k an (even) multiple of group_size; "
            f"got {bits} bits, group_size {group_size} and shape {list(q.shape)}"
        )
        raise ValueError(msg)
    shape = (q.shape[0], q.shape[1] // group_size)
    scale = scale.detach().reshape(shape).to(torch.float32).contiguous()
    zero_point = None if zero_point is None else zero_point.reshape(shape).to(torch.int32).contiguous()
    if bits == 8:
        return PackedWeightOnly(q.to(torch.int8).contiguous(), scale, zero_point, group_size)
    nibbles = (q.to(torch.int16) + 8).to(torch.uint8)
    offset = torch.zeros(shape, dtype=torch.int32, device=q.device) if zero_point is None else zero_point
    return PackedWeightOnly(nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale, offset + 8, group_size)


def unpack_weight_only(weight: Tensor) -> Tensor:
    """Return the integers of a packed weight: int8 as they are, int4 as 0 to 15; int16 [n, k]."""
    if weight.dtype == torch.int8:
        return weight.to(torch.int16)
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2).to(torch.int16)


INT4_BLOCK = 64
"""Channels that ATen packs together: byte ``j`` of the 32 for a column holds channel ``j`` low and ``j + 32`` high."""


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Return the integers from 0 to 15, uint8 [n, k], of what ATen packed with vectors of 512 bits."""
    codes = packed.view(-1, k, INT4_BLOCK // 2)
    return torch.cat((codes & 15, codes >> 4), 2).transpose(1, 2).reshape(-1, k)


class PackCache:
    """What a library made from a weight, kept as long as that very tensor lives and is not changed in place."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, Any], tuple[Any, int, Any]] = {}

    def get(self, weight: Tensor, key: Any, build: Callable[[], Any]) -> Any:
        """Return what ``build()`` made for ``weight`` and ``key``, once per version of the tensor."""
        slot = (id(weight), key)
        version = 0 if weight.is_inference() else weight._version
        entry = self._entries.get(slot)
        if entry is not None and entry[0]() is weight and entry[1] == version:
            return entry[2]
        made = build()
        self._entries[slot] = (weakref.ref(weight, lambda _: self._entries.pop(slot, None)), version, made)
        return made

    def drop(self, weight: Tensor, key: Any) -> None:
        """Forget what was made for ``weight`` and ``key``; whoever holds it keeps it."""
        self._entries.pop((id(weight), key), None)
