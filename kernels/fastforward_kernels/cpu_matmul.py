"""Integer matrix products and convolutions on CPUs: oneDNN where the machine multiplies 8-bit integers exactly.

oneDNN is fast for unsigned activations only, so that int8 ones are moved up by 128 (one exclusive-or) with their zero
point. Machines without VNNI instructions would saturate sums of pairs: there the reference is used.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import cpu, epilogue, memory
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.int_mm import int_mm
from fastforward_kernels.packing import PackCache

PACKS = PackCache()
# oneDNN's silu is a unit in the last place away from torch's, so torch computes it.
POST_OPS = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
SMALL = 1 << 15  # outputs; below it the fixed cost of oneDNN's quantized call exceeds a separate epilogue


@functools.cache
def exact_onednn() -> bool:
    """Return whether oneDNN's 8-bit kernels exist here and do not saturate."""
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return bool(supported) and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


@functools.cache
def conv1d_fuses_relu() -> bool:
    """Return whether oneDNN's convolution of one dimension takes an activation; before torch 2.7 it took none."""
    if not exact_onednn():
        return False
    one, zero, sizes = torch.ones(1), torch.zeros(1, dtype=torch.int64), ([1], [0], [1])
    pack = torch.ops.onednn.qconv_prepack(torch.ones(1, 1, 1, dtype=torch.int8), one, 1.0, 0, *sizes, 1, None)
    x = torch.ones(1, 1, 4, dtype=torch.uint8)
    try:
        _qconv(x, 1.0, 0, pack, one, zero, None, *sizes, 1, 1.0, 0, torch.float32, "relu", [], "")
    except RuntimeError:
        return False
    return True


@functools.cache
def _stores_int8() -> bool:
    """Return whether a product asked for int8 has negative numbers; before torch 2.7 they were cut off at 0."""
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    pack = torch.ops.onednn.qlinear_prepack(torch.full((1, 32), -1, dtype=torch.int8), None)
    x = torch.ones(1, 32, dtype=torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, pack, one, zero, None, 1.0, 0, torch.int8, "none", [], "")
    return int(y) == -32


@functools.cache
def _quantize_per_tensor() -> Any:
    """Return torch's fused float32 -> 8-bit operator, whose deprecation warning is thrown once here; None if gone."""
    function = getattr(torch, "quantize_per_tensor", None)
    if function is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(torch.zeros(1), 1.0, 0, torch.quint8)
    return function


