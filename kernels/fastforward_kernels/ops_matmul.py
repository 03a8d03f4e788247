"""The matrix operators: static int8 linear, batched product and convolution, float8, weight-only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import cpu_int4, cpu_matmul, cpu_weight_only, epilogue, gradients
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.library import define, has_triton
from fastforward_kernels.packing import PackedWeight, PackedWeightOnly

WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor weight_sums"
AFTER = "str activation, ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point"
GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def _shape_linear(x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-3])


def _shape_quantizing(x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-3])


def _shape_conv(x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, _, _, out_dtype, _, _ = rest[-8:]
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return reference.channels_last(x.new_empty((x.shape[0], weight.shape[0], *spatial), dtype=out_dtype))


INT8_LINEAR: Callable[..., Tensor] = define(
    f"int8_linear(Tensor x, Tensor x_scale, Tensor? x_zero_point, {WEIGHT}, "
    f"Tensor? bias, Tensor? residual, {AFTER}) -> Tensor",
    reference=reference.int8_linear,
    cpu=cpu_matmul.int8_linear,
    triton="int8_matmul:int8_linear",
    fake=_shape_linear,
)
INT8_LINEAR_QUANTIZING: Callable[..., Tensor] = define(
    "int8_linear_quantizing(Tensor x, Tensor x_scale, Tensor x_zero_point, int qmin, int qmax, "
    f"{WEIGHT}, Tensor? bias, Tensor? residual, {AFTER}) -> Tensor",
    reference=reference.int8_linear_quantizing,
    cpu=cpu_matmul.int8_linear_quantizing,
    triton="int8_matmul:int8_linear_quantizing",
    fake=_shape_quantizing,
)
INT8_MATMUL: Callable[..., Tensor] = define(
    "int8_matmul(Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, "
    "ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point) -> Tensor",
    reference=reference.int8_matmul,
    cpu=cpu_matmul.int8_matmul,
    triton="int8_matmul:int8_matmul",
    fake=lambda a, a_scale, a_zero_point, b, *rest: a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=rest[-3]),
)
INT8_CONV: Callable[..., Tensor] = define(
    f"int8_conv(Tensor x, Tensor x_scale, Tensor? x_zero_point, {WEIGHT}, Tensor? bias, Tensor? residual, "
    f"{GEOMETRY}, {AFTER}) -> Tensor",
    reference=reference.int8_conv,
    cpu=cpu_matmul.int8_conv,
    triton="int8_conv:int8_conv",
    fake=_shape_conv,
)
FLOAT8_LINEAR: Callable[..., Tensor] = define(
    "float8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor",
    reference=reference.float8_linear,
    cpu=cpu_weight_only.float8_linear,
    triton="float8_matmul:float8_linear",
    fake=lambda x, x_scale, weight, weight_scale, bias, out_dtype: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=out_dtype
    ),
)
WEIGHT_ONLY_LINEAR: Callable[..., Tensor] = define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, int group_size, Tensor? bias) "
    "-> Tensor",
    reference=reference.weight_only_linear,
    cpu=cpu_weight_only.weight_only_linear,
    differentiable=True,
    triton="weight_only:weight_only_linear",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
INT4_LINEAR: Callable[..., Tensor] = define(
    "int4_linear(Tensor rows, Tensor packed, int group, Tensor scales) -> Tensor",
    reference=reference.int4_linear,
    cpu=cpu_int4.int4_linear,
    fake=lambda rows, packed, *_: rows.new_empty((rows.shape[0], packed.shape[0]), dtype=torch.float32),
)

gradients.register_weight_only()


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed_weight: PackedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    x_range: tuple[int, int] = (-128, 127),
) -> Tensor:
    """Multiply quantized activations by a packed int8 weight, with everything that follows fused.

    ``y = activation((xq - x_zero_point) @ (wq - w_zero_point).T * x_scale * w_scale + bias + residual)``: the sum exact
    in int32, the rest in float32 in this order; an integer ``out_dtype`` is requantized.

    Args:
        xq: int8 or uint8 ``[..., k]``; a floating tensor is quantized on the way in to the grid ``x_range``.
        x_scale: float32, one number or one per row of ``[..., k]``.
        x_zero_point: int32 like ``x_scale``; None means zero.
        packed_weight: from :func:`pack_linear_weight`.
        bias: float32 ``[n]``.
        residual: floating ``[..., n]``, added before the activation.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16, float16, or int8 / uint8 with ``out_scale``.
        out_scale: float32 scalar of an integer result.
        out_zero_point: int32 scalar of an integer result; None means zero.
        x_range: the grid of a floating ``xq``; ``x_zero_point`` must be given with it.

    Returns:
        ``[..., n]`` of ``out_dtype``.

    Raises:
        ValueError: unknown activation, ``out_scale`` that does not go with ``out_dtype``.
        TypeError: unsupported ``out_dtype`` or type of ``xq``.
    """
    after = (*packed_weight, bias, residual, activation, out_dtype, out_scale, out_zero_point)
    if xq.is_floating_point():
        zero_point = torch.zeros_like(x_scale, dtype=torch.int32) if x_zero_point is None else x_zero_point
        return INT8_LINEAR_QUANTIZING(xq, x_scale, zero_point, *x_range, *after)
    _check_integers("xq", xq)
    return INT8_LINEAR(xq, x_scale, x_zero_point, *after)


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Multiply ``a [..., m, k]`` by ``b [..., k, n]`` (int8 or uint8, leading axes equal), as attention needs it."""
    _check_integers("a", a)
    _check_integers("b", b)
    zero_points = (a_zero_point is not None) + (b_zero_point is not None)
    epilogue.check_depth(a.shape[-1], max(zero_points, 1))
    left, right = a.flatten(0, -3) if a.dim() > 2 else a[None], b.flatten(0, -3) if b.dim() > 2 else b[None]
    operands = (left, a_scale, a_zero_point, right, b_scale, b_zero_point)
    return INT8_MATMUL(*operands, out_dtype, out_scale, out_zero_point).reshape(*a.shape[:-1], b.shape[-1])


