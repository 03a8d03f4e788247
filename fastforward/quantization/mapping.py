"""torchao's vocabulary of scales and zero points: how a range of real values is mapped to a target type."""

import enum

import torch
from torch import Tensor

from fastforward.quantization.affine import integer_range

FLOAT8_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


class MappingType(enum.Enum):
    """How real values are laid over the target's values."""

    SYMMETRIC = "symmetric"
    """Zero in the middle; both sides use the same number of steps."""
    SYMMETRIC_NO_CLIPPING_ERR = "symmetric_no_clipping_err"
    """Zero in the middle; the scale lets the further bound of each side just fit."""
    ASYMMETRIC = "asymmetric"
    """The range, with zero in it, fills the target's values."""


class ZeroPointDomain(enum.Enum):
    """What a zero point is."""

    INT = "int"
    """An integer: ``q = round(x / scale) + zero_point``."""
    FLOAT = "float"
    """A real value at the middle of the range."""
    NONE = "none"
    """There is none."""


def quant_bounds(
    target_dtype: torch.dtype, quant_min: float | None = None, quant_max: float | None = None
) -> tuple[float, float]:
    """Return the smallest and largest value of ``target_dtype``, unless they are given.

    Raises:
        TypeError: ``target_dtype`` is neither an integer nor a float8 type.
        ValueError: a given bound does not fit the type.
    """
    if target_dtype in FLOAT8_DTYPES:
        low, high = -torch.finfo(target_dtype).max, torch.finfo(target_dtype).max
    else:
        name = str(target_dtype).removeprefix("torch.")
        width = name.removeprefix("u").removeprefix("int")
        if not width.isdigit():
            msg = f"target_dtype must be an integer or float8 type, got {target_dtype}"
            raise TypeError(msg)
        low, high = integer_range(int(width), signed=not name.startswith("u"))
    chosen = (low if quant_min is None else quant_min, high if quant_max is None else quant_max)
    if not low <= chosen[0] < chosen[1] <= high:
        msg = f"quant_min {chosen[0]} and quant_max {chosen[1]} must be increasing and within {target_dtype}"
        raise ValueError(msg)
    return chosen


def choose_qparams(
    low: Tensor,
    high: Tensor,
    mapping_type: MappingType,
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    *,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point for a range.

    Args:
        low: smallest values.
        high: largest values, same shape.
        mapping_type: how the range is laid over the target.
        target_dtype: integer or float8 type.
        quant_min: smallest integer to use, by default that of the type.
        quant_max: largest integer to use.
        eps: smallest scale; by default the smallest normal number of ``low``'s type.
        scale_dtype: type of the scale; by default that of ``low``.
        zero_point_dtype: type of the zero point; by default int32, or the scale's in the float domain.
        preserve_zero: extend the range to zero, so that zero is represented exactly.
        zero_point_domain: what the zero point is; ``NONE`` yields None.
    """
    q_low, q_high = quant_bounds(target_dtype, quant_min, quant_max)
    scale_dtype = low.dtype if scale_dtype is None else scale_dtype
    eps = torch.finfo(low.dtype).tiny if eps is None else eps
    low, high = low.to(torch.float32), high.to(torch.float32)
    if preserve_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if mapping_type is MappingType.ASYMMETRIC:
        scale = ((high - low) / (q_high - q_low)).clamp(min=eps)
        zero_point = (q_low - torch.round(low / scale)).clamp(q_low, q_high)
    else:
        if mapping_type is MappingType.SYMMETRIC:
            scale = torch.maximum(-low, high) / ((q_high - q_low) / 2)
        else:
            scale = torch.maximum(low / q_low, high / q_high)
        scale = scale.clamp(min=eps)
        zero_point = torch.full_like(scale, int((q_high + q_low + 1) / 2))
    if zero_point_domain is ZeroPointDomain.NONE:
        return scale.to(scale_dtype), None
    if zero_point_domain is ZeroPointDomain.FLOAT:
        middle = (q_high + q_low + 1) / 2
        return scale.to(scale_dtype), (low + scale * middle).to(zero_point_dtype or scale_dtype)
    return scale.to(scale_dtype), zero_point.to(zero_point_dtype or torch.int32)
