"""Reading the calls that a torch-function mode is handed: which operator, which arguments, movement or computation."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastforward.autoquant.optable import Operator, OperatorTable
from fastforward.autoquant.overriding import QUESTIONS
from fastforward.calibration.trace import UNLISTED_MOVES

# C functions below Python ones of the table, whose arguments come in another order.
_C_ORDER = {torch.embedding: ("weight", "input"), torch.embedding_bag: ("weight", "input")}


def function_name(func: Any) -> str:
    """The name of a torch function; for an attribute of a tensor, the attribute's."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def bind(operator: Operator, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema; those of a variadic parameter as a list."""
    if func in _C_ORDER:
        return {**dict(zip(_C_ORDER[func], args, strict=False)), **kwargs}
    if name.startswith("__r") and len(args) == 2:
        args = args[::-1]
    bound: dict[str, Any] = {}
    for index, value in enumerate(args):
        parameter = operator.parameter_at(index)
        if parameter is None:
            continue
        if parameter.variadic:
            bound.setdefault(parameter.name, []).append(value)
        else:
            bound[parameter.name] = value
    return {**bound, **kwargs}


def find_operator(table: OperatorTable, func: Any, name: str) -> Operator | None:
    """The table's row for what the mode was handed; Python's operators come as ``__add__`` or ``__radd__``."""
    if func in _C_ORDER:
        return table.find_name(f"torch.nn.functional.{name}")
    found = table.find_callable(func)
    if found is None and name.startswith("__"):
        plain = name.strip("_")
        found = table.find_method(plain) or table.find_method(plain.removeprefix("r"))
    return found or table.find_method(name)


def moves(operator: Operator | None, name: str, args: Any, kwargs: Any) -> bool:
    """Whether the call only moves data; dropout does so outside of training."""
    if name in ("dropout", "alpha_dropout", "feature_dropout", "native_dropout"):
        return not (kwargs.get("train", kwargs.get("training", args[2] if len(args) > 2 else True)))
    return name in UNLISTED_MOVES or (operator is not None and operator.kind == "move")


def pads(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call pads with what is on the operand's grid: copies of its values, or zero, which every grid has."""
    if name == "constant_pad_nd":
        return _is_zero(kwargs.get("value", args[2] if len(args) > 2 else None))
    if name != "pad":
        return name.startswith(("reflection_pad", "replication_pad"))
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    return mode != "constant" or _is_zero(kwargs.get("value", args[3] if len(args) > 3 else None))


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and value == 0)


@contextlib.contextmanager
def functionals_open() -> Iterator[None]:
    """Let a mode look into the Python functions of ``torch.nn.functional``.

    Each of them begins by asking whether some mode wants the call as a whole, and hands it the original function if so:
    the products inside would go unseen, and a rewritten copy of the function would be left for the original.
    """
    namespace = vars(torch.nn.functional)
    replaced = {question.__name__.removeprefix("_"): ours for question, ours in QUESTIONS}
    kept = {name: namespace[name] for name in replaced if name in namespace}
    namespace.update({name: replaced[name] for name in kept})
    try:
        yield
    finally:
        namespace.update(kept)