def int8_conv(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed_weight: PackedWeight,
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Convolve int8 or uint8 ``xq [batch, channels, ...]`` in one or two dimensions, else like :func:`int8_linear`.

    Padding stands for real zeros (the activation's zero point). In two dimensions the result is channels-last.
    """
    _check_integers("xq", xq)
    dims = xq.dim() - 2
    geometry = [[value] * dims if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    inputs = (xq, x_scale, x_zero_point, *packed_weight, bias, residual)
    return INT8_CONV(*inputs, *geometry, groups, activation, out_dtype, out_scale, out_zero_point)


def _check_integers(name: str, q: Tensor) -> None:
    if q.dtype not in epilogue.INTEGER_RANGES:
        msg = f"{name} must be int8 or uint8, got {q.dtype}"
        raise TypeError(msg)


def float8_linear(
    xq: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply float8 ``xq [..., k]`` by a float8 ``weight [n, k]``; each has one scale, or one per row."""
    return FLOAT8_LINEAR(xq, x_scale, weight, weight_scale, bias, out_dtype)


def multiplies_float8(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``device`` multiplies matrices of the float8 type ``dtype`` as they are."""
    if device.type != "cuda" or not has_triton():
        return False
    from fastforward_kernels.triton import float8_matmul, launch  # with the first GPU tensor, not before

    return dtype in float8_matmul.NATIVE.get(launch.architecture(device), ())


def weight_only_linear(x: Tensor, packed_weight: PackedWeightOnly, bias: Tensor | None = None) -> Tensor:
    """Multiply floating ``x [..., k]`` by an int4 or int8 weight, dequantized to the data type of ``x`` on the fly."""
    weight, scale, zero_point, group_size = packed_weight
    return WEIGHT_ONLY_LINEAR(x, weight, scale, zero_point, group_size, bias)
