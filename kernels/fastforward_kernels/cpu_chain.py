"""Products of compiled integer programs on CPUs: oneDNN, with what follows the product fused."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.cpu_matmul import PACKS, POST_OPS, exact_onednn, packed_linear
from fastforward_kernels.cpu_sweep import CHUNK

_LEAST_ROWS = 128  # of a block: fewer would not be worth a call


def linear_to_floats(codes: Tensor, weight: Tensor, factor: Tensor, bias: Tensor, activation: str) -> Tensor:
    """See :func:`reference_matmul.linear_to_floats`."""
    if not exact_onednn() or not codes.numel() * weight.numel():
        return reference.linear_to_floats(codes, weight, factor, bias, activation)
    return _product(codes, weight, factor, bias, activation)


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
    """See :func:`reference_matmul.linear_to_codes`."""
    if not exact_onednn() or not codes.numel() * weight.numel():
        grid = (step, inverse, zero_point, highest)
        return reference.linear_to_codes(codes, weight, factor, bias, activation, smoothing, *grid)
    rows, scale, point = codes.reshape(-1, weight.shape[1]), float(step), int(zero_point)
    if smoothing is not None:
        y = _smoothed(rows, (weight, factor, bias, activation), smoothing, scale, point)
    elif activation == "none" or (activation == "relu" and point == 0):
        # On the unit grid a kernel only rounds, which takes half the time; codes saturate at 0 just as relu does.
        on_grid = PACKS.get(factor, ("on", scale, point), lambda: (factor / scale, bias / scale + point))
        y = _product(rows, weight, on_grid[0], on_grid[1], "none", 1.0, 0, reference.CODES)
    else:
        y = _product(rows, weight, factor, bias, activation, scale, point, reference.CODES)
    y = y if highest == reference.HIGHEST else y.clamp_(max=highest)
    return y.view(*codes.shape[:-1], weight.shape[0])


def channel_sums(weight: Tensor, axis: int = 1) -> Tensor:
    """See :func:`reference_matmul.channel_sums`; computed once for a weight."""
    sums: Tensor = PACKS.get(weight, ("sums", axis), lambda: reference.channel_sums(weight, axis))
    return sums.clone()


def channels_inside(codes: Tensor, padding: Sequence[int], value: int) -> Tensor:
    """See :func:`reference_matmul.channels_inside`.

    A channel at a time: torch's own copy would take the few channels of a pixel for its innermost loop, and a compiler
    pads and rounds number by number.
    """
    sizes = [size + 2 * extra for size, extra in zip(codes.shape[2:], padding, strict=True)]
    memory = reference.CHANNELS_INSIDE[codes.dim()]
    result = inside = torch.empty((*codes.shape[:2], *sizes), dtype=codes.dtype, memory_format=memory)
    if any(padding):
        result.fill_(value)
    for axis, (extra, size) in enumerate(zip(padding, codes.shape[2:], strict=True), start=2):
        inside = inside.narrow(axis, extra, size)
    for source, target in zip(codes.unbind(1), inside.unbind(1), strict=True):
        target.copy_(source)
    return result


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
    """See :func:`reference_matmul.convolution_plus_codes`."""
    geometry = [*stride], [*padding], [*dilation], groups
    if not exact_onednn() or not codes.numel() * weight.numel():
        operands = codes, weight, input_step, scale, bias, *geometry, activation
        added = addend, addend_step, addend_zero_point
        return reference.convolution_plus_codes(*operands, *added, step, zero_point, highest)
    codes = codes.contiguous(memory_format=torch.channels_last)
    key = ("sum", *geometry[0], *geometry[1], *geometry[2], groups)
    as_here = (scale, input_step, 0, *geometry, list(codes.shape))  # laid out for the first input it meets
    pack = PACKS.get(weight, key, lambda: torch.ops.onednn.qconv_prepack(weight, *as_here))
    y: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
        codes,
        input_step,
        0,
        pack,
        scale,
        PACKS.get(weight, "zeros", lambda: torch.zeros(weight.shape[0], dtype=torch.int64)),
        addend.clone(memory_format=torch.channels_last),  # which the kernel turns into the result
        bias,
        *geometry,
        step,
        zero_point,
        reference.CODES,
        addend_step,
        addend_zero_point,
        "sum",
        1.0,
        activation,
        [],
        "",
    )
    return y if highest == reference.HIGHEST else y.clamp_(max=highest)


def _smoothed(
    rows: Tensor, product: tuple[Tensor, Tensor, Tensor, str], smoothing: Tensor, scale: float, zero_point: int
) -> Tensor:
    """Scale the channels before rounding, which no kernel does: by blocks whose floats stay in the cache."""
    shape = (rows.shape[0], product[0].shape[0])
    result = torch._empty_affine_quantized(shape, scale=scale, zero_point=zero_point, dtype=torch.quint8)
    together = max(_LEAST_ROWS, CHUNK // shape[1])
    for block, target in zip(rows.split(together), result.split(together), strict=True):
        target.copy_(_product(block, *product).mul_(smoothing))
    return _integers(result)


def _product(
    codes: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    activation: str,
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    pack = packed_linear(weight)
    zeros = PACKS.get(weight, "zeros", lambda: torch.zeros(weight.shape[0], dtype=torch.int64))
    name, algorithm = POST_OPS[activation]
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        codes.contiguous(), 1.0, 0, pack, factor, zeros, bias, scale, zero_point, dtype, name, [], algorithm
    )
    return y


def _integers(quantized: Tensor) -> Tensor:
    """The integers of a quantized tensor, in its memory."""
    codes = torch.empty(0, dtype=reference.CODES)
    return codes.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
