"""The question of torch's functions whether an argument overrides them, as rewritten code asks it.

``torch.nn.functional.multi_head_attention_forward`` hands itself to a tensor subclass that it is given, and so leaves
the rewritten code for the one it was made from. Tensors of our own are not meant: they work with every operator.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch.overrides import has_torch_function, has_torch_function_unary, has_torch_function_variadic

OURS: Final = "_ff_works_everywhere"
"""Attribute of tensor classes that need not be asked."""


def _asked(arguments: Iterable[Any]) -> bool:
    return has_torch_function([value for value in arguments if not hasattr(type(value), OURS)])


def _asked_variadic(*arguments: Any) -> bool:
    return _asked(arguments)


def _asked_unary(argument: Any) -> bool:
    return _asked((argument,))


QUESTIONS: Final[tuple[tuple[Any, Callable[..., bool]], ...]] = (
    (has_torch_function, _asked),
    (has_torch_function_unary, _asked_unary),
    (has_torch_function_variadic, _asked_variadic),
)


def in_place_of(function: Any) -> Callable[..., bool] | None:
    """What rewritten code calls for ``function`` if that is one of the questions; compilers can trace it."""
    for question, ours in QUESTIONS:
        if function is question:
            return ours
    return None
