"""Products of floating activations with integer weights: a float is written in digits that integer kernels take.

Each row is scaled so that its largest value fills a float's mantissa. Adding ``1.5 * 2**23`` then leaves the rounded
integer in the bits of the sum, whose lower three bytes are the digits: 23 bits per value, as good as float32 itself.
"""

import threading
import weakref
from collections.abc import Callable

import torch

DIGITS = 3
LARGEST = 2.0**22 - 1
_MIDDLE = 2.0**22
_MAGIC = 1.5 * 2.0**23
_PLACES = (1.0, 256.0, 65536.0)
_SMALLEST = 1e-30
"""Rows whose largest value is smaller than this are multiplied as if it were this."""
CENTER = _MIDDLE / sum(_PLACES)
"""What each digit would be for a real zero, if all three were alike; a bias of the kernel takes it off again."""

_magic = torch.tensor(_MAGIC)
_places = torch.tensor(_PLACES)[:, None, None]
_last = threading.local()


def digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the rows of ``x`` in digits.

    Args:
        x: float32 ``[rows, k]``. A row with NaN or infinity gets a step that is not finite.

    Returns:
        Digits, uint8 ``[3, rows, k]``, the least first, and the real value of one unit, float32 ``[rows, 1]``:
        ``x = step * (d[0] + 256 * d[1] + 65536 * d[2] - 2**22)``.
    """
    top = x.abs().amax(1, keepdim=True).clamp_min(_SMALLEST)
    shifted = torch.addcmul(_magic, x, LARGEST / top)
    if torch.compiler.is_compiling():
        bits = shifted.view(torch.int32)
        split = torch.stack((bits & 255, (bits >> 8) & 255, (bits >> 16) & 127)).to(torch.uint8)
    else:
        split = shifted.view(torch.uint8).view(*x.shape, 4).permute(2, 0, 1)[:DIGITS].contiguous()
    return split, top / LARGEST


def shared_digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``digits`` of the rows of ``x [..., k]``, any float dtype; those of the latest tensor are kept for its next user.

    Several layers often take the same tensor. Inference tensors do not tell when they change, so nothing is kept of
    them.
    """
    known = getattr(_last, "digits", None)
    if known is not None and known[0]() is x and known[1] == x._version:
        return known[2]  # type: ignore[no-any-return]
    result = digits(x.detach().reshape(-1, x.shape[-1]).float())
    if not x.is_inference() and not torch.compiler.is_compiling():
        _last.digits = (weakref.ref(x), x._version, result)
    return result


def multiply(split: torch.Tensor, step: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Multiply rows in digits by a matrix.

    Args:
        split: uint8 ``[3, rows, k]`` of :func:`digits`.
        step: float32 ``[rows, 1]`` of :func:`digits`.
        product: Multiplies codes, uint8 ``[3 * rows, k]``, whose real zero is :data:`CENTER`; float32.

    Returns:
        float32 ``[rows, n]``.
    """
    _, rows, k = split.shape
    products = product(split.view(DIGITS * rows, k)).view(DIGITS, rows, -1)
    return (products * (_places * step)).sum(0)
