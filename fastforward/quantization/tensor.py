"""``QuantizedTensor``: integers (or float8 values) stored with their scale, zero point and block size."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fastforward.exceptions import QuantizationError
from fastforward.quantization.granularity import block_counts, blocked

Handler = Callable[..., Any]
_H = TypeVar("_H", bound=Handler)
_ATTRIBUTES: tuple[Any, ...] = (Tensor.T, Tensor.mT)
MOVES = frozenset(
    {
        *(torch.t, torch.transpose, torch.permute, torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind),
        *(Tensor.t, Tensor.transpose, Tensor.permute, Tensor.chunk, Tensor.split, Tensor.narrow, Tensor.select),
        *(Tensor.unbind, Tensor.__getitem__, Tensor.detach, Tensor.contiguous, torch.squeeze, Tensor.squeeze),
        *(attribute.__get__ for attribute in _ATTRIBUTES),
        *(torch.reshape, Tensor.reshape, Tensor.view, Tensor.flatten),
    }
)
"""Functions of torch that only say in another way where a tensor's values lie."""
_FUNCTIONS: dict[Any, Handler] = {}
_OPERATORS: dict[Any, Handler] = {}


@dataclasses.dataclass(frozen=True)
class PlainLayout:
    """The stored values lie as in an ordinary tensor of the same shape."""


@dataclasses.dataclass(frozen=True)
class PlainTensorImpl:
    """What a quantized tensor stores, under the names by which torchao prints it."""

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    _layout: PlainLayout = dataclasses.field(default_factory=PlainLayout)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(data={self.data}... , scale={self.scale}... , zero_point={self.zero_point}... , "
            f"_layout={self._layout})"
        )


