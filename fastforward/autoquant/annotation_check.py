"""Annotations against one run: functions and a call in, the annotations that say "no tensor" where a tensor came out.

Inference believes annotations; a wrong one would cost a site without a word.
"""

import ast
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastforward.autoquant import kinds
from fastforward.autoquant.callees import UNKNOWN
from fastforward.autoquant.helpers import TextUnit
from fastforward.autoquant.kinds import Kind
from fastforward.autoquant.marks import Resolver
from fastforward.autoquant.source import FunctionNode, qualname

Promises = dict[str, ast.expr]
"""Parameter (or ``return``) -> its annotation, where that excludes tensors."""


def wrong_annotations(units: Iterable[TextUnit], run: Callable[[], object]) -> list[str]:
    """Call ``run`` and compare what the functions get and return with their annotations.

    Args:
        units: The functions, as analysed.
        run: Runs the code that calls them.

    Returns:
        A message for each wrong annotation: file and line, function, parameter, annotation.
    """
    promises = {
        unit.function.__code__: (unit, found) for unit in units if (found := promises_of(unit.node, unit.resolve))
    }
    messages: dict[tuple[types.CodeType, str], str] = {}

    def look(frame: types.FrameType, event: str, value: object) -> None:
        known = promises.get(frame.f_code)
        if known is None or event not in ("call", "return"):
            return
        unit, promised = known
        for name, annotation in promised.items():
            if (name == "return") == (event == "return"):
                held = value if event == "return" else frame.f_locals.get(name)
                if holds_floating_tensor(held):
                    messages[frame.f_code, name] = message(frame.f_code, name, annotation)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(messages.values())


def promises_of(node: FunctionNode, look_up: Resolver) -> Promises:
    """The annotations of a function that exclude floating tensors; ``look_up`` knows its names."""

    def resolve(name: ast.expr) -> Any:
        found = look_up(name)
        return None if found is UNKNOWN else found

    arguments = node.args
    found = {a.arg: a.annotation for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    found["return"] = getattr(node, "returns", None)
    return {
        name: annotation
        for name, annotation in found.items()
        if annotation is not None and kinds.of_annotation(annotation, resolve) in (Kind.INT, Kind.PLAIN)
    }


def holds_floating_tensor(value: object) -> bool:
    """Whether ``value`` is a floating tensor or a list or tuple with one."""
    if isinstance(value, (list, tuple)):
        return any(holds_floating_tensor(item) for item in value)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def message(code: types.CodeType, name: str, annotation: ast.expr) -> str:
    """What is wrong with the annotation of parameter ``name`` (or ``return``) of the function with this code."""
    subject = "the result" if name == "return" else f"parameter {name!r}"
    where = f"{code.co_filename}:{annotation.lineno}"
    return (
        f"{where}: {subject} of {qualname(code)} is annotated {ast.unparse(annotation)!r} but is a "
        "floating tensor: no quantizer is placed for it. Correct the annotation"
    )
