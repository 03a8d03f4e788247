"""``F.linear``, ``matmul`` and ``F.conv2d`` of two quantized tensors, as sums of products of integers.

With ``x = (xq - zx) * sx`` and ``w = (wq - zw) * sw`` a dot product over ``K`` elements is
``sx * sw * (sum(xq * wq) - zw * sum(xq) - zx * sum(wq) + K * zx * zw)``; the bracket is exact in integers.

In eager mode the kernels do all of it; under ``torch.compile`` it is written out, so that the compiler fuses what
follows the product. Both compute the same bits.
"""

import dataclasses
from typing import Any

import fastforward_kernels as kernels
import torch
import torch.nn.functional as F
from fastforward_kernels.int_mm import int_mm
from fastforward_kernels.packing import PackCache
from torch import Tensor

from fastforward.quantization.mapping import FLOAT8_DTYPES
from fastforward.quantization.tensor import QuantizedTensor, implements_function, implements_operator, plain

aten = torch.ops.aten
PACKS = PackCache()
BYTES = (torch.int8, torch.uint8)


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of an integer product, ready to multiply.

    Attributes:
        values: int8 ``[rows, K]``.
        scale: float32 ``[rows, 1]`` or ``[1, 1]``.
        zero_point: int32, shaped as ``scale``.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def products(self, other: "Factor") -> Tensor:
        """Return the exact ``[rows, other rows]`` sums of products of both factors' integers less their zero points."""
        sums = int8_matmul(self.values, other.values.t())
        depth = self.values.shape[1]
        own = self.values.sum(1, keepdim=True, dtype=torch.int32)
        others = other.values.sum(1, keepdim=True, dtype=torch.int32)
        zero, other_zero = self.zero_point, other.zero_point.t()
        return sums - other_zero * own - zero * others.t() + depth * zero * other_zero

    def times(self, other: "Factor") -> Tensor:
        """Return the float32 product with the transpose of ``other``."""
        return self.products(other).to(torch.float32) * (self.scale * other.scale.t())  # the order of the kernels


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the int32 product of int8 ``[M, K]`` and ``[K, N]``, on whatever shapes the device can."""
    if a.shape[1] == 0 or a.shape[0] == 0 or b.shape[1] == 0:
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    if a.device.type != "cuda":
        return int_mm(a, b)
    # cuBLAS wants more than 16 rows, and K and N in multiples of 8; zeros change no sum.
    rows, depth, columns = max(17 - a.shape[0], 0), -a.shape[1] % 8, -b.shape[1] % 8
    padded = torch._int_mm(F.pad(a, (0, depth, 0, rows)), F.pad(b, (0, columns, 0, depth)))
    return padded[: a.shape[0], : b.shape[1]]


def integer_factor(x: QuantizedTensor) -> Factor | None:
    """Return ``x`` (``[..., K]``) as a factor.

    None if its values are no bytes, or a row has several scales.
    """
    if not has_whole_rows(x) or x.int_data.dtype not in BYTES:
        return None
    values = x.int_data.reshape(-1, x.shape[-1])
    scale = _per_row(x, x.scale).to(torch.float32)
    zero_point = torch.zeros_like(scale) if x.zero_point is None else _per_row(x, x.zero_point)
    if values.dtype == torch.uint8:
        values, zero_point = (values ^ 128).view(torch.int8), zero_point - 128
    return Factor(values, scale, zero_point.to(torch.int32))


def has_whole_rows(x: QuantizedTensor) -> bool:
    """Return whether every vector along the last axis has one scale."""
    return x.dim() > 0 and (x.is_per_tensor() or x.block_size[-1] == x.shape[-1])


def _per_row(x: QuantizedTensor, parameter: Tensor) -> Tensor:
    """Return a scale or zero point as ``[rows, 1]``, or ``[1, 1]`` if all rows share it."""
    if parameter.numel() == 1:
        return parameter.reshape(1, 1)
    view = x.parameter_view(parameter)
    rows = [count * block for count, block in zip(view.shape[:-1], x.block_size[:-1], strict=True)]
    for dim, block in enumerate(x.block_size[:-1]):
        view = view.repeat_interleave(block, dim) if block > 1 else view
    return view.reshape([*rows, 1]).reshape(-1, 1)


@implements_function(F.linear)
def quantized_linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for quantized operands: in integers where both have whole rows per block, else dequantized."""
    if isinstance(input, QuantizedTensor) and isinstance(weight, QuantizedTensor):
        out = _kernel_linear(input, weight, plain(bias))
        if out is not None:
            return out
        product = _grouped_product(input, weight)
        if product is not None:
            out = product.reshape(*input.shape[:-1], weight.shape[0])
            return (out if bias is None else out + plain(bias)).to(input.dtype)
    return F.linear(plain(input), plain(weight), plain(bias))


