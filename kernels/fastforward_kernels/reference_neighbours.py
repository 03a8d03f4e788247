"""Plain torch: what lies between the big integer operators, with 8-bit integers in and out.

Each takes one scale and zero point per tensor, computes in float32 on the exact integers and requantizes once, by
:func:`epilogue.convert`. Sums of a normalization are exact integers, so that their order does not matter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastforward_kernels import epilogue


def real(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return ``(q - zero_point) * scale``, float32."""
    return centred(q, zero_point).mul_(scale.reshape(()))


def centred(q: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return ``q - zero_point`` as a new float32 tensor (exact)."""
    values = q.to(torch.float32)
    return values if zero_point is None else values.sub_(zero_point.reshape(()))


def embedding(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *out: Any) -> Tensor:
    """Look rows of ``weight [n, d]`` up; one scale (and zero point), or one per row."""
    rows = functional.embedding(indices, weight).to(torch.float32)
    if zero_point is not None:
        rows = rows - _for_rows(zero_point, indices)
    return epilogue.convert(rows * _for_rows(scale, indices), *out)


def _for_rows(parameter: Tensor, indices: Tensor) -> Tensor:
    return parameter.reshape(()) if parameter.numel() == 1 else parameter.reshape(-1)[indices].unsqueeze(-1)


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """Return ``table[x]`` for 8-bit ``x``; entry 0 of the table is that of the type's smallest integer."""
    return table[_unsigned(x).to(torch.int64)]


def _unsigned(x: Tensor) -> Tensor:
    return x if x.dtype == torch.uint8 else x.view(torch.uint8) ^ 128


def add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    activation: str,
    *out: Any,
) -> Tensor:
    """``activation(a + b)``; shapes broadcast."""
    y = real(a, a_scale, a_zero_point) + real(b, b_scale, b_zero_point)
    return epilogue.convert(epilogue.ACTIVATIONS[activation](y), *out)


def mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    *out: Any,
) -> Tensor:
    """``a * b``: the exact product of the integers times ``a_scale * b_scale``; shapes broadcast."""
    product = centred(a, a_zero_point) * centred(b, b_zero_point)
    return epilogue.convert(product.mul_(a_scale.reshape(()) * b_scale.reshape(())), *out)


def concat(tensors: Sequence[Tensor], scales: Tensor, zero_points: Tensor, dim: int, *out: Any) -> Tensor:
    """Concatenate tensors of different grids; ``scales`` and ``zero_points`` hold one number per tensor."""
    parts = [
        epilogue.convert(real(q, scale, zero_point), *out)
        for q, scale, zero_point in zip(tensors, scales.unbind(), zero_points.unbind(), strict=True)
    ]
    return torch.cat(parts, dim)


def max_pool2d(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Largest integer of each window; the grid does not change and padding never wins."""
    return functional.max_pool2d(x.to(torch.float32), list(kernel_size), list(stride), list(padding)).to(x.dtype)


def avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *out: Any,
) -> Tensor:
    """Mean of each window, padding counted as real zeros."""
    area = kernel_size[0] * kernel_size[1]
    pooling = (list(kernel_size), list(stride), list(padding))
    sums = functional.avg_pool2d(centred(x, x_zero_point), *pooling, divisor_override=1)
    return epilogue.convert(sums * (x_scale.reshape(()) / area), *out)


def layer_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *out: Any,
) -> Tensor:
    """Layer normalization over the last axis: mean and variance from exact integer sums."""
    values = centred(x, x_zero_point)
    n = x.shape[-1]
    first = values.sum(-1, keepdim=True, dtype=torch.float64)
    second = values.double().square_().sum(-1, keepdim=True)
    variance = ((n * second - first * first) / (n * n)).to(torch.float32)
    mean = (first / n).to(torch.float32)
    y = values.sub_(mean).mul_(_inverse_deviation(variance, x_scale, eps))
    return epilogue.convert(_scaled(y, weight, bias), *out)


def rms_norm(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, weight: Tensor | None, eps: float, *out: Any
) -> Tensor:
    """Root-mean-square normalization over the last axis."""
    values = centred(x, x_zero_point)
    mean_square = (values.double().square_().sum(-1, keepdim=True) / x.shape[-1]).to(torch.float32)
    y = values.mul_(_inverse_deviation(mean_square, x_scale, eps))
    return epilogue.convert(_scaled(y, weight, None), *out)


def _inverse_deviation(variance: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return ``1 / sqrt(variance + eps)`` in units of integers, where ``eps`` counts ``1 / scale ** 2`` times."""
    scale = scale.reshape(())
    return 1 / torch.sqrt(variance + eps / (scale * scale))


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y.mul_(weight)
    return y if bias is None else y.add_(bias)


def softmax(x: Tensor, x_scale: Tensor, *out: Any) -> Tensor:
    """Softmax over the last axis; the zero point cancels."""
    values = x.to(torch.float32)
    shifted = values.sub_(values.amax(-1, keepdim=True)).mul_(x_scale.reshape(()))
    weights = shifted.exp_()
    return epilogue.convert(weights / weights.sum(-1, keepdim=True), *out)
