"""The operator library ``fastforward`` and the one way to add an operator to it.

Every operator has a reference (plain torch, any device), and may have a CPU and a Triton implementation. Triton is
imported when the first GPU tensor arrives; where it cannot be imported the reference serves GPUs too.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fastforward"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
GPU_KEYS = ("CUDA", "XPU")


# Older torch has only the stricter word for "hand the strides over as they are".
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    triton: str | None = None,
    differentiable: bool = False,
) -> torch._ops.OpOverload:
    """Define the operator ``schema`` and register its implementations.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        reference: the definition, used on every device that has nothing better.
        fake: what shape-tracing calls: the outputs' shapes, dtypes and strides.
        cpu: a faster form for CPUs.
        triton: ``module:function`` below ``fastforward_kernels.triton``.
        differentiable: a gradient is registered by the caller; without one the result is cut off from the graph.
    """
    below = _same if differentiable else _without_gradient
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, _STRIDES))
    LIBRARY.impl(name, below(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if cpu is not None:
        LIBRARY.impl(name, below(cpu), "CPU")
    if triton is not None:
        on_gpu = below(_lazy(triton, reference))
        for key in GPU_KEYS:
            LIBRARY.impl(name, on_gpu, key)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def _same(implementation: Callable[..., Any]) -> Callable[..., Any]:
    return implementation


def _without_gradient(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation as torch runs its own kernels: autograd does not see what it does."""

    @functools.wraps(implementation)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*args, **kwargs)

    return call


def _lazy(target: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (_load(target) or reference)(*args, **kwargs)

    return call


@functools.cache
def _load(target: str) -> Callable[..., Any] | None:
    """Import ``module:function`` of the Triton package; None where Triton is not installed."""
    if not has_triton():
        return None
    module, _, function = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"fastforward_kernels.triton.{module}"), function)
    return loaded


@functools.cache
def has_triton() -> bool:
    """Return whether Triton can be imported, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None: its import is blocked
        return False