def quantize_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return float ``x`` as 8-bit integers without looking for NaN, by the fastest call there is."""
    fused = _quantize_per_tensor()
    dtype = reference.storage(qmin)
    if fused is None or x.dtype != torch.float32 or epilogue.INTEGER_RANGES[dtype] != (qmin, qmax) or not x.numel():
        return cpu.quantize_finite(x, scale, zero_point, qmin, qmax, dtype, [])
    kind = torch.quint8 if dtype == torch.uint8 else torch.qint8
    q = fused(x.contiguous(), float(scale), int(zero_point), kind)
    return torch.empty(0, dtype=dtype).set_(q.untyped_storage(), 0, q.shape, q.stride())


def unsigned(x: Tensor, zero_point: Tensor | None) -> tuple[Tensor, int]:
    """Return the activation as uint8 and its zero point as a number."""
    z = 0 if zero_point is None else int(zero_point)
    return (x, z) if x.dtype == torch.uint8 else (x.view(torch.uint8) ^ 128, z + 128)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """See :func:`reference_matmul.int8_linear`."""
    epilogue.check(activation, out_dtype, out_scale)
    n, k = weight.shape
    x2 = x.reshape(-1, k).contiguous()
    m = x2.shape[0]
    after: tuple[Any, ...] = (
        bias,
        None if residual is None else residual.reshape(m, n),
        activation,
        out_dtype,
        out_scale,
        out_zero_point,
    )
    if not exact_onednn() or not m * n * k:
        factors = (x_scale, x_zero_point, weight, weight_scale, weight_zero_point, weight_sums)
        return reference.int8_linear(x2, *factors, *after).reshape(*x.shape[:-1], n)
    per_tensor = x_scale.numel() == 1 and (x_zero_point is None or x_zero_point.numel() == 1)
    fusible = residual is None or activation in ("none", "relu")
    if not (per_tensor and fusible) or weight_zero_point is not None or m * n <= SMALL:
        zero_points = (x_zero_point, weight_zero_point, weight_sums)
        y = _separate_epilogue(x2, x_scale, weight, weight_scale, zero_points, *after)
    else:
        y = _onednn_linear(*unsigned(x2, x_zero_point), x_scale, weight, weight_scale, *after)
    return y.reshape(*x.shape[:-1], n)


def _separate_epilogue(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_points: tuple[Tensor | None, Tensor | None, Tensor],
    *after: Any,
) -> Tensor:
    """Per-token scales, weights with zero points, and products so small that a call counts more than its work."""
    x_zero_point, weight_zero_point, weight_sums = zero_points
    acc = int_mm(x, weight.t())
    if x_zero_point is not None:
        acc.sub_(reference.column(x_zero_point) * weight_sums)
    if weight_zero_point is not None:
        acc.sub_(x.sum(1, keepdim=True, dtype=torch.int32) * weight_zero_point)
    return epilogue.apply(acc, (reference.column(x_scale), weight_scale), *after)


def _onednn_linear(
    x: Tensor,
    zero_point: int,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    if activation not in POST_OPS:
        y = _onednn_linear(
            x, zero_point, x_scale, weight, weight_scale, bias, residual, "none", torch.float32, None, None
        )
        return _converted(epilogue.ACTIVATIONS[activation](y), out_dtype, out_scale, out_zero_point)
    pack = packed_linear(weight)
    zeros = PACKS.get(weight, "zeros", lambda: torch.zeros(weight.shape[0], dtype=torch.int64))
    step, made = _made_by_onednn(out_dtype, out_scale, out_zero_point)
    name, algorithm = POST_OPS[activation]
    inputs = (x, 1.0, zero_point, pack, x_scale.reshape(()) * weight_scale, zeros)
    if residual is None:
        y = torch.ops.onednn.qlinear_pointwise(*inputs, bias, step, 0, made, name, [], algorithm)
    else:
        post_op: tuple[Any, ...] = (1.0, 0, "add", 1.0, name, [], algorithm)
        y = torch.ops.onednn.qlinear_pointwise.binary(*inputs, residual.float(), bias, step, 0, made, *post_op)
    return _converted(y, out_dtype, out_scale, out_zero_point)


def packed_linear(weight: Tensor) -> Tensor:
    """Return int8 ``weight [n, k]`` in the order that oneDNN's linear operators want, made once, in huge pages."""

    def pack() -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack.default(weight, None)
        if hasattr(torch.ops.mkldnn, "data_ptr"):  # not every version tells where a packed weight lies
            memory.use_huge_pages(torch.ops.mkldnn.data_ptr(packed), weight.nbytes)
        return packed

    made: Tensor = PACKS.get(weight, "linear", pack)
    return made


def drop_packed_linear(weight: Tensor) -> None:
    """Forget what :func:`packed_linear` made of a weight that other kernels multiply faster."""
    PACKS.drop(weight, "linear")


def _made_by_onednn(
    out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None
) -> tuple[float, torch.dtype]:
    """Return the scale and type of the result that oneDNN is asked for: integers only with no zero point to add."""
    if out_scale is None:
        return 1.0, torch.float32 if out_dtype == torch.float16 else out_dtype
    if (out_zero_point is not None and int(out_zero_point)) or (out_dtype == torch.int8 and not _stores_int8()):
        return 1.0, torch.float32
    return float(out_scale), out_dtype


def _converted(y: Tensor, out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None) -> Tensor:
    """Return what :func:`epilogue.convert` returns, quantizing in one pass."""
    if out_scale is None or y.dtype == out_dtype:
        return y.to(out_dtype)
    zero_point = torch.zeros((), dtype=torch.int32) if out_zero_point is None else out_zero_point
    return quantize_per_tensor(y, out_scale, zero_point, *epilogue.INTEGER_RANGES[out_dtype])