def _kernel_linear(x: QuantizedTensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """Return what the kernel makes of it; None where there is none, or a compiler is to see the parts."""
    if torch.compiler.is_compiling() or weight.dim() != 2 or not (has_whole_rows(x) and has_whole_rows(weight)):
        return None
    bias = None if bias is None else bias.to(torch.float32)
    scale = _per_row(x, x.scale).to(torch.float32).reshape(-1)
    kinds = (x.int_data.dtype, weight.int_data.dtype)
    if all(kind in BYTES for kind in kinds):
        packed = PACKS.get(weight.int_data, "linear", lambda: _packed(weight, kernels.pack_linear_weight))
        return kernels.int8_linear(x.int_data, scale, _integers(x), packed, bias=bias, out_dtype=x.dtype)
    if all(kind in FLOAT8_DTYPES for kind in kinds) and x.zero_point is None and weight.zero_point is None:
        weight_scale = _per_row(weight, weight.scale).to(torch.float32).reshape(-1)
        return kernels.float8_linear(x.int_data, scale, weight.int_data, weight_scale, bias, x.dtype)
    return None


def _packed(weight: QuantizedTensor, pack: Any) -> Any:
    zero_point = None if weight.zero_point is None else weight.zero_point.to(torch.int32)
    return pack(weight.int_data, weight.scale, zero_point)


def _integers(x: QuantizedTensor) -> Tensor | None:
    """Return the zero points of the rows of ``x`` as the kernels take them."""
    return None if x.zero_point is None else _per_row(x, x.zero_point).to(torch.int32).reshape(-1)


def _grouped_product(x: QuantizedTensor, weight: QuantizedTensor) -> Tensor | None:
    """Return ``x @ weight.T``, summed over groups of ``K`` where the weight has several scales along it."""
    factor = integer_factor(x)
    groups: list[Any] = [weight]
    group = weight.block_size[-1]
    if not weight.is_per_tensor() and group != weight.shape[-1]:
        groups = [weight[..., start : start + group] for start in range(0, weight.shape[-1], group)]
    others = [other for other in map(integer_factor, groups) if other is not None]
    if factor is None or len(others) < len(groups):
        return None
    if len(others) == 1:
        return factor.times(others[0])
    total = torch.zeros((), device=x.device)
    for index, other in enumerate(others):
        part = dataclasses.replace(factor, values=factor.values[:, index * group : (index + 1) * group])
        total = total + part.times(other)
    return total


@implements_function(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm)
def quantized_matmul(a: Any, b: Any) -> Tensor:
    """``matmul`` of quantized operands; batches of matrices are multiplied one by one."""
    if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)) or b.dim() < 2 or a.dim() < 2:
        return torch.matmul(plain(a), plain(b))
    if b.dim() == 2:
        return quantized_linear(a, b.t())
    if a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2]:
        return torch.matmul(plain(a), plain(b))
    simple = a.is_per_tensor() and b.is_per_tensor() and {a.int_data.dtype, b.int_data.dtype} <= set(BYTES)
    if simple and not torch.compiler.is_compiling():
        left = (a.int_data, a.scale.to(torch.float32), _integers(a))
        right = (b.int_data, b.scale.to(torch.float32), _integers(b))
        return kernels.int8_matmul(*left, *right, out_dtype=a.dtype)
    products = [quantized_matmul(x, y) for x, y in zip(a.unbind(0), b.unbind(0), strict=True)]
    return torch.stack(products)


