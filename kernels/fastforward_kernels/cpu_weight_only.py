"""Weight-only linear on CPUs: ATen's int4 kernel for bfloat16 activations, else the weight is dequantized first."""

import torch
from torch import Tensor

from fastforward_kernels import packing
from fastforward_kernels import reference_matmul as reference

PACKS = packing.PackCache()
GROUPS = (32, 64, 128, 256)  # what ATen's kernel is written for
MIDDLE = 8  # ATen's kernel computes (q - 8) * scale + zero
CONVERT = "_convert_weight_to_int4pack_for_cpu"


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    """See :func:`reference_matmul.weight_only_linear`; scales are rounded to bfloat16 with bfloat16 activations."""
    n = weight.shape[0]
    fits = weight.dtype == torch.uint8 and x.dtype == torch.bfloat16 and group_size in GROUPS and n % 16 == 0
    if not fits or not x.numel() or not hasattr(torch.ops.aten, CONVERT):
        return reference.weight_only_linear(x, weight, scale, zero_point, group_size, bias)
    packed = PACKS.get(weight, "int4", lambda: getattr(torch.ops.aten, CONVERT)(_integers(weight), 2))
    # the key holds the zero point's number, the value the tensor itself, so that the number stays its own
    _, grid = PACKS.get(scale, id(zero_point), lambda: (zero_point, _scale_and_zero(scale, zero_point)))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, grid)
    y = y if bias is None else y.add_(bias)
    return y.reshape(*x.shape[:-1], n)


def _integers(weight: Tensor) -> Tensor:
    return packing.unpack_weight_only(weight).to(torch.int32)


def _scale_and_zero(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return bfloat16 ``[groups, n, 2]``: the scale, and the real value of the integer 8."""
    middle = scale * MIDDLE if zero_point is None else (MIDDLE - zero_point) * scale
    return torch.stack((scale.t(), middle.t()), dim=-1).to(torch.bfloat16).contiguous()
