"""Where the class names of a query are looked up: the variables of the code that wrote the query."""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

_PACKAGE = "fastforward.selection"


@dataclass(frozen=True)
class QueryContext:
    """Names visible to a query.

    Args:
        local_names: Innermost variables, looked at first.
        global_names: Module-level variables of the same code.
    """

    local_names: Mapping[str, Any] = field(default_factory=dict)
    global_names: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, qualified_name: str) -> Any:
        """The object that a dotted name means here.

        The first part is a variable in scope or a builtin; failing that, the longest prefix that is a module already
        imported. Nothing is imported, so a query from a file runs no code.

        Raises:
            NameError: Nothing of that name is in scope.
        """
        first, *rest = qualified_name.split(".")
        for names in (self.local_names, self.global_names, vars(builtins)):
            if first in names:
                found = _follow(names[first], rest)
                if found is not None:
                    return found
        found = _from_loaded_modules(qualified_name.split("."))
        if found is None:
            msg = f"name {qualified_name!r} is neither in the scope of the query nor in a module already imported"
            raise NameError(msg)
        return found


def local_context() -> QueryContext:
    """The context of the function that calls this."""
    return _context_of(_frame(1))


def caller_context() -> QueryContext:
    """The context of the code that called the function that calls this."""
    return _context_of(_frame(2))


def user_context() -> QueryContext:
    """The context of the innermost caller outside the selection package."""
    frame: FrameType | None = _frame(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
        frame = frame.f_back
    return _context_of(frame)


def _frame(depth: int) -> FrameType | None:
    frame = inspect.currentframe()
    for _ in range(depth + 1):
        frame = frame.f_back if frame is not None else None
    return frame


def _context_of(frame: FrameType | None) -> QueryContext:
    return QueryContext() if frame is None else QueryContext(dict(frame.f_locals), frame.f_globals)


def _follow(value: Any, attributes: list[str]) -> Any | None:
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value


def _from_loaded_modules(parts: list[str]) -> Any | None:
    for length in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:length]))
        if module is not None:
            return _follow(module, parts[length:])
    return None
