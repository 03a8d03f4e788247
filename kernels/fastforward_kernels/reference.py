"""Plain torch: the definition of what the elementwise and observing kernels must return. Slow, and right.

``q = clamp(rint(x * (1 / scale)) + zero_point, qmin, qmax)`` and ``x_hat = (q - zero_point) * scale``, in float32
whatever the data type, then rounded once to it: bit-equal to ``torch.fake_quantize_per_tensor_affine``, its
per-channel form and ``torch.quantize_per_tensor`` for finite values below 2**31 scales. Larger ones saturate
here, where ATen's conversion to integers wraps around. NaN goes through fake quantization and is
refused by integer quantization.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastforward_kernels import tiling


def blocked(x: Tensor, tile: Sequence[int], *parameters: Tensor) -> tuple[Tensor, ...]:
    """Return ``x`` and the float32 ``parameters`` viewed so that they broadcast against each other."""
    plan = tiling.layout(tuple(x.shape), tuple(tile))
    views = [x.reshape(plan.view)]
    for parameter in parameters:
        tiling.check_parameter("a parameter", parameter.numel(), plan.blocks, x.shape, tile)
        shape = plan.parameters if parameter.numel() == plan.blocks else (1,) * len(plan.view)
        views.append(parameter.reshape(shape).to(torch.float32))
    return tuple(views)


def like(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values`` with the shape, data type and memory layout of ``x``."""
    out = torch.empty_like(x)
    return out.copy_(values.reshape(x.shape))


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: Sequence[int],
    gradient_scale: float = 1.0,
) -> Tensor:
    """Round to the grid; ``gradient_scale`` only matters to the gradients of ``scale`` and ``zero_point``."""
    del gradient_scale
    view, s, z = blocked(x, tile, scale, torch.round(zero_point))
    q = torch.clamp(torch.round(view.float() * (1 / s)) + z, qmin, qmax)
    return like((q - z) * s, x)


def fake_quantize_with_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Round to the grid and pack which elements were inside it, eight a byte, lowest bit first, in row-major order."""
    view, s, z = blocked(x, tile, scale, zero_point)
    q = torch.round(view.float() * (1 / s)) + z
    return like((torch.clamp(q, qmin, qmax) - z) * s, x), pack_bits(((q >= qmin) & (q <= qmax)).reshape(-1))


def pack_bits(mask: Tensor) -> Tensor:
    """Pack booleans [n] into uint8 [ceil(n / 8)], lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Undo :func:`pack_bits`: booleans [count]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & 1).view(-1)[:count].to(torch.bool)


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """Return ``grad`` where the packed ``mask`` is set, zero elsewhere."""
    inside = unpack_bits(mask, grad.numel()).view(grad.shape)
    return torch.where(inside, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    """Return zero where ``clipped`` (booleans, or by how many steps) is set, else ``grad``; in its memory layout."""
    out = torch.empty_like(clipped, dtype=grad.dtype)
    outside = clipped.to(torch.float32).abs() > 0.5
    return out.copy_(torch.where(outside, torch.zeros((), dtype=grad.dtype, device=grad.device), grad))


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> Tensor:
    """Clipped straight-through: ``grad`` where ``x`` falls on the grid, zero where it is clipped."""
    view, s, z = blocked(x, tile, scale, torch.round(zero_point))
    q = torch.round(view.float() * (1 / s)) + z
    inside = ((q >= qmin) & (q <= qmax)).reshape(x.shape)
    return like(torch.where(inside, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)), x)


