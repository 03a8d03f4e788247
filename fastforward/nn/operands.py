"""What the hand-written layers share: the creation of their stubs."""

from typing import Any

import torch

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
