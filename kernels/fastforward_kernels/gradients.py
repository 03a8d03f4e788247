"""The gradients of the fake-quantize operators.

``fake_quantize`` is called for every tensor of every step, so its autograd kernel is written out: it asks three tensors
whether they require a gradient, and calls the CPU implementation without another trip through the dispatcher. Where
only the input learns it keeps a mask instead of the input, which may so be changed in place afterwards. The other
operators use ``torch.library.register_autograd``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from fastforward_kernels import cpu_fake_quantize, reference, reference_matmul
from fastforward_kernels.library import LIBRARY, NAMESPACE

Operator = Callable[..., Any]


def register(
    forward: Any, backward: Operator, lsq_backward: Operator, zero_clipped: Operator, apply_mask: Operator
) -> None:
    """Attach gradients to the differentiable operators, which are made of these."""
    backward = _differentiable(backward, reference.fake_quantize_backward)
    lsq_backward = _differentiable(lsq_backward, reference.fake_quantize_lsq_backward)
    zero_clipped = _differentiable(zero_clipped, reference.zero_clipped)
    apply_mask = _differentiable(apply_mask, reference.apply_mask)
    kernel = _autograd_kernel(forward, backward, lsq_backward, zero_clipped)
    LIBRARY.impl("fake_quantize", kernel, "Autograd", with_keyset=True)

    def masked(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return apply_mask(grad.contiguous(), *ctx.saved_tensors), None, None, None, None, None

    def float8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        zero_point = torch.zeros((), dtype=torch.int32, device=x.device)
        bound = math.ceil(ctx.largest)
        return backward(grad, x, scale, zero_point, -bound, bound, ctx.tile), None, None, None

    _register("fake_quantize_with_mask", masked, _keep_mask)
    _register("fake_quantize_float8", float8, _keep_float8)


def _differentiable(operator: Operator, in_plain_torch: Operator) -> Operator:
    """Let a gradient that is differentiated itself (``create_graph=True``) be computed by what autograd knows."""

    def choose(grad: Tensor, *others: Any) -> Any:
        return (in_plain_torch if _wants_graph(grad) else operator)(grad, *others)

    return choose


def _wants_graph(grad: Tensor) -> bool:
    return grad.requires_grad and torch.is_grad_enabled()


def register_weight_only() -> None:
    """Attach the gradients to the activation and the bias; the weight is an integer and has none."""
    _register("weight_only_linear", _weight_only_gradients, _keep_weight)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, scale, zero_point, ctx.group_size, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, scale, *(() if zero_point is None else (zero_point,)))


def _weight_only_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, *zero_point = ctx.saved_tensors
    real = reference_matmul.dequantized(weight, scale, zero_point[0] if zero_point else None, ctx.group_size, ctx.dtype)
    to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
    return grad @ real, None, None, None, None, to_bias


def _autograd_kernel(
    forward: Any, backward: Operator, lsq_backward: Operator, zero_clipped: Operator
) -> Callable[..., Tensor]:
    def below(keys: DispatchKeySet, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            if _on_cpu(keys):
                return cpu_fake_quantize.fake_quantize(*arguments)
            y: Tensor = forward.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
            return y

    class KeepingMask(torch.autograd.Function):
        """On CPUs, where only the input learns."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                y, clipped = cpu_fake_quantize.fake_quantize_with_clipped(*arguments)
            ctx.save_for_backward(clipped)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            grad, (clipped,) = grads[0], ctx.saved_tensors
            if type(grad) is Tensor and type(clipped) is Tensor and not _wants_graph(grad):  # nobody is tracing
                with torch._C._AutoDispatchBelowAutograd():
                    return cpu_fake_quantize.zero_clipped(grad, clipped), None, None, None, None, None
            return zero_clipped(grad, clipped), None, None, None, None, None

    class KeepingInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: DispatchKeySet, *arguments: Any) -> Tensor:
            x, scale, zero_point, *ctx.grid, ctx.gradient_scale = arguments
            ctx.save_for_backward(x, scale, zero_point)
            return below(keys, *arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:4]
            if not any(needed):
                return None, backward(grads[0], *saved, *ctx.grid), None, None, None, None, None, None
            to_x, *to_parameters = lsq_backward(grads[0], *saved, *ctx.grid)
            scaled = [
                (grad * ctx.gradient_scale).to(parameter.dtype) if is_needed else None
                for grad, parameter, is_needed in zip(to_parameters, saved[1:], needed, strict=True)
            ]
            return None, to_x, *scaled, None, None, None, None

    def kernel(
        keys: DispatchKeySet,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        tile: list[int],
        gradient_scale: float = 1.0,
    ) -> Tensor:
        grid = (x, scale, zero_point, qmin, qmax, tile)
        learns_grid = scale.requires_grad or zero_point.requires_grad
        if not (learns_grid or x.requires_grad) or not torch.is_grad_enabled():
            return below(keys, *grid, gradient_scale)
        y: Tensor
        if learns_grid or not _on_cpu(keys):
            y = KeepingInput.apply(keys, *grid, gradient_scale)
        else:
            y = KeepingMask.apply(*grid)
        return y

    return kernel


def _on_cpu(keys: DispatchKeySet) -> bool:
    """Return whether the CPU's implementation is next, and nothing (tracing, a transform) in between."""
    return (keys & torch._C._after_autograd_keyset).highestPriorityTypeId() == DispatchKey.CPU


def _register(name: str, backward: Operator, setup_context: Operator) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    del inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _keep_float8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, dtype, tile = inputs
    ctx.save_for_backward(x, scale)
    ctx.largest, ctx.tile = torch.finfo(dtype).max, tile
