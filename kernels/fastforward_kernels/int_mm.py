"""Products of uint8 and int8 matrices by torch's plain integer product, whatever the torch version takes."""

import torch
from torch import Tensor


def _takes_uint8() -> bool:
    """Whether ``torch._int_mm`` multiplies uint8 by int8 on CPUs; torch 2.6 and 2.11, for example, take int8 alone."""
    codes, weight = torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.int8)
    try:
        torch._int_mm(codes, weight)
    except RuntimeError:
        return False
    return True


TAKES_UINT8 = _takes_uint8()


def int_mm(codes: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``codes [m, k]`` uint8 or int8 times ``weight [k, n]`` int8: int32 ``[m, n]``, exact."""
    if codes.shape[1] == 1 and codes.device.type == "cpu":  # torch reads such matrices in the wrong order
        return torch.mul(codes.to(torch.int32), weight.to(torch.int32), out=out)
    if codes.shape[0] == 1 and codes.stride(0) < codes.shape[1]:  # likewise a single row with an odd stride
        codes = codes.flatten().contiguous()[None]
    if TAKES_UINT8 or codes.dtype == torch.int8:
        return torch._int_mm(codes, weight) if out is None else torch._int_mm(codes, weight, out=out)
    signed = (codes ^ 128).view(torch.int8)
    product = torch._int_mm(signed, weight) if out is None else torch._int_mm(signed, weight, out=out)
    return product.add_(weight.sum(0, dtype=torch.int32), alpha=128)
