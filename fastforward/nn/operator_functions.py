"""Builds the functions of `fastforward.nn.functional` from rows of the operator table.

They live in a module of their own because some have names of builtins (``all``, ``max``).
"""

import builtins
import functools
import inspect
import operator as python_operators
from collections.abc import Callable
from typing import Any

from fastforward.autoquant.optable import Operator, default_of, default_table, resolve

_PLAIN_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "floor_divide": "floordiv", "remainder": "mod",
    "pow": "pow", "matmul": "matmul", "bitwise_and": "and_", "bitwise_or": "or_", "bitwise_xor": "xor",
    "bitwise_left_shift": "lshift", "bitwise_right_shift": "rshift", "bitwise_not": "invert", "negative": "neg",
    "positive": "pos", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
}  # fmt: skip


@functools.cache
def rows() -> dict[str, Operator]:
    """The newest row of each identifier whose callable this version of torch has."""
    return {row.identifier: row for row in default_table() if resolve(row.fallback) is not None}


def build(row: Operator) -> Callable[..., Any]:
    """The function of a row.

    Args:
        row: An operator whose float callable exists.
    """
    run = resolve(row.fallback)
    if row.identifier in _PLAIN_OPERATORS:
        run = _with_plain_operands(getattr(python_operators, _PLAIN_OPERATORS[row.identifier]), run)
    elif f"builtins.{row.identifier}" in row.aliases:
        run = _with_plain_operands(getattr(builtins, row.identifier), run)

    def functional(*args: Any, output_quantizer: Callable[[Any], Any] | None = None, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        return result if output_quantizer is None else _quantized(output_quantizer, result)

    functional.__name__ = functional.__qualname__ = row.identifier
    functional.__doc__ = _document(row)
    functional.__signature__ = _signature(row)  # type: ignore[attr-defined]
    return functional


def _quantized(quantizer: Callable[[Any], Any], result: Any) -> Any:
    """Some operators (``lstm``) return several tensors: each goes through the quantizer."""
    if type(result) in (list, tuple):
        return type(result)(_quantized(quantizer, item) for item in result)
    return quantizer(result)


def _with_plain_operands(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python operator for positional operands, which need not be tensors; otherwise torch's function."""
    arity = 1 if plain.__name__ in ("neg", "pos", "invert", "abs", "round") else 2

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) == arity and not kwargs:
            return plain(*args)
        return function(*args, **kwargs)

    return run


def _document(row: Operator) -> str:
    lines = [
        f"``{row.fallback}`` followed by ``output_quantizer``.",
        "",
        f"Schema: ``{row.spec}``.",
        "",
        "Args:",
        f"    *args: As ``{row.fallback}`` takes them; tensors of any floating dtype, or `QuantizedTensor`s.",
        "    output_quantizer: Applied to the result; None leaves it as it is.",
        "    **kwargs: Likewise, by keyword.",
    ]
    return "\n".join(lines)


def _signature(row: Operator) -> inspect.Signature:
    kind = inspect.Parameter
    parameters: list[inspect.Parameter] = []
    for parameter in row.parameters:
        where: Any = kind.VAR_POSITIONAL if parameter.variadic else kind.POSITIONAL_OR_KEYWORD
        default = inspect.Parameter.empty if parameter.default_value is None else default_of(parameter)
        where = kind.KEYWORD_ONLY if parameter.keyword_only else where
        parameters.append(kind(parameter.name, where, default=default, annotation=parameter.param_type.text))
    if all(parameter.name != "output_quantizer" for parameter in parameters):
        annotation = "Quantizer | None"
        parameters.append(kind("output_quantizer", kind.KEYWORD_ONLY, default=None, annotation=annotation))
    return inspect.Signature(parameters, return_annotation=row.return_type.text)