class QuantizedTensor(torch.Tensor):
    """A tensor that stores quantized values and stands for ``(q - zero_point) * scale``.

    ``F.linear``, ``matmul`` and ``F.conv2d`` of two of them multiply integers. Moving, slicing, transposing and, where
    blocks allow, reshaping keep the grid. Every other operator sees the dequantized values.

    Args:
        int_data: stored values, an integer or float8 type, of the tensor's shape.
        scale: one per block.
        zero_point: one per block, or None for zero.
        block_size: shape of the blocks that share a scale; each size divides the tensor's.
        dtype: type of the values it stands for.
        quant_min: smallest integer of the grid, by default that of the stored type.
        quant_max: largest integer of the grid.
    """

    _ff_works_everywhere = True
    int_data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block_size: tuple[int, ...]
    quant_min: int | None
    quant_max: int | None

    @staticmethod
    def __new__(
        cls: type[Self],
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        block_size: Sequence[int],
        dtype: torch.dtype = torch.float32,
        quant_min: int | None = None,
        quant_max: int | None = None,
    ) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls, int_data.shape, strides=int_data.stride(), dtype=dtype, device=int_data.device, requires_grad=False
        )

    def __init__(
        self,
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        block_size: Sequence[int],
        dtype: torch.dtype = torch.float32,
        quant_min: int | None = None,
        quant_max: int | None = None,
    ) -> None:
        del dtype
        self.int_data = int_data
        self.scale = scale
        self.zero_point = zero_point
        self.block_size = tuple(block_size)
        self.quant_min = quant_min
        self.quant_max = quant_max

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        parts = ["int_data", "scale"] + ([] if self.zero_point is None else ["zero_point"])
        return parts, (self.block_size, self.dtype, self.quant_min, self.quant_max)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> Self:
        del outer_size, outer_stride
        block_size, dtype, quant_min, quant_max = context
        zero_point = parts.get("zero_point")
        return cls(parts["int_data"], parts["scale"], zero_point, block_size, dtype, quant_min, quant_max)

    def _stable_hash_for_caching(self) -> str:
        """Return what torch.compile's cache may tell apart: everything but the values."""
        return stable_hash(self)

    @property
    def tensor_impl(self) -> PlainTensorImpl:
        """The stored parts, under torchao's names."""
        return PlainTensorImpl(self.int_data, self.scale, self.zero_point)

    def int_repr(self) -> Tensor:
        """Return the stored values."""
        return self.int_data

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks along each axis."""
        return block_counts(self.int_data.shape, self.block_size)

    def is_per_tensor(self) -> bool:
        """Return whether all elements share one scale."""
        return self.scale.numel() == 1

    def parameter_view(self, parameter: Tensor) -> Tensor:
        """Return a scale or zero point with as many axes as the tensor, each of the number of blocks."""
        return parameter.reshape(self.block_counts() if parameter.numel() > 1 else [1] * self.int_data.dim())

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Return the values it stands for as a plain tensor, computed in float32."""
        if self.is_per_tensor():
            view, scale, zero_point = self.int_data, self.scale.reshape(()), self.zero_point
            zero_point = None if zero_point is None else zero_point.reshape(())
        else:
            view = blocked(self.int_data, self.block_size)
            scale = interleaved(self.parameter_view(self.scale))
            zero_point = None if self.zero_point is None else interleaved(self.parameter_view(self.zero_point))
        view = view.to(torch.float32)
        values = (view if zero_point is None else view - zero_point) * scale.to(torch.float32)
        return values.reshape(self.int_data.shape).to(output_dtype or self.dtype)

    def with_parts(self, transform: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "QuantizedTensor":
        """Return the same tensor with ``transform`` applied to each stored part."""
        return QuantizedTensor(
            transform(self.int_data),
            transform(self.scale),
            None if self.zero_point is None else transform(self.zero_point),
            self.block_size,
            dtype or self.dtype,
            self.quant_min,
            self.quant_max,
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(tensor_impl={self.tensor_impl}, block_size={self.block_size}, shape={self.shape}, "
            f"device={self.device}, dtype={self.dtype}, requires_grad={self.requires_grad})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if func in MOVES and not torch.compiler.is_compiling():
            # A view made in inference mode could not share the version counter of its base.
            with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _OPERATORS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if func._schema.is_mutable and any(isinstance(arg, QuantizedTensor) for arg in args[:1]):
            msg = f"{func} would change a QuantizedTensor in place: dequantize() it first"
            raise QuantizationError(msg)
        return func(*plain(args), **plain(kwargs))


def plain(value: Any) -> Any:
    """Return ``value`` with quantized tensors dequantized, inside lists, tuples and dicts too."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def stable_hash(tensor: Any) -> str:
    """Return a digest of a wrapper tensor's type, shape and context, and of the tensors it wraps, without values."""
    names, context = tensor.__tensor_flatten__()
    parts = [
        (name, inner.__class__.__name__, inner.dtype, tuple(inner.shape), inner.stride(), inner.device)
        for name, inner in ((name, getattr(tensor, name)) for name in names)
    ]
    text = repr((type(tensor).__name__, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, context, parts))
    return hashlib.sha256(text.encode()).hexdigest()


def interleaved(parameter: Tensor) -> Tensor:
    """Return ``[n0, n1, ...]`` as ``[n0, 1, n1, 1, ...]``, which broadcasts against a blocked tensor."""
    return parameter.reshape([size for count in parameter.shape for size in (count, 1)])


def implements_function(*functions: Any) -> Callable[[_H], _H]:
    """Register what a function of torch does to quantized tensors."""

    def register(handler: _H) -> _H:
        _FUNCTIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def implements_operator(*operators: Any) -> Callable[[_H], _H]:
    """Register what an ATen operator does to quantized tensors; the handler gets the operator first."""

    def register(handler: _H) -> _H:
        _OPERATORS.update(dict.fromkeys(operators, handler))
        return handler

    return register


torch.serialization.add_safe_globals([QuantizedTensor, PlainLayout, PlainTensorImpl])
