"""Products of floating activations with integer weights: a float is written in digits that integer kernels take.

Each row is scaled so that its largest value fills a float's mantissa. Adding ``1.5 * 2**23`` then leaves the rounded
integer in the bits of the sum, whose lower three bytes are the digits: 23 bits per value, as good as float32 itself.
"""

from collections.abc import Callable

import torch

DIGITS = 3
LARGEST = 2.0**22 - 1
_MIDDLE = 2.0**22
_MAGIC = 1.5 * 2.0**23
_PLACES = (1.0, 256.0, 65536.0)
_SIGNED = 0x8080
"""Half a digit in each of the lower two places: what is added before, and flipped after, makes bytes signed digits."""
CENTER = _MIDDLE / sum(_PLACES)
"""What each digit would be for a real zero, if all three were alike; a bias of the kernel takes it off again."""

_magic = torch.tensor(_MAGIC)
_places = torch.tensor([_PLACES]) / LARGEST
_signed_places = torch.tensor([*_PLACES, 0.0]) / LARGEST  # the fourth byte repeats the sign
_signed_from = _SIGNED - int(_magic.view(torch.int32))


def digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the rows of ``x`` in digits.

    Decoding calls this with nothing in the cache, where each operator costs tens of microseconds: so few of them.

    Args:
        x: float32 ``[rows, k]``, contiguous. A row with NaN or infinity gets values that are not finite.

    Returns:
        Digits, uint8 ``[3, rows, k]``, the least first, and the real value of one unit of each, float32
        ``[rows, 1, 3]``: ``x = value[0] * d[0] + value[1] * d[1] + value[2] * d[2] - 2**22 * value[0]``. One row alone
        gives ``[3, k]`` and ``[1, 3]``, whose products need no views.
    """
    top = x.abs().amax(1, keepdim=True)
    shifted = torch.addcdiv(_magic, x, top, value=LARGEST)  # a row of zeros becomes NaN, and its values zero
    if torch.compiler.is_compiling():
        bits = shifted.view(torch.int32)
        split = torch.stack((bits & 255, (bits >> 8) & 255, (bits >> 16) & 127)).to(torch.uint8)
    else:
        rows, k = x.shape
        if rows == 1:
            return torch.as_strided_copy(shifted.view(torch.uint8), (DIGITS, k), (1, 4)), top * _places
        split = torch.as_strided_copy(shifted.view(torch.uint8), (DIGITS, rows, k), (1, 4 * k, 4))
    return split, (top * _places).unsqueeze(1)


def signed_digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write one row in signed digits, which lie side by side as its bytes do.

    Args:
        x: ``[..., k]`` of one row, of any float dtype.

    Returns:
        Digits, int8 ``[k, 4]``, and the real value of one unit of each, float32 ``[4]``: ``x = digits @ values``.
    """
    row = x.detach().reshape(-1).float()
    top = row.abs().amax()
    bits = torch.addcdiv(_magic, row, top, value=LARGEST).view(torch.int32)
    return bits.add_(_signed_from).bitwise_xor_(_SIGNED).view(torch.int8).view(-1, 4), top * _signed_places


def digits_of_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``digits`` of the rows of ``x [..., k]``, of any float dtype."""
    return digits(x.detach().reshape(-1, x.shape[-1]).float().contiguous())


def multiply(
    split: torch.Tensor, values: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Multiply rows in digits by a matrix.

    Args:
        split: The digits of :func:`digits`.
        values: The values of :func:`digits`.
        product: Multiplies codes, uint8 ``[..., k]``, whose real zero is :data:`CENTER`; float32 ``[..., n]``.

    Returns:
        float32 ``[rows, n]``.
    """
    if split.dim() == 2:
        return torch.mm(values, product(split))
    return torch.bmm(values, product(split).transpose(0, 1)).squeeze(1)
