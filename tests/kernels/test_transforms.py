"""Fake quantization under torch.func and forward-mode derivatives: the values and derivatives of ordinary training."""

from collections.abc import Callable

import pytest
import torch
from fastforward_kernels import ops
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

SPECIAL = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 12.75)


def _grid(axis: int | None) -> tuple[torch.Tensor, torch.Tensor, int, int, int | None]:
    count = () if axis is None else (6,)
    return torch.full(count, 0.1), torch.full(count, 3, dtype=torch.int32), -8, 7, axis


def _values(axis: int | None) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    torch.manual_seed(0)
    grid = _grid(axis)
    return torch.randn(5, 6), lambda x: ops.fake_quantize(x, *grid)


def _trained(rounded: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    rounded(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("axis", [None, 1])
def test_values_are_the_same_bit_for_bit(axis: int | None) -> None:
    x, rounded = _values(axis)
    x[0] = torch.tensor(SPECIAL)
    expected = rounded(x)
    with forward_ad.dual_level():
        found = rounded(x)
    assert torch.equal(found.nan_to_num(99.0), expected.nan_to_num(99.0))


@pytest.mark.parametrize("axis", [None, 1])
def test_grad_and_jacobian(axis: int | None) -> None:
    x, rounded = _values(axis)
    expected = _trained(rounded, x)
    assert 0 < int((expected == 0).sum()) < x.numel(), "some are clipped"
    assert torch.equal(grad(lambda v: rounded(v).square().sum())(x), expected)
    assert torch.equal(jacrev(lambda v: rounded(v).square().sum())(x), expected)


def test_forward_mode() -> None:
    x, rounded = _values(None)
    inside = (_trained(rounded, x) != 0) | (rounded(x) == 0)
    direction = torch.randn_like(x)
    value, tangent = jvp(rounded, (x,), (direction,))
    assert torch.equal(value, rounded(x))
    assert torch.equal(tangent, torch.where(inside, direction, torch.zeros(())))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(rounded(forward_ad.make_dual(x, direction)))
    assert torch.allclose(dual.tangent, tangent)


def test_each_row_by_itself() -> None:
    x, rounded = _values(None)
    assert torch.equal(vmap(rounded)(x), rounded(x))
    per_row = vmap(grad(lambda v: rounded(v).square().sum()))(x)
    assert torch.equal(per_row, _trained(rounded, x))


def test_learnt_scale_and_zero_point() -> None:
    x, _ = _values(None)

    def loss(scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return ops.fake_quantize(x, scale, zero_point, -8, 7, gradient_scale=0.25).square().sum()

    parameters = [torch.tensor(0.1), torch.tensor(3.0)]
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    loss(*leaves).backward()
    found = grad(loss, argnums=(0, 1))(*parameters)
    for leaf, value in zip(leaves, found, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(value, leaf.grad, rtol=1e-4)
