"""torchao's static flow: tensors quantized with a given scale, and weights that quantize their linear's input."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import fastforward_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from fastforward.quantization.granularity import block_counts, blocked
from fastforward.quantization.mapping import FLOAT8_DTYPES, quant_bounds
from fastforward.quantization.tensor import QuantizedTensor, interleaved, stable_hash


def to_affine_quantized_intx_static(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_size: Sequence[int],
    dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> QuantizedTensor:
    """Quantize ``x`` to integers with a given scale and zero point.

    Args:
        x: floating tensor.
        scale: one per block.
        zero_point: one per block; integers, of any data type. None stands for zero.
        block_size: shape of the blocks that share a scale.
        dtype: integer type to store, byte-sized or sub-byte.
        quant_min: smallest integer to use, by default that of ``dtype``.
        quant_max: largest integer to use.

    Raises:
        TypeError: ``dtype`` is no integer type.
        ValueError: the blocks do not divide ``x``, the scale has another number of elements than there are blocks,
            or ``x`` holds NaN, which has no integer.
    """
    if dtype in FLOAT8_DTYPES:
        msg = f"{dtype} is no integer type: use to_affine_quantized_floatx_static"
        raise TypeError(msg)
    low, high = (int(bound) for bound in quant_bounds(dtype, quant_min, quant_max))
    stored = dtype if dtype.itemsize > 1 or dtype in (torch.int8, torch.uint8) else _byte(dtype)
    if torch.compiler.is_compiling():
        view, spread_scale = _block_view(x, scale, block_size)
        q = torch.round(view.to(torch.float32) * (1 / spread_scale))
        q = q if zero_point is None else q + _spread(zero_point, x, block_size)
        values = q.clamp(low, high).to(stored).reshape(x.shape)
    else:
        tile = _tile(x, scale, block_size)
        shift = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        values = kernels.ops.QUANTIZE(x.detach(), scale.to(torch.float32), shift, low, high, stored, tile)
    return QuantizedTensor(values, scale, zero_point, block_size, x.dtype, low, high)


def to_affine_quantized_floatx_static(
    x: Tensor, scale: Tensor, block_size: Sequence[int], target_dtype: torch.dtype, *_: Any
) -> QuantizedTensor:
    """Quantize ``x`` to a float8 type with a given scale; values beyond the type's range saturate.

    Raises:
        TypeError: ``target_dtype`` is no float8 type.
        ValueError: the blocks do not divide ``x``, or the scale does not fit them.
    """
    if target_dtype not in FLOAT8_DTYPES:
        msg = f"{target_dtype} is no float8 type: use to_affine_quantized_intx_static"
        raise TypeError(msg)
    low, high = quant_bounds(target_dtype)
    if torch.compiler.is_compiling():
        view, spread_scale = _block_view(x, scale, block_size)
        values = (view.to(torch.float32) * (1 / spread_scale)).clamp(low, high).to(target_dtype).reshape(x.shape)
    else:
        tile = _tile(x, scale, block_size)
        values = kernels.ops.QUANTIZE_FLOAT8(x.detach(), scale.to(torch.float32), target_dtype, tile)
    return QuantizedTensor(values, scale, None, block_size, x.dtype)


class LinearActivationQuantizedTensor(torch.Tensor):
    """A weight whose ``F.linear`` quantizes the input first: what a plain ``nn.Linear`` can carry.

    Args:
        weight: the quantized weight.
        input_quant_func: called as ``input_quant_func(input, **quant_kwargs)``.
        quant_kwargs: scale, zero point and the like, for the input.
    """

    original_weight_tensor: QuantizedTensor

    @staticmethod
    def __new__(
        cls: type[Self], weight: QuantizedTensor, input_quant_func: Any, quant_kwargs: dict[str, Any] | None = None
    ) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device, requires_grad=False
        )

    def __init__(
        self, weight: QuantizedTensor, input_quant_func: Any, quant_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.original_weight_tensor = weight
        self.input_quant_func = input_quant_func
        self.quant_kwargs = {} if quant_kwargs is None else quant_kwargs

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        tensors = {key: value for key, value in self.quant_kwargs.items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            self.__dict__[f"_kwarg_{key}"] = value
        others = tuple((key, value) for key, value in self.quant_kwargs.items() if key not in tensors)
        names = ["original_weight_tensor", *(f"_kwarg_{key}" for key in tensors)]
        return names, (self.input_quant_func, others)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Any], context: tuple[Any, ...], size: Any, stride: Any) -> Self:
        del size, stride
        function, others = context
        tensors = {key.removeprefix("_kwarg_"): value for key, value in parts.items() if key.startswith("_kwarg_")}
        return cls(parts["original_weight_tensor"], function, {**tensors, **dict(others)})

    def _stable_hash_for_caching(self) -> str:
        inner = stable_hash(self.original_weight_tensor)
        return stable_hash(self) + inner

    def _with(self, transform: Callable[[Any], Any]) -> "LinearActivationQuantizedTensor":
        kwargs = {key: transform(v) if isinstance(v, Tensor) else v for key, v in self.quant_kwargs.items()}
        weight = transform(self.original_weight_tensor)
        return LinearActivationQuantizedTensor(weight, self.input_quant_func, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}({self.original_weight_tensor}, {self.input_quant_func}, "
            f"quant_kwargs={self.quant_kwargs})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear_with_quantized_input(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.alias.default, aten._to_copy.default):
            weight = args[0]
            return weight._with(lambda part: func(part, **_for_part(part, weight, kwargs)))
        return func(*(_plain(arg) for arg in args), **kwargs)


def to_linear_activation_quantized(
    weight: QuantizedTensor, input_quant_func: Callable[..., Tensor], quant_kwargs: dict[str, Any] | None = None
) -> LinearActivationQuantizedTensor:
    """Return ``weight`` as one whose ``F.linear`` first calls ``input_quant_func(input, **quant_kwargs)``."""
    return LinearActivationQuantizedTensor(weight, input_quant_func, quant_kwargs)


def _linear_with_quantized_input(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, LinearActivationQuantizedTensor):
        return F.linear(_plain(input), _plain(weight), bias)
    return F.linear(weight.input_quant_func(input, **weight.quant_kwargs), weight.original_weight_tensor, bias)


def _plain(value: Any) -> Any:
    return value.original_weight_tensor.dequantize() if isinstance(value, LinearActivationQuantizedTensor) else value


def _for_part(part: Tensor, weight: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop the data type and layout for parts that are not the weight: scales keep theirs."""
    if isinstance(part, QuantizedTensor):
        return kwargs
    return {key: value for key, value in kwargs.items() if key not in ("dtype", "memory_format")}


def _block_view(x: Tensor, scale: Tensor, block_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ``x`` and ``scale`` so that they broadcast; one scale needs no blocks."""
    if scale.numel() == 1:
        return x, scale.reshape(()).to(torch.float32)
    return blocked(x, block_size), _spread(scale.to(torch.float32), x, block_size)


def _tile(x: Tensor, scale: Tensor, block_size: Sequence[int]) -> list[int]:
    """Return the blocks as the kernels take them, checked; one scale needs none."""
    if scale.numel() == 1:
        return []
    if scale.numel() != math.prod(block_counts(x.shape, block_size)):
        msg = f"{scale.numel()} scales do not fit blocks of {tuple(block_size)} in a tensor of {tuple(x.shape)}"
        raise ValueError(msg)
    return list(block_size)


def _spread(parameter: Tensor, x: Tensor, block_size: Sequence[int]) -> Tensor:
    if parameter.numel() == 1:
        return parameter.reshape(())
    counts = [n // b for n, b in zip(x.shape, block_size, strict=True)]
    return interleaved(parameter.reshape(counts))


def _byte(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if "uint" in str(dtype) else torch.int8
