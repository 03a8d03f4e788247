"""Switching quantizers off for a while: the model then computes in float at their sites."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastforward.nn.quantizer import OverrideHandle, Quantizer


class DisableQuantizationOverride:
    """An override that passes values through while it is switched off.

    ``attach_to`` puts it on quantizers, ``detach`` removes it; ``disable_quantization`` and ``enable_quantization``
    switch all of them at once. Gradual schedules switch it per group of quantizers.
    """

    def __init__(self) -> None:
        self.quantization_enabled = False
        self._handles: list[OverrideHandle] = []

    def attach_to(self, target: Any) -> "DisableQuantizationOverride":
        """Attach to the quantizers of ``target``: a model, a quantizer, or several of either."""
        for quantizer in quantizers_of(target):
            self._handles.append(quantizer.register_override(self))
        return self

    def detach(self) -> None:
        """Remove it from all quantizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def disable_quantization(self) -> None:
        """Pass values through."""
        self.quantization_enabled = False

    def enable_quantization(self, enabled: bool = True) -> None:
        """Quantize again."""
        self.quantization_enabled = enabled

    def __call__(
        self, quantizer: Quantizer, inner: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        del quantizer
        if not self.quantization_enabled:
            passed: Tensor = args[0]
            return passed
        return inner(*args, **kwargs)


@contextlib.contextmanager
def disable_quantization(target: Any) -> Iterator[DisableQuantizationOverride]:
    """Within the block the quantizers of ``target`` pass values through: the model computes in float.

    Args:
        target: a model, a quantizer, or several of either.
    """
    override = DisableQuantizationOverride().attach_to(target)
    try:
        yield override
    finally:
        override.detach()


@contextlib.contextmanager
def enable_quantization(target: Any) -> Iterator[None]:
    """Within the block the quantizers of ``target`` quantize, inside a ``disable_quantization`` block too."""
    switched = {
        id(override): override
        for quantizer in quantizers_of(target)
        for override in quantizer.overrides
        if isinstance(override, DisableQuantizationOverride) and not override.quantization_enabled
    }
    wanted = {id(quantizer) for quantizer in quantizers_of(target)}
    exceptions = [_Except(override, wanted) for override in switched.values()]
    try:
        for exception in exceptions:
            exception.begin()
        yield
    finally:
        for exception in exceptions:
            exception.end()


class _Except:
    """Takes a disabling override off some of its quantizers, and puts it back."""

    def __init__(self, override: DisableQuantizationOverride, wanted: set[int]) -> None:
        self._override = override
        self._wanted = wanted
        self._removed: list[Quantizer] = []

    def begin(self) -> None:
        kept = []
        for handle in self._override._handles:
            if id(handle.quantizer) in self._wanted:
                handle.remove()
                self._removed.append(handle.quantizer)
            else:
                kept.append(handle)
        self._override._handles[:] = kept

    def end(self) -> None:
        for quantizer in self._removed:
            self._override._handles.append(quantizer.register_override(self._override))


def quantizers_of(target: Any) -> list[Quantizer]:
    """Return the quantizers below ``target``, stubs left out, each once."""
    found: dict[int, Quantizer] = {}
    if isinstance(target, torch.nn.Module) or hasattr(target, "modules"):  # the latter: a collection of found ones
        found = {id(m): m for m in target.modules() if isinstance(m, Quantizer) and not m.is_stub()}
    elif isinstance(target, Iterable):
        for item in target:
            found.update({id(quantizer): quantizer for quantizer in quantizers_of(item)})
    return list(found.values())
