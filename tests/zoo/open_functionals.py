"""Letting a torch-function mode look inside the Python functions of ``torch.nn.functional``.

Each of them first asks whether a mode wants the call as a whole. For an operator of the table that is what a mode should see.
For the others, which are rewritten, the products inside would go unseen, and the original would run in place of the copy.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from fastforward.autoquant.optable import default_table

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _asked(original: Callable[..., bool], spread: Callable[..., Iterable[Any]]) -> Callable[..., bool]:
    def has_torch_function(*arguments: Any) -> bool:
        asking = sys._getframe(1)
        row = default_table().find_name(f"{asking.f_globals['__name__']}.{asking.f_code.co_name}")
        if row is not None and not row.decompose:
            return original(*arguments)
        return any(
            isinstance(argument, torch.Tensor) and type(argument) not in _PLAIN for argument in spread(*arguments)
        )

    return has_torch_function


@contextlib.contextmanager
def open_functionals() -> Iterator[None]:
    """Within the context, modes are offered those functionals as a whole that are operators of the table."""
    replaced = {
        "has_torch_function": _asked(torch.overrides.has_torch_function, lambda arguments: arguments),
        "has_torch_function_unary": _asked(torch.overrides.has_torch_function_unary, lambda argument: (argument,)),
        "has_torch_function_variadic": _asked(
            torch.overrides.has_torch_function_variadic, lambda *arguments: arguments
        ),
    }
    with mock.patch.dict(vars(torch.nn.functional), replaced), mock.patch.dict(vars(torch.functional), replaced):
        yield
