"""What a call does with its arguments: which of them it may change in place, and which its result may be or hold.

In comes the AST of a call, with the scope that it stands in; out come those of its arguments. A callee found from the
source (a global function, one defined in the same function, a method of the class) answers by its :class:`Effects`; of
all others only tensors' own methods, operators of the table and Python's containers are known. What nobody knows is
taken to change nothing and to return something new.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from fastforward.autoquant.optable import Operator, OperatorTable

UNKNOWN: Final = object()
"""What a name means that nobody can tell."""

# Methods of a tensor whose results may share its memory, and those of containers that give out what they hold.
_VIEWS = frozenset(
    ["as_strided", "chunk", "contiguous", "cpu", "cuda", "detach", "diagonal", "double", "expand", "expand_as"]
    + ["flatten", "float", "half", "movedim", "narrow", "permute", "ravel", "reshape", "reshape_as", "select", "split"]
    + ["squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type_as", "unbind", "unflatten"]
    + ["unfold", "unsqueeze", "view", "view_as"]
)
_GIVING_OUT = frozenset(["copy", "get", "items", "pop", "setdefault", "values"])
_CONTAINERS = frozenset([dict, enumerate, iter, list, next, reversed, set, sorted, tuple, zip])
# Operators that hand their input back where they have nothing to do (outside training).
_IDLE = frozenset(["alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"])


class Effects(NamedTuple):
    """What a function does with its arguments.

    Attributes:
        arguments: Its parameters.
        changed: Those whose objects it may change in place.
        returned: Those whose objects its result may be, contain or be views of.
        given: How many of the first parameters are no arguments of the call (``self``).
    """

    arguments: ast.arguments
    changed: frozenset[str] = frozenset()
    returned: frozenset[str] = frozenset()
    given: int = 0


@dataclass(frozen=True)
class Callees:
    """What is known of the callees in one function.

    Attributes:
        table: The operator table.
        resolve: Name or attribute chain -> the object that it means, or ``UNKNOWN``.
        effects: Live function, and whether only changes count -> its effects; ``None`` if it is not looked into.
        method: The same for a method of the class around, by its name and whether ``super()`` has it.
    """

    table: OperatorTable
    resolve: Callable[[ast.expr], Any]
    effects: Callable[[Any, bool], Effects | None] = lambda _, __: None
    method: Callable[[str, bool, bool], Effects | None] = lambda _, __, ___: None

    def returned(self, call: ast.Call, local: Effects | None, is_local: bool) -> Iterator[ast.expr]:
        """Arguments (and receivers) that the result of ``call`` may be, contain, or be a view of.

        Args:
            call: The call.
            local: What it calls, if that is defined in the same function.
            is_local: Whether the callee's name is one of the function's own.
        """
        target = UNKNOWN if is_local else self.resolve(call.func)
        operator = self._operator(target)
        if local is not None:
            yield from arriving(call, local, local.returned)
        elif target is UNKNOWN:
            if isinstance(call.func, ast.Attribute) and _hands_on_receiver(call.func.attr):
                yield call.func.value
        elif operator is not None and not operator.decompose:
            if operator.kind == "move" or is_idle(operator) or works_in_place(call) or is_in_place(call):
                yield from call.args[:1]
        elif target in _CONTAINERS if _hashable(target) else False:
            yield from call.args
        else:
            found = self.effects(target, False)
            yield from () if found is None else arriving(call, found, found.returned)

    def changed(self, call: ast.Call, local: Effects | None, is_local: bool) -> Iterator[ast.expr]:
        """Arguments (and receivers) that ``call`` may change in place; the arguments are those of `returned`."""
        target = UNKNOWN if is_local else self.resolve(call.func)
        yield from (keyword.value for keyword in call.keywords if keyword.arg == "out")
        if works_in_place(call):
            yield call.args[0]
        if is_in_place(call) and target is not UNKNOWN:  # a function of torch
            yield from call.args[:1]
        elif is_in_place(call) and isinstance(call.func, ast.Attribute):
            yield call.func.value
        found = local
        if found is None and any(map(_may_hold, [*call.args, *(keyword.value for keyword in call.keywords)])):
            found = self._effects_of(target)
        yield from () if found is None else arriving(call, found, found.changed)

    def _effects_of(self, target: Any) -> Effects | None:
        operator = self._operator(target)
        is_operator = target is UNKNOWN or (operator is not None and not operator.decompose)
        return None if is_operator else self.effects(target, True)

    def _operator(self, target: Any) -> Operator | None:
        return self.table.find_callable(target) if target is not UNKNOWN and _hashable(target) else None


def arriving(call: ast.Call, effects: Effects, names: frozenset[str]) -> Iterator[ast.expr]:
    """The arguments of ``call`` that arrive at the parameters called ``names``."""
    if not names:
        return
    arguments = effects.arguments
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][effects.given :]
    known = {*positional, *(argument.arg for argument in arguments.kwonlyargs)}
    rest = [arguments.vararg.arg] if arguments.vararg else []
    spread = False
    for index, argument in enumerate(call.args):
        spread = spread or isinstance(argument, ast.Starred)
        reached = [*positional[index:], *rest] if spread else positional[index : index + 1] or rest
        if not names.isdisjoint(reached):
            yield argument
    for keyword in call.keywords:
        collected = [arguments.kwarg.arg] if arguments.kwarg else []
        reached = [*known, *collected] if keyword.arg is None else [keyword.arg] if keyword.arg in known else collected
        if not names.isdisjoint(reached):
            yield keyword.value


def is_idle(operator: Operator) -> bool:
    """Whether ``operator`` may hand its input back as it is."""
    return operator.identifier in _IDLE


def works_in_place(node: ast.Call) -> bool:
    """``relu(x, inplace=True)``: the result is the first argument itself."""
    flags = [keyword.value for keyword in node.keywords if keyword.arg == "inplace"]
    return bool(flags and node.args) and not (isinstance(flags[0], ast.Constant) and not flags[0].value)


def is_in_place(call: ast.Call) -> bool:
    """``x.add_(y)``, ``torch.relu_(x)``: by torch's convention the result is the receiver or first argument itself."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    return _ends_in_place(str(name))


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _hands_on_receiver(method: str) -> bool:
    return method in _VIEWS or method in _GIVING_OUT or _ends_in_place(method)


def _may_hold(argument: ast.expr) -> bool:
    return not isinstance(argument, (ast.Constant, ast.JoinedStr, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Lambda))


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None