@implements_function(F.conv2d)
def quantized_conv2d(
    input: Any,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` of quantized operands: the input's patches times the weight, in integers.

    The input needs one scale; the weight one per tensor or output channel. Padding is the input's zero point, which
    stands for zero.
    """
    numeric = not isinstance(padding, str)
    if not (isinstance(input, QuantizedTensor) and isinstance(weight, QuantizedTensor) and numeric):
        return F.conv2d(plain(input), plain(weight), plain(bias), stride, padding, dilation, groups)
    rows: Any = weight.reshape(weight.shape[0], -1)
    kernel = integer_factor(rows) if isinstance(rows, QuantizedTensor) else None
    if kernel is None or not input.is_per_tensor() or input.int_data.dtype not in BYTES or input.dim() != 4:
        return F.conv2d(plain(input), plain(weight), plain(bias), stride, padding, dilation, groups)
    if not torch.compiler.is_compiling():
        packed = PACKS.get(weight.int_data, "conv", lambda: _packed(weight, kernels.pack_conv_weight))
        if packed.zero_point is None:  # with zero points the kernel would multiply in float64
            geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
            return _kernel_conv(input, packed, bias, geometry)
    pixels = _padded(input, _pair(padding))
    patches, size = image_patches(pixels, weight.shape[2:], _pair(stride), _pair(dilation), groups)
    data = integer_factor(input)
    assert data is not None
    parts = [
        Factor(patches[group], data.scale, data.zero_point).times(_rows(kernel, group, groups))
        for group in range(groups)
    ]
    out = torch.cat(parts, 1).reshape(input.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2)
    if bias is not None:
        out = out + plain(bias).reshape(1, -1, 1, 1)
    return out.to(input.dtype)


def _kernel_conv(x: QuantizedTensor, packed: Any, bias: Any, geometry: tuple[Any, Any, Any, int]) -> Tensor:
    stride, padding, dilation, groups = geometry
    return kernels.int8_conv(
        x.int_data,
        x.scale.to(torch.float32),
        _integers(x),
        packed,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=None if bias is None else plain(bias).to(torch.float32),
        out_dtype=x.dtype,
    )


def _padded(x: QuantizedTensor, padding: tuple[int, int]) -> Tensor:
    """Return int8 pixels ``[B, C, H, W]`` with the zero point around them."""
    factor = integer_factor(x)
    assert factor is not None
    pixels = factor.values.reshape(x.shape)
    high, wide = padding
    if not high and not wide:
        return pixels
    batch, channels, height, width = x.shape
    around = factor.zero_point.to(torch.int8).expand(batch, channels, height + 2 * high, width + 2 * wide).clone()
    around[:, :, high : high + height, wide : wide + width] = pixels
    return around


def image_patches(
    pixels: Tensor, kernel: Any, stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches ``[groups, B * H_out * W_out, C / groups * kH * kW]`` and the size of the output."""
    batch, channels, height, width = pixels.shape
    rows = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    s_batch, s_channel, s_row, s_column = pixels.stride()
    view = pixels.as_strided(
        (groups, batch, rows, columns, channels // groups, kernel[0], kernel[1]),
        (
            s_channel * (channels // groups),
            s_batch,
            s_row * stride[0],
            s_column * stride[1],
            s_channel,
            s_row * dilation[0],
            s_column * dilation[1],
        ),
    )
    return view.reshape(groups, batch * rows * columns, -1), (rows, columns)


def _rows(factor: Factor, group: int, groups: int) -> Factor:
    """Return the output channels of one group."""

    def part(tensor: Tensor) -> Tensor:
        return tensor if groups == 1 or tensor.shape[0] == 1 else tensor.chunk(groups)[group]

    return Factor(part(factor.values), part(factor.scale), part(factor.zero_point))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    items = tuple(value)
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])


@implements_operator(aten.mm.default)
def _mm(func: Any, a: Any, b: Any) -> Tensor:
    del func
    return quantized_matmul(a, b)


@implements_operator(aten.addmm.default)
def _addmm(func: Any, bias: Tensor, a: Any, b: Any, **kwargs: Any) -> Tensor:
    if kwargs or not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)):
        out: Tensor = func(plain(bias), plain(a), plain(b), **kwargs)
        return out
    return quantized_linear(a, b.t(), bias)


@implements_operator(aten.linear.default)
def _linear(func: Any, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    del func
    return quantized_linear(x, weight, bias)