def fake_quantize_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, tile: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to ``x``, ``scale`` and ``zero_point`` (LSQ: Esser et al. 2020, equation 3; LSQ+ for the zero point).

    Inside the grid ``d x_hat / d scale = q - z - x / scale`` and ``d x_hat / d z = 0``; where clipped ``bound - z`` and
    ``-scale``. The parameters' gradients are float32 of shape ``[blocks]``.
    """
    view, s, z = blocked(x, tile, scale, torch.round(zero_point))
    plan = tiling.layout(tuple(x.shape), tuple(tile))
    g = grad.reshape(plan.view).float()
    v = view.float() * (1 / s)
    q = torch.round(v) + z
    inside = (q >= qmin) & (q <= qmax)
    offset = torch.clamp(q, qmin, qmax) - z
    to_scale = (g * torch.where(inside, offset - v, offset)).double().sum(plan.inside)
    to_zero_point = -(g * s * ~inside).double().sum(plan.inside)
    grad_x = like(torch.where(inside, g, torch.zeros_like(g)), x)
    return grad_x, _per_parameter(to_scale, scale), _per_parameter(to_zero_point, zero_point)


def _per_parameter(sums: Tensor, parameter: Tensor) -> Tensor:
    """Return per-block sums with the shape of ``parameter``; one parameter for all blocks takes their sum."""
    total = sums.reshape(-1) if parameter.numel() == sums.numel() else sums.sum()
    return total.float().reshape(parameter.shape)


def fake_quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int]) -> Tensor:
    """Round ``x / scale`` to the float8 format ``dtype``, saturating, and scale back."""
    view, s = blocked(x, tile, scale)
    return like(to_float8(view.float() * (1 / s), dtype).float() * s, x)


def to_float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert float32 to ``dtype``, saturating at its largest finite value; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, tile: Sequence[int]) -> Tensor:
    """Return ``x / scale`` as float8 numbers."""
    view, s = blocked(x, tile, scale)
    return to_float8(view.float() * (1 / s), dtype).reshape(x.shape)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype, tile: Sequence[int]
) -> Tensor:
    """Return the integers of ``x``, contiguous; NaN raises ValueError on CPUs and becomes the zero point on GPUs."""
    refuse_nan(x)
    view, s, z = blocked(x, tile, scale, zero_point)
    q = torch.round(view.float() * (1 / s)).nan_to_num_(0.0, torch.inf, -torch.inf) + z
    return q.clamp(qmin, qmax).reshape(x.shape).to(dtype)


def refuse_nan(x: Tensor) -> None:
    """Raise ValueError if a tensor on the CPU holds NaN; elsewhere asking would make the device wait."""
    if x.device.type != "cpu" or not x.numel() or torch.isfinite(x.sum()):
        return
    count = int(x.isnan().sum())
    if count:
        msg = f"{count} of {x.numel()} values are NaN, which no integer stands for; find out where they arise"
        raise ValueError(msg)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, tile: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    """Return ``(q - zero_point) * scale``, computed in float32, contiguous."""
    view, s, z = blocked(q, tile, scale, torch.zeros_like(scale) if zero_point is None else zero_point)
    return ((view.float() - z) * s).reshape(q.shape).to(out_dtype)


def min_max(x: Tensor, tile: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of every block, shape ``[blocks]``; NaN where a block holds NaN."""
    plan = tiling.layout(tuple(x.shape), tuple(tile))
    if not x.numel():
        msg = f"the smallest and largest value of an empty tensor of shape {tuple(x.shape)} do not exist"
        raise ValueError(msg)
    view = x.reshape(plan.view)
    if not plan.inside:
        return view.reshape(-1).clone(), view.reshape(-1).clone()
    return view.amin(plan.inside).reshape(-1), view.amax(plan.inside).reshape(-1)


def histogram(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Count values in equal bins from ``low`` to ``high`` (the end bins take values outside): int64 [bins]."""
    if not low < high or bins < 1:
        msg = f"a histogram needs low < high and at least one bin, got low={low}, high={high}, bins={bins}"
        raise ValueError(msg)
    refuse_nan(x)
    position = (x.reshape(-1).float() - low) * (bins / (high - low))
    return torch.bincount(position.clamp_(0, bins - 1).to(torch.int64), minlength=bins)
