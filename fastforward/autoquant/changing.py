"""Can a function change an argument in place? A look at byte code, for its own and for what it calls.

It spares reading the source of functions that surely do not. In doubt the answer is yes, but what is found only at run
time (a function passed as a value, a registry) is not looked for.
"""

import dis
import functools
import inspect
import opcode
import types
from collections.abc import Callable, Iterator
from typing import Any

# Bitwise operators are for integers and truth values, which are never quantized.
_BITWISE = ("INPLACE_AND", "INPLACE_OR", "INPLACE_XOR", "INPLACE_LSHIFT", "INPLACE_RSHIFT")
_STORES = frozenset(
    number for name, number in dis.opmap.items() if name.startswith(("INPLACE_", "STORE_S")) and name not in _BITWISE
)
# Since Python 3.11 operators are arguments of one byte code.
_IN_PLACE = frozenset(
    (dis.opmap["BINARY_OP"], argument)
    for argument, (_, sign) in enumerate(getattr(opcode, "_nb_ops", ()))
    if sign.endswith("=") and sign.rstrip("=") not in ("&", "|", "^", "<<", ">>")
)


def may_change(function: types.FunctionType, is_helper: Callable[[types.FunctionType], bool]) -> bool:
    """Whether ``function``, or a helper that it may call, holds anything that changes an object in place."""
    waiting, seen = [function], {id(function.__code__)}
    while waiting:
        current = waiting.pop()
        if _changes(current.__code__):
            return True
        for callee in _callees(current):
            if id(callee.__code__) not in seen and is_helper(callee):
                seen.add(id(callee.__code__))
                waiting.append(callee)
    return False


@functools.lru_cache(maxsize=4096)
def _changes(code: types.CodeType) -> bool:
    steps = zip(code.co_code[::2], code.co_code[1::2], strict=True)
    if any(step[0] in _STORES or step in _IN_PLACE for step in steps):
        return True
    if any(name.endswith("_") and not name.endswith("__") for name in code.co_names):
        return True
    keywords = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant]
    return "out" in keywords or "inplace" in keywords or any(map(_changes, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _names(code: types.CodeType) -> set[str]:
    return {*code.co_names, *(name for inner in _inner(code) for name in _names(inner))}


def _callees(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions that the names in ``function`` mean: globals, those of modules, captured ones, methods."""
    names = _names(function.__code__)
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    owners = [vars(value) for value in found if isinstance(value, types.ModuleType)]
    owners += [vars(cls) for cls in getattr(_class_of(function), "__mro__", ())]
    found += [owner[name] for owner in owners for name in names if name in owner]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    for value in found:
        value = getattr(value, "__func__", value)
        if isinstance(value, types.FunctionType):
            yield inspect.unwrap(value)


def _class_of(function: types.FunctionType) -> Any:
    """The class that a method was written in, if it is one of its module."""
    return function.__globals__.get(function.__qualname__.partition(".")[0])
