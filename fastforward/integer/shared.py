"""What several layers make of the same tensor, made once: digits of floats, codes on a grid of the tensor's own."""

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

_last = threading.local()
Converted = TypeVar("Converted")


def shared(x: torch.Tensor, convert: Callable[[torch.Tensor], Converted]) -> Converted:
    """``convert(x)``; those of the latest tensor are kept for its next users whose ``convert`` is equal.

    Inference tensors do not tell when they change, so nothing is kept of them.
    """
    if torch.compiler.is_compiling():
        return convert(x)  # once in the program, whoever asks
    known = getattr(_last, "known", None)
    if known is None or known[0]() is not x or known[1] != x._version:
        known = None
    elif convert in known[2]:
        return known[2][convert]  # type: ignore[no-any-return]
    result = convert(x)
    if known is not None:
        known[2][convert] = result
    elif not x.is_inference():
        _last.known = (weakref.ref(x), x._version, {convert: result})
    return result


def forget() -> None:
    """Keep nothing of the latest tensor, so that its next user has to convert it."""
    _last.known = None
