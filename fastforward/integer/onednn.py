"""Integer products on CPUs: torch's oneDNN operators and ``torch._int_mm``, called with the fewest conversions.

Activations are uint8 codes, weights int8. The measurements behind the defaults are described beside them.
"""

import functools
from typing import Any

import torch
from fastforward_kernels.int_mm import TAKES_UINT8, int_mm

from fastforward.integer.epilogue import NO_ACTIVATION, RELU, Activation, Epilogue, arguments
from fastforward.integer.grid import Grid

# Where torch's plain product takes no uint8, each call of it converts the codes and sums the weight.
SMALL_ROWS = 8 if TAKES_UINT8 else 0
"""Up to so many rows the fixed cost of a oneDNN call (about 30 us) exceeds what its fused epilogue saves."""
FEW_ROWS = 256 if TAKES_UINT8 else 0
"""Up to so many rows compiled programs multiply by torch's plain product: a call of our operator costs more than its
fused epilogue saves. MiniLM's 128 rows are 1.3 times as fast so, its 1,024 rows 1.3 times as slow."""


def _convolution(dimensions: int) -> Any:
    """The operator of so many dimensions; before torch 2.7 each had a name of its own."""
    names = ("qconv_pointwise", f"qconv{dimensions}d_pointwise")
    found = next((name for name in names if hasattr(torch.ops.onednn, name)), None)
    return None if found is None else getattr(torch.ops.onednn, found).default


CONVOLUTIONS = {dimensions: _convolution(dimensions) for dimensions in (1, 2, 3)}
"""oneDNN's int8 convolutions by number of dimensions; ``None`` where torch was built without."""


@functools.cache
def traces_codes() -> bool:
    """Whether compilers can be told that a convolution stores codes, which torch 2.6 takes for an error."""
    convolution = CONVOLUTIONS[2]
    if convolution is None:
        return False
    shape, one = (1, 1, 1, 1), torch.empty(1, device="meta")
    codes, weight = (torch.empty(shape, dtype=dtype, device="meta") for dtype in (torch.uint8, torch.int8))
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    try:
        convolution(codes, 1.0, 0, weight, one, one, None, *geometry, 1.0, 0, torch.uint8, "none", [], "")
    except AssertionError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether torch was built with the oneDNN integer operators and this machine can run them exactly."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return _exact()


def _exact() -> bool:
    """Whether the extreme product of uint8 and int8 comes out right; without VNNI instructions it may saturate."""
    depth = 64
    weight = torch.full((16, depth), 127, dtype=torch.int8)
    codes = torch.full((32, depth), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack.default(weight, None)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    columns = torch.full((depth, 4), -128, dtype=torch.int8)
    plain, left = int_mm(codes, weight.t()), int_mm(weight, columns)
    return bool(
        (y == 127 * 255 * depth).all() and (plain == 127 * 255 * depth).all() and (left == -127 * 128 * depth).all()
    )


def convolve(
    codes: torch.Tensor,
    operands: tuple[Any, ...],
    geometry: tuple[list[int], list[int], list[int]],
    groups: int,
    result: tuple[Any, ...],
) -> torch.Tensor:
    """Convolve ``[batch, channels, *size]`` codes.

    Args:
        codes: The input.
        operands: Its scale and zero point, the packed weight, its scales and zero points, and the bias.
        geometry: Stride, padding and dilation per dimension.
        groups: Groups of channels.
        result: Scale, zero point and data type of the result, and its activation: name, scalars and algorithm.
    """
    dimensions = codes.dim() - 2
    if dimensions == 1 and torch.compiler.is_compiling():
        # Weights of one dimension are packed as [out, in, 1, size], and torch derives the traced shape from size 1.
        stride, padding, dilation = geometry
        wide = [1, *stride], [0, *padding], [1, *dilation]
        return convolve(codes.unsqueeze(2), operands, wide, groups, result).squeeze(2)
    y: torch.Tensor = CONVOLUTIONS[dimensions](codes, *operands, *geometry, groups, *result)
    return y


@functools.lru_cache(maxsize=256)
def _zeros(channels: int) -> torch.Tensor:
    """The zero points of symmetric weights, as oneDNN wants them."""
    return torch.zeros(channels, dtype=torch.int64)


def stored(
    epilogue: Epilogue, activation: Activation, out: Grid | None
) -> tuple[Epilogue, Activation, float, int, torch.dtype]:
    """What a kernel is told of its results: epilogue, activation, scale, zero point and type.

    On the unit grid a kernel only rounds, which takes half the time where it does little else; codes then saturate at
    0 just as relu does.
    """
    if out is None:
        return epilogue, activation, 1.0, 0, torch.float32
    if activation is NO_ACTIVATION or (activation is RELU and out.zero_point == 0):
        return epilogue.on(out), NO_ACTIVATION, 1.0, 0, torch.uint8
    return epilogue, activation, out.scale, out.zero_point, torch.uint8


def linear_onednn(
    codes: torch.Tensor,
    packed: torch.Tensor,
    epilogue: Epilogue,
    activation: Activation,
    out: Grid | None,
) -> torch.Tensor:
    """Multiply ``[..., K]`` codes by a prepacked weight; float32, or codes on ``out``.

    The input's zero point is in the bias already: oneDNN would sum the weight again on every call. Its scale is in the
    factor: for few rows oneDNN multiplies by both one after the other, which rounds otherwise than ``make_epilogue``.
    """
    epilogue, activation, scale, zero_point, dtype = stored(epilogue, activation, out)
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        codes,
        1.0,
        0,
        packed,
        epilogue.factor,
        _zeros(epilogue.scale.numel()),
        epilogue.compensated,
        scale,
        zero_point,
        dtype,
        activation.name,
        arguments(activation),
        activation.algorithm,
    )
    return limited(result, out)


def linear_int_mm(
    codes: torch.Tensor, columns: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
) -> torch.Tensor:
    """Multiply ``[..., K]`` codes by a plain int8 weight, its ``[K, N]`` view; float32, or codes on ``out``."""
    rows = codes if codes.dim() == 2 else codes.reshape(-1, codes.shape[-1])
    # Two roundings, as what the zero point adds has had (``make_epilogue``); torch.addcmul fuses them into one.
    y = int_mm(rows, columns).mul(epilogue.factor).add_(epilogue.compensated)
    if out is None:
        y = activation.apply(y)
    else:
        # Rounding to codes from real zero upwards does what relu would.
        y = out.codes_in_place(y if activation is RELU and out.zero_point == 0 else activation.apply(y))
    return y if codes.dim() == 2 else y.view(*codes.shape[:-1], columns.shape[1])


def limited(result: torch.Tensor, out: Grid | None) -> torch.Tensor:
    """Clamp codes to a grid of fewer than 8 bits; the kernels saturate at 255."""
    return result if out is None or out.highest == 255 else result.clamp_(max=out.highest)
