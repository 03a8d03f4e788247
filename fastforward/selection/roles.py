"""What a stub's value is to the operators that multiply with it.

A recorded `Flow` knows which stub governs which operand, across modules and helpers; it hands a scheme a mapping from
the stub's full name to a `Role`. Without a recorded run, `role_from_metadata` reads the role from the stub alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastforward.autoquant.optable import Operator, default_table
from fastforward.nn.quantizer import QuantizerMetadata

RoleKind: TypeAlias = Literal["weight", "activation"]
Governing: TypeAlias = "Mapping[str, Role]"


@dataclass(frozen=True)
class Role:
    """How an operator uses the value of a stub.

    Attributes:
        kind: ``"weight"`` for a parameter, ``"activation"`` for what depends on the model's input.
        operator: Name of the multiplying operator in the operator table.
        argument: Name of the operand.
        channel_axis: Axis of a weight that becomes the output's channels; per-channel scales lie along it.
        shape: Shape of a weight, when known; groups have to divide its last axis.
    """

    kind: RoleKind
    operator: str
    argument: str | None = None
    channel_axis: int | None = None
    shape: tuple[int, ...] | None = None


@functools.cache
def multiplying_operators() -> Mapping[str, Operator]:
    """The operators of the table with an operand worth quantizing: those that multiply, and tables of vectors."""
    return {row.identifier: row for row in default_table() if row.multiplied or row.axes}


def role_from_metadata(metadata: QuantizerMetadata) -> Role | None:
    """The role that a stub's own tags, operator and argument give; None when nothing multiplies its value."""
    operator = multiplying_operators().get(metadata.operator or "")
    if operator is None or "activation/output" in metadata or "parameter/bias" in metadata:
        return None
    argument = metadata.argument
    if argument is not None and argument not in (*operator.multiplied, *operator.axes):
        return None
    if "parameter" in metadata:
        return Role("weight", operator.identifier, argument, operator.weight_axis(argument or "weight"))
    return Role("activation", operator.identifier, argument) if operator.multiplied else None
