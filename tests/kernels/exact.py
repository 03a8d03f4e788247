"""The gradients of a learnt grid in float64, and how far float32 sums may be from them."""

import torch
from fastforward_kernels import reference, tiling
from torch import Tensor


def assert_lsq_sums(
    sums: tuple[Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: list[int],
) -> None:
    """Assert that gradients to scale and zero point are within ``1e-6 * sum(|terms|)`` of the sums in float64."""
    view, s, z = reference.blocked(x, tile, scale, zero_point)
    axes = tiling.layout(tuple(x.shape), tuple(tile)).inside
    v = (view.float() * (1 / s)).double()
    q = torch.round(v) + z
    inside = (q >= qmin) & (q <= qmax)
    offset = q.clamp(qmin, qmax) - z
    g = grad.reshape(view.shape).double()
    to_scale, to_zero_point = g * torch.where(inside, offset - v, offset.double()), torch.where(inside, 0.0, -g * s)
    for result, terms in zip(sums, (to_scale, to_zero_point), strict=True):
        error = (result.double() - terms.sum(axes).reshape(-1)).abs()
        assert (error <= 1e-6 * terms.abs().sum(axes).reshape(-1) + 1e-12).all()
