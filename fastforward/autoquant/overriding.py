"""The question of torch's functions whether somebody overrides them, as rewritten code asks it.

``torch.nn.functional.multi_head_attention_forward`` hands itself to a tensor subclass that it is given, or to an active
torch-function mode, and so leaves the rewritten code for the one it was made from. Tensors of our own are not meant:
they work with every operator. Modes (a default device, the exporter) are offered what the function calls.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.overrides import has_torch_function, has_torch_function_unary, has_torch_function_variadic

OURS: Final = "_ff_works_everywhere"
"""Attribute of tensor classes that need not be asked."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def overrides(value: Any) -> bool:
    """Whether the class of an argument wants torch's functions for itself."""
    kind = type(value)
    if kind in _PLAIN or hasattr(kind, OURS):
        return False
    function = getattr(kind, "__torch_function__", None)
    return function is not None and function is not torch._C._disabled_torch_function_impl


def asked(arguments: Iterable[Any]) -> bool:
    """``torch.overrides.has_torch_function``."""
    return any(overrides(value) for value in arguments)


def asked_variadic(*arguments: Any) -> bool:
    """``torch.overrides.has_torch_function_variadic``."""
    return asked(arguments)


def asked_unary(argument: Any) -> bool:
    """``torch.overrides.has_torch_function_unary``."""
    return overrides(argument)


QUESTIONS: Final[tuple[tuple[Any, Callable[..., bool]], ...]] = (
    (has_torch_function, asked),
    (has_torch_function_unary, asked_unary),
    (has_torch_function_variadic, asked_variadic),
)


def in_place_of(function: Any) -> Callable[..., bool] | None:
    """What rewritten code calls for ``function`` if that is one of the questions; compilers can trace it."""
    for question, ours in QUESTIONS:
        if function is question:
            return ours
    return None
