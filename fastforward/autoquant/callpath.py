"""On which call path a module runs: announced by the rewritten code that calls it, taken by the module.

A module that is called from several places has quantizers of its own for each. The path does not travel among the
arguments of the call, where hooks would see it, but beside them: the caller says which module is to run on which path,
and that module asks when its ``forward`` begins. Whoever calls a module without saying anything means its first path.
"""

import threading
from typing import Any, Final

import torch

FIRST: Final = 1
"""The call path of a module's first caller, and of everybody who announces none."""


class _Traced:
    """What is coming while a compiler traces; one thread traces at a time."""

    module: Any = None
    index: int = FIRST


class _Coming(threading.local):
    """What is coming in this thread."""

    module: Any = None
    index: int = FIRST


_traced = _Traced()
_coming = _Coming()


def _slot() -> Any:
    # A compiler does not know thread-local objects.
    return _traced if torch.compiler.is_compiling() else _coming


class Announced:
    """A module as one call site calls it: on call path ``index``."""

    __slots__ = ("index", "module")

    def __init__(self, module: torch.nn.Module, index: int) -> None:
        self.module, self.index = module, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = _slot()
        slot.module, slot.index = self.module, self.index
        try:
            return self.module(*args, **kwargs)
        finally:
            slot.module = None  # a hook may have kept the module from running


def taken(module: torch.nn.Module) -> int:
    """The call path of the call of ``module`` that begins now."""
    slot = _slot()
    if slot.module is not module:
        return FIRST
    slot.module = None
    return slot.index  # type: ignore[no-any-return]
