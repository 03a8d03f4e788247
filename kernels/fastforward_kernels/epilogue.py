"""What follows an integer matrix product: the one formula, in plain torch, and what it accepts.

``y = acc * (x_scale * weight_scale) + bias + residual`` in this order of float32 operations, then the activation, then
either a conversion to a floating type or ``clamp(rint(y * (1 / out_scale)) + out_zero_point)``, the formula of
quantization itself: requantized integers are those that quantizing the float result gives. oneDNN adds the zero point
before it rounds, which differs by one where ``y / out_scale`` lies within a float's rounding of a tie (4 in a million);
it requantizes only where that is zero. It is given the product of the scales, because which of them it would multiply
by first depends on the processor; so its results are bit-equal.

Activations are as exact as float32 allows: within ``1e-6 * max(1, |y|)`` of float64, whose rounding to float32 alone
costs 1e-6 where ``|y|`` is 16 or more.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}
INTEGER_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The largest sum of products of 8-bit numbers has to stay below 2**31: 255 * 128 * k, or 255 * 255 * k when both
# operands have zero points.
MAX_K, MAX_K_TWO_ZERO_POINTS = 65793, 33025


def apply(
    acc: Tensor,
    factors: tuple[Tensor, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Turn int32 sums into the result; ``factors``, ``bias`` and ``residual`` broadcast against ``acc``."""
    y = acc.to(torch.float32).mul_(factors[0] * factors[1])
    if bias is not None:
        y.add_(bias)
    if residual is not None:
        y.add_(residual)
    return convert(ACTIVATIONS[activation](y), out_dtype, out_scale, out_zero_point)


def convert(y: Tensor, out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None) -> Tensor:
    """Return float32 ``y`` as ``out_dtype``; integers need ``out_scale``. ``y`` may be overwritten."""
    if out_scale is None:
        return y.to(out_dtype)
    low, high = INTEGER_RANGES[out_dtype]
    zero_point = 0 if out_zero_point is None else out_zero_point.reshape(())
    return y.mul_(out_scale.reshape(()).reciprocal()).round_().add_(zero_point).clamp_(low, high).to(out_dtype)


def check(activation: str, out_dtype: torch.dtype, out_scale: Tensor | None) -> None:
    """Raise ValueError or TypeError for an epilogue that does not exist."""
    if activation not in ACTIVATIONS:
        msg = f"activation {activation!r} cannot be fused; these can: {', '.join(ACTIVATIONS)}"
        raise ValueError(msg)
    if out_dtype not in FLOATS and out_dtype not in INTEGER_RANGES:
        msg = f"out_dtype must be float32, bfloat16, float16, int8 or uint8, got {out_dtype}"
        raise TypeError(msg)
    if (out_dtype in INTEGER_RANGES) != (out_scale is not None):
        msg = f"an integer out_dtype needs out_scale and a floating one takes none; got {out_dtype} and {out_scale}"
        raise ValueError(msg)


def check_depth(k: int, zero_points: int) -> None:
    """Raise ValueError if sums over ``k`` products could leave int32; ``zero_points`` counts operands that have one."""
    limit = MAX_K_TWO_ZERO_POINTS if zero_points > 1 else MAX_K
    if k > limit:
        msg = f"a sum of {k} products of 8-bit numbers may overflow int32 (at most {limit} here); split the inner axis"
        raise ValueError(msg)
