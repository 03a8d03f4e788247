"""Device functions that all families share: rounding, clamping, conversion, activations, requantization.

They are right on NVIDIA and AMD GPUs and in Triton's interpreter, whose conversions from float32 to bfloat16 and float8
truncate: there they round by integer arithmetic first.
"""

# ruff: noqa: ANN001, ANN201 - Triton reads annotations itself
# mypy: ignore-errors
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def rint(x):
    """Round to the nearest integer, ties to even; |x| must be below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):
    """Limit ``x``; NaN stays NaN, which ``tl.clamp`` and plain minimum and maximum do not promise."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=NAN_STAYS), high, propagate_nan=NAN_STAYS)


@triton.jit
def inverse(scale):
    """``1 / scale``, correctly rounded (plain division is approximate on NVIDIA)."""
    return tl.math.div_rn(1.0, scale)


@triton.jit
def centred_integer(x, inv, low, high):
    """Return ``clamp(rint(x / scale) + z, qmin, qmax) - z`` as float32; the bounds have ``z`` taken off already."""
    return rint(clamp(x * inv, low, high))


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """Convert float32 to a floating ``dtype``, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, bits)
        return rounded.to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def round_to_float8(x, MANTISSA: tl.constexpr, SMALLEST_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """Round float32 to the nearest float8 number, ties to even, saturating; stays float32.

    Adding and subtracting 1.5 * 2**(e + 23 - MANTISSA) rounds to MANTISSA bits at the exponent e of ``x``. Works on
    targets that have no float8 conversion.
    """
    x = clamp(x, -LARGEST, LARGEST)
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, SMALLEST_EXPONENT)
    magic = ((exponent + (23 - MANTISSA) + 127) << 23 | 0x400000).to(tl.float32, bitcast=True)
    return tl.where(x == x, (x + magic) - magic, x)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """Apply the activation of that name to float32 ``y``."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=NAN_STAYS)
    elif ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def finished(y, out_scale_ptr, out_zero_point_ptr, dtype: tl.constexpr, REQUANTIZE: tl.constexpr):
    """Return ``y`` in the type of the result: converted, or requantized to int8 or uint8."""
    if REQUANTIZE:
        low: tl.constexpr = -128.0 if dtype == tl.int8 else 0.0
        high: tl.constexpr = 127.0 if dtype == tl.int8 else 255.0
        zero_point = tl.load(out_zero_point_ptr).to(tl.float32)
        centred = centred_integer(y, inverse(tl.load(out_scale_ptr)), low - zero_point, high - zero_point)
        result = (centred + zero_point).to(tl.int32).to(dtype)
    else:
        result = to_dtype(y, dtype)
    return result


@triton.jit
def signed(q):
    """Return 8-bit integers as int8; unsigned ones are moved down by 128 (their zero point must be, too)."""
    if q.dtype == tl.uint8:
        moved = (q ^ 128).to(tl.int8, bitcast=True)
    else:
        moved = q
    return moved
