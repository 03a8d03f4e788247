"""Rules by which a deferred result takes over the operators that follow it.

Each rule gets a torch function with its arguments and returns the result, or NotImplemented where the general path
(compute, then call the function) is right. Rules only ever change when something is computed, not what: a fused
activation, a batch normalization in scale and bias, an addition into the fresh result, a maximum over codes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastforward.integer import epilogue as epilogues
from fastforward.integer.deferred import RULES, Deferred, call_with_values
from fastforward.integer.epilogue import NO_ACTIVATION, Activation
from fastforward.integer.residual import plus

F = torch.nn.functional
Tensor = torch.Tensor
_mode_enabled = torch._C._is_torch_function_mode_enabled


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated rule for torch functions; what a torch version lacks is left out."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update({target: function for target in functions if target is not None})
        return function

    return register


def method(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated rule for the tensor method ``name``, called without torch's dispatch where nobody looks.

    A program asks for shapes and views at every other line, and the way to ``__torch_function__`` costs more than the
    answer. An active ``TorchFunctionMode`` still sees every call.
    """
    original = getattr(Tensor, name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES[original] = function

        def direct(self: Deferred, *args: Any, **kwargs: Any) -> Any:
            if not kwargs and not _mode_enabled():
                result = function(original, self, *args)
                if result is not NotImplemented:
                    return result
            return original(self, *args, **kwargs)

        setattr(Deferred, name, functools.wraps(original)(direct))
        return function

    return register


def activate(x: Any, activation: Activation, inplace: bool = False) -> Any:
    """Fuse ``activation`` into the product that ``x`` stands for."""
    if type(x) is not Deferred:
        return NotImplemented
    product = x.pending
    if product is None or product.activation is not NO_ACTIVATION:
        return _on_value(x, activation, inplace)
    if not inplace:
        return Deferred(product.activated(activation), x._shape)
    return NotImplemented if x.watched else x.become(product.activated(activation))


def _on_value(x: Deferred, activation: Activation, inplace: bool) -> Any:
    """Activate a computed value in the memory layout that it has."""
    value = x._value
    if value is None or value.is_contiguous() or (inplace and x.watched):
        return NotImplemented
    if inplace:
        return x.become(value=activation.apply(value))
    return Deferred(None, x._shape, value=activation.apply(value.clone()), dtype=x._dtype)


@rule(F.relu, torch.relu, Tensor.relu)
def _relu(func: Any, input: Any, inplace: bool = False) -> Any:
    return activate(input, epilogues.RELU, inplace)


@rule(torch.relu_, Tensor.relu_, getattr(F, "relu_", None))
def _relu_(func: Any, input: Any) -> Any:
    return activate(input, epilogues.RELU, inplace=True)


@rule(F.relu6)
def _relu6(func: Any, input: Any, inplace: bool = False) -> Any:
    return activate(input, epilogues.hardtanh(0.0, 6.0), inplace)


@rule(F.hardtanh)
def _hardtanh(func: Any, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return activate(input, epilogues.hardtanh(float(min_val), float(max_val)), inplace)


@rule(F.gelu)
def _gelu(func: Any, input: Any, *, approximate: str = "none") -> Any:
    return activate(input, epilogues.GELU_TANH if approximate == "tanh" else epilogues.GELU_ERF)


@rule(F.silu)
def _silu(func: Any, input: Any, inplace: bool = False) -> Any:
    return activate(input, epilogues.SILU, inplace)


@rule(F.hardswish)
def _hardswish(func: Any, input: Any, inplace: bool = False) -> Any:
    return activate(input, epilogues.HARDSWISH, inplace)


@rule(torch.tanh, Tensor.tanh)
def _tanh(func: Any, input: Any) -> Any:
    return activate(input, epilogues.TANH)


@rule(F.leaky_relu)
def _leaky_relu(func: Any, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return activate(input, epilogues.leaky_relu(float(negative_slope)), inplace)


@rule(F.dropout, torch.dropout)
def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **train: Any) -> Any:
    return NotImplemented if train.get("train", training) else input


@rule(F.batch_norm)
def _batch_norm(
    func: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if type(input) is not Deferred or training:
        return NotImplemented
    return fold_batch_norm(input, running_mean, running_var, weight, bias, eps)


def fold_batch_norm(x: Deferred, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Batch normalization with running statistics of a deferred result, as part of the product that it stands for."""
    product = x.pending
    folded = NotImplemented if product is None else product.batch_normalized(mean, var, weight, bias, eps)
    return folded if folded is NotImplemented else Deferred(folded, x._shape)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(func: Any, input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if alpha != 1 or out is not None:
        return NotImplemented
    owner, addend = (input, other) if type(input) is Deferred and input.pending else (other, input)
    if type(owner) is Deferred and (later := plus(owner, addend)) is not None:
        return addend._remember(Deferred(later, owner._shape))
    total = _sum(owner, addend)
    return _any_layout(func, input, other) if total is NotImplemented else total


@rule(Tensor.add_, Tensor.__iadd__)
def _add_(func: Any, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1 or type(input) is not Deferred or input.watched:
        return NotImplemented
    if (later := plus(input, other)) is not None:
        other._remember(input)
        return input.become(later)
    total = _sum(input, other)
    if total is NotImplemented:
        return NotImplemented
    return input.become(value=total._value if type(total) is Deferred else total)


def _sum(owner: Any, addend: Any) -> Any:
    """Add into the fresh result of ``owner``; nobody else has seen that memory."""
    if type(owner) is not Deferred or owner.pending is None or owner.watched:
        return NotImplemented
    if not isinstance(addend, Tensor) or addend.shape != owner._shape or addend.dtype != owner._dtype:
        return NotImplemented
    if addend.requires_grad and torch.is_grad_enabled():
        return NotImplemented
    value = owner.pending.followed_by("add").floats().add_(addend.computed() if type(addend) is Deferred else addend)
    # Nothing can be put off any more; a plain tensor spares what follows the way through Python's dispatch.
    return value if value.is_contiguous() else Deferred(None, owner._shape, value=value, dtype=owner._dtype)


# ---------------------------------------------------------------- data movement
@method("flatten")
@rule(torch.flatten)
def _flatten(func: Any, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    shape = tuple(input._shape)
    start, end = start_dim % max(len(shape), 1), end_dim % max(len(shape), 1)
    merged = (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])
    return _move(input, lambda x: x.flatten(start_dim, end_dim), merged)


@method("view")
@method("reshape")
@rule(torch.reshape)
def _reshape(func: Any, input: Any, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], Sequence):
        shape = tuple(shape[0])
    if type(input) is not Deferred or not all(type(size) is int for size in shape):
        return NotImplemented
    numel, known = math.prod(input._shape), -math.prod(shape)
    if -1 in shape and (known <= 0 or numel % known):
        return NotImplemented
    full = tuple(numel // known if size == -1 else size for size in shape)
    if math.prod(full) != numel:
        return NotImplemented
    return _move(input, lambda x: x.reshape(full), full)


@method("transpose")
@rule(torch.transpose, Tensor.swapaxes)
def _transpose(func: Any, input: Any, dim0: int, dim1: int) -> Any:
    if type(input) is not Deferred or type(dim0) is not int:
        return NotImplemented
    order = list(range(len(input._shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _move(input, lambda x: x.permute(order), tuple(input._shape[dim] for dim in order), strided=True)


@method("permute")
@rule(torch.permute)
def _permute(func: Any, input: Any, *dims: Any) -> Any:
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], Sequence) else list(dims)
    if type(input) is not Deferred or not all(type(dim) is int for dim in order):
        return NotImplemented
    return _move(input, lambda x: x.permute(order), tuple(input._shape[dim] for dim in order), strided=True)


@method("contiguous")
def _contiguous(func: Any, input: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    if not input._strided:
        return input
    copy = _move(input, lambda x: x.contiguous(), tuple(input._shape))
    if copy is not NotImplemented:
        copy._strided = False
    return copy


@rule(torch.roll, Tensor.roll)
def _roll(func: Any, input: Any, shifts: Any, dims: Any = ()) -> Any:
    return _move(input, lambda x: torch.roll(x, shifts, dims), tuple(input._shape))


@rule(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **others: Any,
) -> Any:
    if type(input) is not Deferred or len(input._shape) != 4 or ceil_mode or others.get("return_indices"):
        return NotImplemented
    kernel, pad, step = _pair(kernel_size), _pair(padding), _pair(dilation)
    strides = kernel if stride is None or stride == [] else _pair(stride)

    def move(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            # torch's own operator refuses channels-last uint8; this one maximizes codes, and pads with the smallest.
            return torch.ops.quantized.max_pool2d(x, kernel, strides, pad, step, False)  # type: ignore[no-any-return]
        return F.max_pool2d(x, kernel, strides, pad, step)

    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input._shape[2:], kernel, strides, pad, step, strict=True)
    )
    return _move(input, move, (*input._shape[:2], *sizes))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _move(input: Any, move: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, strided: bool = False) -> Any:
    if type(input) is not Deferred or input._value is not None:
        return NotImplemented
    return input.moved(move, shape, strided=strided)


# ---------------------------------------------------------------- elementwise in whatever layout the value has
@rule(
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    torch.sigmoid,
    Tensor.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    Tensor.mean,
    torch.mean,
)
def _any_layout(func: Any, *args: Any, **kwargs: Any) -> Any:
    values = tuple(arg.computed() if type(arg) is Deferred else arg for arg in args)
    if any(type(value) is Deferred for value in kwargs.values()):
        return NotImplemented
    result = func(*values, **kwargs)
    if result.is_contiguous():
        return result
    return Deferred(None, tuple(result.shape), value=result, dtype=result.dtype)


# ---------------------------------------------------------------- questions that need no values
def _answer(name: str, answer: Callable[[Deferred], Any]) -> None:
    """Answer the attribute ``name`` from what is remembered."""
    original = getattr(Tensor, name)
    RULES[original.__get__] = lambda func, x, *_: answer(x)
    if name != "requires_grad":  # which can be set as well
        setattr(Deferred, name, property(lambda x: original.__get__(x) if _mode_enabled() else answer(x)))


_answer("shape", lambda x: torch.Size(x._shape))
_answer("dtype", lambda x: x._dtype)
_answer("ndim", lambda x: len(x._shape))
_answer("device", lambda x: x._device)
_answer("is_cuda", lambda x: x._device.type == "cuda")
_answer("layout", lambda x: torch.strided)
_answer("requires_grad", lambda x: False)


@method("size")
def _size(func: Any, input: Any, dim: int | None = None) -> Any:
    return torch.Size(input._shape) if dim is None else input._shape[dim]


@method("dim")
@rule(Tensor.ndimension)
def _dim(func: Any, input: Any) -> int:
    return len(input._shape)


@method("__len__")
def _len(func: Any, input: Any) -> int:
    return int(input._shape[0]) if input._shape else NotImplemented


@method("numel")
@rule(Tensor.nelement, torch.numel)
def _numel(func: Any, input: Any) -> int:
    return math.prod(input._shape)


@method("is_floating_point")
@rule(torch.is_floating_point)
def _is_floating_point(func: Any, input: Any) -> bool:
    return True


__all__ = ["activate", "call_with_values", "fold_batch_norm", "rule"]
