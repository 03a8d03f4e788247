"""Products of uint8 and int8 matrices by torch's plain integer product, whatever the torch version takes."""

import torch


def _takes_uint8() -> bool:
    """Whether ``torch._int_mm`` multiplies uint8 by int8 on CPUs; before torch 2.7 it took int8 alone."""
    codes, weight = torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.int8)
    try:
        torch._int_mm(codes, weight)
    except RuntimeError:
        return False
    return True


TAKES_UINT8 = _takes_uint8()


def int_mm(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``codes [m, k]`` uint8 times ``weight [k, n]`` int8: int32 ``[m, n]``, exact."""
    if TAKES_UINT8:
        return torch._int_mm(codes, weight)
    signed = (codes ^ 128).view(torch.int8)
    return torch._int_mm(signed, weight).add_(weight.sum(0, dtype=torch.int32), alpha=128)
