"""Products of many rows with an int4 weight in the order of ATen's kernel, which is written for few of them.

That kernel unpacks the weight again for every four rows. Here it is made real in bfloat16 once, some channels at a time
that stay in the cache, and multiplied by torch's bfloat16 product.
"""

import functools

import torch
from torch import Tensor

from fastforward_kernels.cpu_sweep import CHUNK, scratch
from fastforward_kernels.packing import INT4_BLOCK as BLOCK
from fastforward_kernels.packing import unpack_int4

_SPREAD, _KEPT, _ONES = (torch.tensor(bits, dtype=torch.int32) for bits in (0x8008, 0x0078_0078, 0x3F80_3F80))
"""They move the halves of a byte to the fractions of two bfloat16 numbers ``1 + q / 16``."""
_STEPS, _OFFSET = 16, 24
"""``(q - 8) * scale`` is ``(1 + q / 16) * 16 * scale - 24 * scale``."""
_AT_ONCE = 4 * CHUNK  # weights; as bfloat16 they and their bits share a second-level cache of 2 MiB


@functools.cache
def reads_packed() -> bool:
    """Whether ATen packs int4 weights here as :func:`int4_linear` reads them; it depends on the vector width."""
    if not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"):
        return False
    integers = torch.randint(16, (2 * BLOCK, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch._convert_weight_to_int4pack_for_cpu(integers, 1)
    return torch.equal(unpack_int4(packed, 64).to(torch.int32), integers)


def int4_linear(rows: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """See :func:`reference_matmul.int4_linear`; real weights and products are rounded to bfloat16."""
    (m, k), n = rows.shape, packed.shape[0]
    groups, y = k // group, torch.empty(m, n)
    scale, middle = scales.unbind(-1)
    steps, exact = scale * _STEPS, middle.float() - scale.float() * _OFFSET
    added = exact.to(torch.bfloat16)
    at_once = max(1, _AT_ONCE // (k * BLOCK))
    blocks = (packed.view(-1, k, BLOCK // 2), _in_pairs(steps), _in_pairs(added))
    pieces = (*(tensor.split(at_once) for tensor in blocks), y.view(m, -1, 2, BLOCK // 2).split(at_once, 1))
    for codes, step, shift, target in zip(*pieces, strict=True):
        bits = scratch(0, codes, torch.int32).copy_(codes).mul_(_SPREAD).bitwise_and_(_KEPT).bitwise_or_(_ONES)
        numbers = bits.view(torch.bfloat16).view(-1, groups, group, BLOCK)
        weight = scratch(1, numbers, torch.bfloat16).view(groups, group, -1, BLOCK)
        torch.addcmul(shift, numbers, step, out=weight.permute(2, 0, 1, 3))
        target.copy_(torch.mm(rows, weight.view(k, -1)).view(m, -1, BLOCK // 2, 2).transpose(2, 3))
    # Every weight of a group misses what rounding took from `added`: times the sum of the activations, that comes here.
    return y.addmm_(rows.view(m, groups, group).sum(-1, dtype=torch.float32), exact.sub_(added))


def _in_pairs(parameters: Tensor) -> Tensor:
    """``[groups, n]`` as ``[blocks, groups, 1, 64]``, the channels in the order in which their codes are moved."""
    groups = parameters.shape[0]
    return parameters.view(groups, -1, 2, BLOCK // 2).permute(1, 0, 3, 2).reshape(-1, groups, 1, BLOCK)
