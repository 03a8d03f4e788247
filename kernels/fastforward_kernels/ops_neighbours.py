"""The operators between the big ones: 8-bit integers in and out, so that integers flow through a whole block.

Every function takes ``scale`` (float32 scalar) and ``zero_point`` (int32 scalar or None) of each operand, and returns
``out_dtype``: int8 or uint8 on the grid of ``out_scale`` and ``out_zero_point``, or a floating type without them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import epilogue
from fastforward_kernels import reference_neighbours as reference
from fastforward_kernels.library import define

OUT = "ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point"
PAIR = "Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point"
POOL = "int[2] kernel_size, int[2] stride, int[2] padding"
DATA = "Tensor x, Tensor x_scale, Tensor? x_zero_point"


def _like_x(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-3])


def _broadcast(a: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(torch.broadcast_shapes(a.shape, rest[2].shape), dtype=rest[-3])


def _pooled(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    sizes = zip(x.shape[-2:], kernel_size, stride, padding, strict=True)
    return [*x.shape[:-2], *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)]


def _concatenated(tensors: Sequence[Tensor], scales: Tensor, zero_points: Tensor, dim: int, *out: Any) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].new_empty(shape, dtype=out[0])


def _contiguous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a reference return contiguous tensors, whatever the layout of its operands."""
    return lambda *args: function(*args).contiguous()


def _define(schema: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    name = schema.partition("(")[0].removeprefix("int8_")
    function: Callable[..., Tensor] = define(
        f"{schema} -> Tensor",
        reference=_contiguous(getattr(reference, name)),
        triton=f"neighbours:{name}",
        fake=fake,
    )
    return function


EMBEDDING = _define(
    f"int8_embedding(Tensor indices, Tensor weight, Tensor scale, Tensor? zero_point, {OUT})",
    lambda indices, weight, *rest: weight.new_empty((*indices.shape, weight.shape[1]), dtype=rest[-3]),
)
LOOKUP = _define("int8_lookup(Tensor x, Tensor table)", lambda x, table: x.new_empty(x.shape, dtype=table.dtype))
ADD = _define(f"int8_add({PAIR}, str activation, {OUT})", _broadcast)
MUL = _define(f"int8_mul({PAIR}, {OUT})", _broadcast)
CONCAT = _define(f"int8_concat(Tensor[] tensors, Tensor scales, Tensor zero_points, int dim, {OUT})", _concatenated)
MAX_POOL = _define(f"int8_max_pool2d(Tensor x, {POOL})", lambda x, *pool: x.new_empty(_pooled(x, *pool)))
AVG_POOL = _define(
    f"int8_avg_pool2d({DATA}, {POOL}, {OUT})",
    lambda x, s, z, kernel_size, stride, padding, dtype, *_: x.new_empty(
        _pooled(x, kernel_size, stride, padding), dtype=dtype
    ),
)
LAYER_NORM = _define(f"int8_layer_norm({DATA}, Tensor? weight, Tensor? bias, float eps, {OUT})", _like_x)
RMS_NORM = _define(f"int8_rms_norm({DATA}, Tensor? weight, float eps, {OUT})", _like_x)
SOFTMAX = _define(f"int8_softmax(Tensor x, Tensor x_scale, {OUT})", _like_x)


def _out(out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None) -> tuple[Any, ...]:
    epilogue.check("none", out_dtype, out_scale)
    return out_dtype, out_scale, out_zero_point


def int8_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Look up rows of an int8 ``weight [n, d]`` with one scale, or one per row: ``[..., d]``."""
    return EMBEDDING(indices, weight, scale, zero_point, *_out(out_dtype, out_scale, out_zero_point))


def int8_lookup(x: Tensor, table: Tensor) -> Tensor:
    """Apply a function of one 8-bit number, given by its 256 values (see :func:`lookup_table`)."""
    if table.shape != (256,) or x.dtype not in epilogue.INTEGER_RANGES:
        msg = f"a lookup takes int8 or uint8 and a table of 256 values, got {x.dtype} and {list(table.shape)}"
        raise ValueError(msg)
    return LOOKUP(x, table)


def lookup_table(
    function: Callable[[Tensor], Tensor],
    x_dtype: torch.dtype,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Return the 256 values of ``function`` on the grid of ``x``, for :func:`int8_lookup`."""
    low, high = epilogue.INTEGER_RANGES[x_dtype]
    q = torch.arange(low, high + 1, device=x_scale.device)
    y = function(reference.real(q, x_scale, x_zero_point))
    return epilogue.convert(y, *_out(out_dtype, out_scale, out_zero_point))


def int8_add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Return ``activation(a + b)``; shapes broadcast."""
    epilogue.check(activation, out_dtype, out_scale)
    operands = (a, a_scale, a_zero_point, b, b_scale, b_zero_point)
    return ADD(*operands, activation, out_dtype, out_scale, out_zero_point)


def int8_mul(
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
    """Return ``a * b``; shapes broadcast."""
    operands = (a, a_scale, a_zero_point, b, b_scale, b_zero_point)
    return MUL(*operands, *_out(out_dtype, out_scale, out_zero_point))


def int8_concat(
    tensors: Sequence[Tensor],
    scales: Tensor,
    zero_points: Tensor,
    dim: int = 0,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Concatenate integers of different grids on one; ``scales`` and ``zero_points`` have one number per tensor."""
    return CONCAT(list(tensors), scales, zero_points, dim, *_out(out_dtype, out_scale, out_zero_point))


def int8_relu(x: Tensor, x_zero_point: Tensor | None = None) -> Tensor:
    """Return ``relu`` on the grid of ``x``: integers below the zero point become the zero point."""
    zero_point = 0 if x_zero_point is None else x_zero_point.reshape(()).to(x.dtype)
    return torch.clamp(x, min=zero_point)


def int8_max_pool2d(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return the largest integer of each window of ``x [..., h, w]``; the grid does not change."""
    return MAX_POOL(x, kernel_size, stride, padding)


def int8_avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Return the mean of each window of ``x [batch, channels, h, w]``; padding counts as real zeros."""
    pool = (kernel_size, stride, padding)
    return AVG_POOL(x, x_scale, x_zero_point, *pool, *_out(out_dtype, out_scale, out_zero_point))


def int8_layer_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Normalize over the last axis; mean and variance come from exact integer sums."""
    return LAYER_NORM(x, x_scale, x_zero_point, weight, bias, eps, *_out(out_dtype, out_scale, out_zero_point))


def int8_rms_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Normalize by the root mean square over the last axis."""
    return RMS_NORM(x, x_scale, x_zero_point, weight, eps, *_out(out_dtype, out_scale, out_zero_point))


def int8_softmax(
    x: Tensor,
    x_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Softmax over the last axis; the zero point of ``x`` cancels. ``1 / 256`` suits a uint8 result."""
    return SOFTMAX(x, x_scale, *_out(out_dtype, out_scale, out_zero_point))
