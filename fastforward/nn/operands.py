"""What the hand-written layers share: the creation of their stubs, and the cached simulated weight."""

from typing import Any

import torch

from fastforward.nn import quantizer as quantizers
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata, QuantizerStub

_TAGS = {
    "input": "activation/input",
    "weight": "parameter/weight",
    "bias": "parameter/bias",
    "output": "activation/output",
}


def operand_stub(role: str, operator: str) -> QuantizerStub:
    """A stub for one operand of a hand-written layer.

    Args:
        role: ``"input"``, ``"weight"``, ``"bias"`` or ``"output"``.
        operator: Name of the layer's operator in the operator table, such as ``"linear"``.
    """
    argument = None if role == "output" else role
    metadata = QuantizerMetadata((_TAGS[role],), operator=operator, argument=argument)
    return QuantizerStub(metadata=metadata)


def add_operand_stubs(module: Any, operator: str, roles: tuple[str, ...]) -> None:
    """Give ``module`` one ``<role>_quantizer`` per role; a parameter that the module lacks gets ``None``."""
    for role in roles:
        absent = role in ("weight", "bias") and getattr(module, role, None) is None
        module.register_quantizer(f"{role}_quantizer", None if absent else operand_stub(role, operator))


def quantize_parameter(quantizer: Quantizer | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """``quantizer(parameter)``; whatever is missing is passed through."""
    return parameter if quantizer is None or parameter is None else quantizer(parameter)


class SimulatedWeight:
    """The simulated quantization of one parameter, computed again only when an ingredient changes.

    Ingredients are compared by identity, by the version counter that every in-place change advances, and by address
    (``parameter.data = ...`` keeps identity and version). Copies and pickles of a module start empty.
    """

    __slots__ = ("_key", "_value")

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._value: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SimulatedWeight":
        return SimulatedWeight()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (SimulatedWeight, ())

    def get(self, quantizer: Quantizer, weight: torch.Tensor, smoothing: torch.Tensor | None = None) -> torch.Tensor:
        """``quantizer(weight * smoothing)``, from the cache where that cannot be told from computing it again."""
        if not _cacheable(quantizer, weight):
            return _simulated(quantizer, weight, smoothing)
        key = _fingerprint(quantizer, weight, smoothing)
        if self._value is None or not _same(key, self._key):
            self._key, self._value = key, _simulated(quantizer, weight, smoothing)
        return self._value


def _simulated(quantizer: Quantizer, weight: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
    rounded: torch.Tensor = quantizer(weight if smoothing is None else weight * smoothing)
    return rounded if smoothing is None else rounded.to(weight.dtype)


def _cacheable(quantizer: Quantizer, weight: torch.Tensor) -> bool:
    """Only a quantizer without side effects or gradients, outside of a trace and of a recording, may be skipped."""
    if quantizers.recorder is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and not (quantizer.overrides or quantizer.is_stub())


def _fingerprint(quantizer: Quantizer, weight: torch.Tensor, smoothing: torch.Tensor | None) -> tuple[Any, ...]:
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