def int8_linear_quantizing(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, qmin: int, qmax: int, *rest: Any
) -> Tensor:
    """See :func:`reference_matmul.int8_linear_quantizing`."""
    if x_scale.numel() == 1:
        q = quantize_per_tensor(x, x_scale, x_zero_point, qmin, qmax)
    else:
        tile = [1] * (x.dim() - 1) + [-1]
        q = cpu.quantize_finite(x, x_scale, x_zero_point, qmin, qmax, reference.storage(qmin), tile)
    return int8_linear(q, x_scale, x_zero_point, *rest)


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """See :func:`reference_matmul.int8_matmul`."""
    epilogue.check("none", out_dtype, out_scale)
    if not exact_onednn() or not a.numel() * b.numel():
        factors = (a, a_scale, a_zero_point, b, b_scale, b_zero_point)
        return reference.int8_matmul(*factors, out_dtype, out_scale, out_zero_point)
    right, shift = (b, 0) if b.dtype == torch.int8 else ((b ^ 128).view(torch.int8), 128)
    acc = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.int32)
    for left, middle, out in zip(a.unbind(), right.unbind(), acc.unbind(), strict=True):
        int_mm(left.contiguous(), middle, out=out)
    za = 0 if a_zero_point is None else int(a_zero_point)
    zb = (0 if b_zero_point is None else int(b_zero_point)) - shift
    if za:
        acc.sub_((right.sum(1, keepdim=True, dtype=torch.int32) - b.shape[1] * zb) * za)
    if zb:
        acc.sub_(a.sum(2, keepdim=True, dtype=torch.int32) * zb)
    factors_ = (a_scale.reshape(()), b_scale.reshape(()))
    return epilogue.apply(acc, factors_, None, None, "none", out_dtype, out_scale, out_zero_point)


def int8_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """See :func:`reference_matmul.int8_conv`."""
    epilogue.check(activation, out_dtype, out_scale)
    geometry = ([*stride], [*padding], [*dilation], groups)
    if not exact_onednn() or weight_zero_point is not None or not x.numel():
        factors = (x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, weight_sums, bias, residual)
        return reference.int8_conv(*factors, *geometry, activation, out_dtype, out_scale, out_zero_point)
    data, zero_point = unsigned(x, x_zero_point)
    pack, scale = _conv_pack(weight, weight_scale, geometry, data), x_scale.reshape(()) * weight_scale
    inputs = (data, 1.0, zero_point, pack, scale)
    zeros = PACKS.get(weight, "zeros", lambda: torch.zeros(weight.shape[0], dtype=torch.int64))
    fused = activation == "none" or (activation == "relu" and (x.dim() != 3 or conv1d_fuses_relu()))
    if residual is None and fused:
        step, made = _made_by_onednn(out_dtype, out_scale, out_zero_point)
        name, algorithm = POST_OPS[activation]
        y = _qconv(*inputs, zeros, bias, *geometry, step, 0, made, name, [], algorithm)
    else:
        y = _qconv(*inputs, zeros, bias, *geometry, 1.0, 0, torch.float32, "none", [], "")
        y = epilogue.ACTIVATIONS[activation](y if residual is None else y.add_(residual))
    made_last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
    y = _converted(y.movedim(1, -1) if made_last else y, out_dtype, out_scale, out_zero_point)
    return reference.channels_last(y.movedim(-1, 1) if made_last else y)


def _qconv(*args: Any) -> Tensor:
    operators = torch.ops.onednn
    # Before torch 2.7 each number of dimensions had an operator of its own.
    name = "qconv_pointwise" if hasattr(operators, "qconv_pointwise") else f"qconv{args[0].dim() - 2}d_pointwise"
    y: Tensor = getattr(operators, name)(*args)
    return y


def _conv_pack(
    weight: Tensor, weight_scale: Tensor, geometry: tuple[list[int], list[int], list[int], int], first: Tensor
) -> Tensor:
    """Return oneDNN's copy of a weight, laid out for the first input it met; others work too, perhaps slower."""
    stride, padding, dilation, groups = geometry
    key = ("conv", *stride, *padding, *dilation, groups)
    grid = (1.0, 1, stride, padding, dilation, groups, list(first.shape))  # any scale; any zero point that is not 0
    pack: Tensor = PACKS.get(weight, key, lambda: torch.ops.onednn.qconv_prepack(weight, weight_scale, *grid))
    return pack
