"""Where a running call comes from: the user's line, and the rewritten functions around it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

import fastforward
from fastforward.autoquant.scope import Scope

_SKIPPED_SOURCES = tuple(f"{Path(str(package.__file__)).parent}{os.sep}" for package in (fastforward, torch))


def user_place() -> tuple[str | None, int | None]:
    """File and line of the innermost code that belongs neither to torch nor to FastForward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_SKIPPED_SOURCES) and not file.startswith("<"):
            return file, frame.f_lineno
        frame = frame.f_back
    return None, None


def scopes() -> Iterator[object]:
    """The scopes of the rewritten functions that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "_ff" in frame.f_code.co_varnames or "_ff" in frame.f_code.co_freevars:
            scope = frame.f_locals.get("_ff")
            if isinstance(scope, Scope):
                yield scope
        frame = frame.f_back
