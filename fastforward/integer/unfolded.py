"""Integer convolutions from elementary operators: patches are copied out and multiplied as a matrix.

Slower than oneDNN's convolution, but it runs wherever ``torch._int_mm`` does, and consists of operators that an
exported program can hold.
"""

import torch
from fastforward_kernels.int_mm import int_mm

from fastforward.integer.epilogue import Epilogue

Geometry = tuple[list[int], list[int], list[int]]


def conv_int_mm(
    codes: torch.Tensor, weight: torch.Tensor, epilogue: Epilogue, geometry: Geometry, groups: int, zero_point: int
) -> torch.Tensor:
    """Convolve uint8 ``[batch, channels, *size]`` with int8 ``[out_channels, channels / groups, *kernel]``; float32.

    Args:
        codes: The input; it is padded with ``zero_point``, the code of real zero.
        weight: The weight.
        epilogue: Scale and bias of the result.
        geometry: Stride, padding and dilation per dimension.
        groups: Groups of channels.
        zero_point: The code of real zero.
    """
    patches = _patches(codes, weight.shape[2:], geometry, zero_point)
    outer = patches.shape[: patches.dim() // 2]  # batch and output size
    rows = patches.reshape(outer.numel(), groups, -1)
    filters = weight.reshape(groups, weight.shape[0] // groups, -1)
    if filters.shape[1] == 1:
        product = (rows.to(torch.int32) * filters[:, 0].to(torch.int32)).sum(-1, dtype=torch.int32)
    else:
        product = torch.cat([int_mm(rows[:, g].contiguous(), filters[g].t()) for g in range(groups)], dim=1)
    y = torch.addcmul(epilogue.compensated, product, epilogue.factor)
    return y.view(*outer, weight.shape[0]).movedim(-1, 1).contiguous()


def _patches(codes: torch.Tensor, kernel: torch.Size, geometry: Geometry, zero_point: int) -> torch.Tensor:
    """``[batch, *output size, channels, *kernel]``: what each output value is computed from."""
    stride, padding, dilation = geometry
    pads = [p for size in reversed(padding) for p in (size, size)]
    x = torch.nn.functional.pad(codes, pads, value=zero_point)
    dims = len(kernel)
    for axis in range(dims):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    return x.movedim(1, 1 + dims)
