"""Plain torch: the definition of the matrix kernels. Integer products are summed in float64, where they are exact."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastforward_kernels import epilogue, packing

CODES, HIGHEST = torch.uint8, 255  # what activations are multiplied as
CHANNELS_INSIDE = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    """``x [..., k]`` int8 or uint8 by ``weight [n, k]`` int8; one scale and zero point of ``x``, or one per row."""
    del weight_sums
    epilogue.check(activation, out_dtype, out_scale)
    rows = x.reshape(-1, x.shape[-1])
    acc = (centred(rows, column(x_zero_point)) @ centred(weight, column(weight_zero_point)).t()).to(torch.int32)
    shape = (*x.shape[:-1], weight.shape[0])
    residual = None if residual is None else residual.reshape(acc.shape)
    y = epilogue.apply(
        acc, (column(x_scale), weight_scale), bias, residual, activation, out_dtype, out_scale, out_zero_point
    )
    return y.reshape(shape)


def int8_linear_quantizing(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, qmin: int, qmax: int, *rest: Any
) -> Tensor:
    """Quantize floating ``x`` to ``[qmin, qmax]`` with one scale, or one per row, then :func:`int8_linear`."""
    scale, zero_point = column(x_scale), column(x_zero_point)
    rows = x.reshape(-1, x.shape[-1]).float()
    q = (torch.round(rows * (1 / scale)) + zero_point).clamp(qmin, qmax).to(storage(qmin))
    return int8_linear(q.reshape(x.shape), x_scale, x_zero_point, *rest)


def round_to_codes(
    x: Tensor, step: Tensor, inverse: Tensor, zero_point: Tensor, highest: int, known: Sequence[float] = ()
) -> Tensor:
    """Round ``x`` to the codes ``0 .. highest`` of a grid."""
    del step, known
    return (torch.round(x.float() * inverse) + zero_point).clamp(0, highest).to(CODES)


def round_to_grid(x: Tensor, step: Tensor, inverse: Tensor, zero_point: Tensor, highest: int) -> Tensor:
    """The values that :func:`round_to_codes` stands for, in the data type of ``x``; NaN stays."""
    codes = (torch.round(x.float() * inverse) + zero_point).clamp(0, highest)
    return ((codes - zero_point) * step).to(x.dtype)


def linear_to_floats(codes: Tensor, weight: Tensor, factor: Tensor, bias: Tensor, activation: str) -> Tensor:
    """``activation(codes [..., k] @ weight [n, k].T * factor [n] + bias [n])``, the product exact."""
    acc = (codes.double() @ weight.double().t()).to(torch.int32)
    return epilogue.apply(acc, (factor, torch.ones(())), bias, None, activation, torch.float32, None, None)


def linear_to_codes(
    codes: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    activation: str,
    smoothing: Tensor | None,
    step: Tensor,
    inverse: Tensor,
    zero_point: Tensor,
    highest: int,
) -> Tensor:
    """:func:`linear_to_floats`, times ``smoothing [n]`` if there is any, then :func:`round_to_codes`."""
    y = linear_to_floats(codes, weight, factor, bias, activation)
    y = y if smoothing is None else y * smoothing
    return round_to_codes(y, step, inverse, zero_point, highest)


def channels_inside(codes: Tensor, padding: Sequence[int], value: int) -> Tensor:
    """Codes ``[batch, channels, *size]`` of two or three dimensions with ``value`` around them, channels innermost."""
    around = [size for size in reversed(padding) for _ in range(2)]
    return functional.pad(codes, around, value=value).contiguous(memory_format=CHANNELS_INSIDE[codes.dim()])


def convolution_plus_codes(
    codes: Tensor,
    weight: Tensor,
    input_step: float,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    addend: Tensor,
    addend_step: float,
    addend_zero_point: int,
    step: float,
    zero_point: int,
    highest: int,
) -> Tensor:
    """The codes of a convolution in two dimensions plus an addend of codes.

    Args:
        codes: uint8 ``[batch, channels, *size]`` with zero point 0.
        weight: int8 ``[channels, channels / groups, *size]``.
        input_step: What a code of the input stands for.
        scale: What an integer of the weight stands for, float32 ``[channels]``.
        bias: float32 ``[channels]``.
        stride: As of ``torch.nn.functional.conv2d``, like the next three.
        padding: Zeros around the input.
        dilation: Distance of the weight's taps.
        groups: Groups of channels.
        activation: What follows the sum: ``"none"`` or ``"relu"``.
        addend: uint8, the shape of the result.
        addend_step: What a code of the addend stands for.
        addend_zero_point: The code of real zero there.
        step: What a code of the result stands for.
        zero_point: The code of real zero there.
        highest: The largest code of the result.
    """
    geometry = list(stride), list(padding), list(dilation), groups
    acc = functional.conv2d(codes.double(), weight.double(), None, *geometry).to(torch.int32)
    per_channel = [-1, 1, 1]
    bias = None if bias is None else bias.reshape(per_channel)
    residual = (addend.float() - addend_zero_point) * addend_step
    factors = (scale.reshape(per_channel), torch.tensor(input_step))
    y = epilogue.apply(acc, factors, bias, residual, activation, torch.float32, None, None)
    return channels_last((torch.round(y * (1 / step)) + zero_point).clamp(0, highest).to(CODES))


def weight_of_integers(integers: Tensor, scale: Tensor) -> Tensor:
    """The values of int8 ``[n, k]`` whose ``scale`` broadcasts against them."""
    return integers * scale


def integers_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[n, k]`` and the float32 scale that broadcasts against it: of a plain tensor of whole numbers, 1."""
    return weight.to(torch.int8), weight.new_ones(1, 1)


