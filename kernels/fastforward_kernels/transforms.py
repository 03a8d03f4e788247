"""Fake quantization under ``torch.func`` and forward-mode derivatives, made of operators that know them all.

The operators of this package have gradients written out for ordinary training. Under ``vmap``, ``grad``, ``jvp``,
``jacrev`` and the like, and inside ``torch.autograd.forward_ad``, what stands here takes their place: the same values,
bit for bit, and the same straight-through derivatives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastforward_kernels import reference

_COMPILERS_LOOK = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
"""Whether Dynamo can trace the question; older ones are told that there is no transform."""


def active() -> bool:
    """Whether a functional transform or forward-mode differentiation is in progress."""
    if not _COMPILERS_LOOK and torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    tile: Sequence[int],
    gradient_scale: float = 1.0,
) -> Tensor:
    """``reference.fake_quantize``, with the derivatives of ``reference.fake_quantize_lsq_backward``."""
    view, s, z = reference.blocked(x, tile, scale, zero_point)
    view = view.float()
    steps, zero = (view * (1 / s)).detach(), torch.round(z).detach()
    q = torch.round(steps) + zero
    inside = (q >= qmin) & (q <= qmax)
    offset = torch.clamp(q, qmin, qmax) - zero
    by_scale = torch.where(inside, offset - steps, offset) * gradient_scale
    by_zero_point = torch.where(inside, 0.0, -s.detach()) * gradient_scale
    value = offset * s.detach()
    value = value + torch.where(inside, _differential(view), 0.0)
    value = value + by_scale * _differential(s) + by_zero_point * _differential(z)
    return value.reshape(x.shape).to(x.dtype)


def _differential(x: Tensor) -> Tensor:
    """Zero, with the derivative of ``x``."""
    return x - x.detach()
