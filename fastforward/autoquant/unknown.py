"""Calls of torch that no row of the operator table covers: they stay as they are, and are listed."""

import ast
import types
from collections.abc import Iterator
from typing import Any

from fastforward.autoquant import known_names
from fastforward.autoquant.marks import Context
from fastforward.autoquant.qualified import qualified_name

_HARMLESS = (
    known_names.TORCH_INT
    | known_names.TORCH_PLAIN
    | known_names.TORCH_DISCRETE
    | known_names.TORCH_FACTORIES
    | {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic", "handle_torch_function"}
)


def unknown_operators(node: ast.AST, context: Context, function: types.FunctionType) -> Iterator[str]:
    """Calls of torch with what may be a floating tensor, that the table has no row for.

    Args:
        node: The function's AST.
        context: Operator table, name resolution and type inference.
        function: The live function.

    Yields:
        File and line, and the operator's name.
    """
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and _is_unknown(context.resolve(call.func), call, context):
            where = f"{function.__code__.co_filename}:{call.lineno}"
            name = qualified_name(context.resolve(call.func))
            yield f"{where}: {name} has no row in the operator table and stays float"


def _is_unknown(target: Any, call: ast.Call, context: Context) -> bool:
    if not _is_torch_function(target) or target.__name__ in _HARMLESS or target.__name__.startswith("_"):
        return False
    if context.table.find_callable(target) is not None or context.treat_call(target) == "call":
        return False
    return any(map(context.may_be_tensor, arguments(call)))


def arguments(call: ast.Call) -> list[ast.expr]:
    """The expressions that a call passes, positional ones first."""
    positional = [argument.value if isinstance(argument, ast.Starred) else argument for argument in call.args]
    return [*positional, *(keyword.value for keyword in call.keywords)]


def _is_torch_function(target: Any) -> bool:
    kinds: tuple[type, ...] = (types.FunctionType, types.BuiltinFunctionType)
    return isinstance(target, kinds) and _home(target).split(".")[0] == "torch"


def _home(target: Any) -> str:
    # torch's C functions have no module; what they are bound to has one.
    owner = getattr(target, "__self__", None)
    return str(getattr(target, "__module__", None) or getattr(owner, "__module__", None) or type(owner).__module__)