def channel_sums(weight: Tensor, axis: int = 1) -> Tensor:
    """int32 ``[n]``: the sums of int8 ``[n, k]``, or ``[k, n]``, over ``axis``, that of ``k``."""
    return weight.sum(axis, dtype=torch.int32)


def attention_of_integers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_step: Tensor,
    k_step: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """``softmax(q k^T scale q_step k_step) v`` of whole numbers in a floating type, ``[batch, heads, rows, width]``."""
    scale *= float(q_step) * float(k_step)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return heads_inside(y.transpose(1, 2).contiguous())


def heads_inside(rows: Tensor) -> Tensor:
    """View ``[batch, rows, heads, width]`` as attention returns it: ``[batch, heads, rows, width]``."""
    return rows.transpose(1, 2)


def storage(qmin: int) -> torch.dtype:
    """Return the 8-bit type that holds a grid from ``qmin``."""
    return torch.int8 if qmin < 0 else torch.uint8


def column(parameter: Tensor | None) -> Any:
    """View one parameter per row as a column, one for all as it is; None is zero."""
    if parameter is None:
        return 0
    return parameter.reshape(()) if parameter.numel() == 1 else parameter.reshape(-1, 1)


def centred(q: Tensor, zero_point: Any) -> Tensor:
    """Return ``q - zero_point`` as float64."""
    values: Tensor = q.to(torch.float64) - zero_point
    return values


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
    """``a [batch, m, k]`` by ``b [batch, k, n]``, both int8 or uint8 with one scale and zero point each."""
    epilogue.check("none", out_dtype, out_scale)
    acc = (centred(a, column(a_zero_point)) @ centred(b, column(b_zero_point))).to(torch.int32)
    factors = (a_scale.reshape(()), b_scale.reshape(()))
    return epilogue.apply(acc, factors, None, None, "none", out_dtype, out_scale, out_zero_point)


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
    """Convolution in one or two dimensions, padded with the activation's zero point (that is, with real zeros)."""
    del weight_sums
    epilogue.check(activation, out_dtype, out_scale)
    per_channel = [-1] + [1] * (weight.dim() - 2)
    zero_point = 0 if weight_zero_point is None else weight_zero_point.reshape(-1, *[1] * (weight.dim() - 1))
    convolve = functional.conv1d if weight.dim() == 3 else functional.conv2d
    data = centred(x, column(x_zero_point)), centred(weight, zero_point)
    acc = channels_last(convolve(*data, None, list(stride), list(padding), list(dilation), groups).to(torch.int32))
    factors = (x_scale.reshape(()), weight_scale.reshape(per_channel))
    bias = None if bias is None else bias.reshape(per_channel)
    return epilogue.apply(acc, factors, bias, residual, activation, out_dtype, out_scale, out_zero_point)


def channels_last(y: Tensor) -> Tensor:
    """Return ``y`` in the layout in which integer convolutions deliver: channels fastest in two dimensions."""
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y.contiguous()


def float8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``x [..., k]`` by ``weight [n, k]``, both float8; one scale each, or one per row."""
    rows = x.reshape(-1, x.shape[-1]).float() @ weight.float().t()
    y: Tensor = rows * column(x_scale) * weight_scale.reshape(-1)
    y = y if bias is None else y + bias
    return y.to(out_dtype).reshape(*x.shape[:-1], weight.shape[0])


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    """Floating ``x [..., k]`` by an integer weight, dequantized to the data type of ``x``."""
    y: Tensor = functional.linear(x, dequantized(weight, scale, zero_point, group_size, x.dtype), bias)
    return y


def dequantized(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return ``(q - zero_point) * scale`` of a packed weight: ``[n, k]``, computed in float32."""
    q = packing.unpack_weight_only(weight).to(torch.float32)
    groups = q.view(q.shape[0], -1, group_size)
    if zero_point is not None:
        groups.sub_(zero_point.unsqueeze(-1))
    values: Tensor = groups.mul_(scale.unsqueeze(-1)).view(q.shape).to(dtype)
    return values


def int4_linear(rows: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """bfloat16 ``rows [m, k]`` by a weight that ATen packed, as its own kernel multiplies; float32 ``[m, n]``.

    Args:
        rows: The activations.
        packed: uint8 ``[n, k / 2]``, of ``torch._convert_weight_to_int4pack_for_cpu``; ``n`` in whole blocks of 64.
        group: Columns that share a scale.
        scales: bfloat16 ``[k / group, n, 2]``: the scale, and the real value of the integer 8.
    """
    codes = packing.unpack_int4(packed, rows.shape[1])
    scale, middle = scales.float().repeat_interleave(group, 0).unbind(-1)
    y: Tensor = rows.float() @ ((codes.t() - 8.0) * scale + middle)
    return y
