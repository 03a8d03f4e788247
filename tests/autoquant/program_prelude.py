"""What generated programs find ready: imports, helpers of every kind, and the base class of ``Net``."""

# ruff: noqa: F401

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.autoquant.programs import note

ACT: dict[str, Any] = {"relu": F.relu, "tanh": torch.tanh, "gelu": nn.GELU(), "own": lambda t: t * 2 + 1}


def wrapped(n: int) -> Callable[..., Any]:
    """A decorator that multiplies by ``n``."""

    def outer(f: Any) -> Any:
        @functools.wraps(f)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return f(*args, **kwargs) * n

        return inner

    return outer


def recursive(x: Any, n: int) -> Any:
    return x if n <= 0 else note("r", recursive(x * 0.5 + n, n - 1))


def pieces(x: Any, n: int) -> Iterator[Any]:
    for i in range(n):
        yield x * i + 1


def applied(f: Any, x: Any, *rest: Any, **more: Any) -> Any:
    return f(x, *rest, **more)


@contextlib.contextmanager
def scaled(x: Any, n: int) -> Iterator[Any]:
    note("in")
    try:
        yield x * n
    finally:
        note("out")


class Failed(Exception):
    """What programs raise."""


class Base(nn.Module):
    """Parameters, layers, a buffer, and what ``super()`` reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) * 0.5)
        self.bias = nn.Parameter(torch.randn(4))
        self.lin = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("seen", torch.zeros(4))

    def inherited(self, t: Any) -> Any:
        return t * self.bias + 1

    @property
    def doubled(self) -> Any:
        return self.weight * 2
