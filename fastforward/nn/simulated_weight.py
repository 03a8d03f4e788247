"""The simulated quantization of a parameter, kept in evaluation."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastforward.nn.quantizer import Quantizer


class SimulatedWeight:
    """The simulated quantization of one parameter, computed again only when an ingredient changes.

    Ingredients are compared by identity, by the version counter that every in-place change advances, and by address
    (``parameter.data = ...`` keeps identity and version), and the result by its version: user code may get hold of it.
    Copies and pickles of a module start empty.
    """

    __slots__ = ("_key", "_value", "_version")

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._value: torch.Tensor | None = None
        self._version = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "SimulatedWeight":
        return SimulatedWeight()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (SimulatedWeight, ())

    def get(self, quantizer: "Quantizer", weight: torch.Tensor, smoothing: torch.Tensor | None = None) -> torch.Tensor:
        """``quantizer(weight * smoothing)``, from the cache where that cannot be told from computing it again."""
        if not _cacheable(quantizer, weight):
            return _simulated(quantizer, weight, smoothing)
        key = _fingerprint(quantizer, weight, smoothing)
        value = self._value
        if value is None or self._version != version_of(value) or not _same(key, self._key):
            value = _simulated(quantizer, weight, smoothing)
            self._key, self._value, self._version = key, value, version_of(value)
        return value


def _simulated(quantizer: "Quantizer", weight: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
    rounded: torch.Tensor = quantizer(weight if smoothing is None else weight * smoothing)
    return rounded if smoothing is None else rounded.to(weight.dtype)


def _cacheable(quantizer: "Quantizer", weight: torch.Tensor) -> bool:
    """Only a quantizer without side effects or gradients, outside of a trace and of a recording, may be skipped."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or quantizer.is_watched():
        return False
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and not quantizer.is_stub()


def _fingerprint(quantizer: "Quantizer", weight: torch.Tensor, smoothing: torch.Tensor | None) -> tuple[Any, ...]:
    sources = [weight, *quantizer.parameters(), *quantizer.buffers()]
    sources += [] if smoothing is None else [smoothing]
    return (quantizer, *(part for tensor in sources for part in (tensor, version_of(tensor), tensor.data_ptr())))


def version_of(tensor: torch.Tensor) -> int:
    """The counter that every in-place change advances."""
    # Inference tensors have no version counter; they cannot be changed in place outside of inference mode.
    return -1 if tensor.is_inference() else tensor._version


def _same(key: tuple[Any, ...], other: tuple[Any, ...] | None) -> bool:
    if other is None or len(key) != len(other):
        return False
    return all(a is b or (type(a) is int and a == b) for a, b in zip(key, other, strict=True))
