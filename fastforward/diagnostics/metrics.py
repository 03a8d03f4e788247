"""How far two results are apart."""

import math
from typing import Any

import torch

from fastforward.calibration.trace import tensors_in


def sqnr(reference: Any, other: Any) -> float:
    """Signal-to-quantization-noise ratio in dB: ``10 log10(sum(r^2) / sum((r - o)^2))``.

    Args:
        reference: The exact result: a tensor, or tensors in tuples, lists, mappings or records.
        other: The result to judge, of the same structure and shapes.

    Returns:
        ``inf`` if both are equal, ``-inf`` if the reference is zero and the other is not.

    Raises:
        ValueError: Structures or shapes differ, or there is no floating tensor.

    Example:
        >>> import torch
        >>> round(sqnr(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 2)
        20.0
    """
    pairs = _pairs(reference, other)
    signal = sum(float(r.double().square().sum()) for r, _ in pairs)
    noise = sum(float((r.double() - o.double()).square().sum()) for r, o in pairs)
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _pairs(reference: Any, other: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first = [tensor.detach() for tensor in tensors_in(reference) if tensor.is_floating_point()]
    second = [tensor.detach() for tensor in tensors_in(other) if tensor.is_floating_point()]
    if not first or len(first) != len(second):
        msg = f"sqnr: expected equally many floating tensors on both sides, got {len(first)} and {len(second)}"
        raise ValueError(msg)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape:
            msg = f"sqnr: tensor {index} has shape {tuple(a.shape)} on one side and {tuple(b.shape)} on the other"
            raise ValueError(msg)
    return [(a, b.to(a.device)) for a, b in zip(first, second, strict=True)]
