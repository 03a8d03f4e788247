"""What one model of the zoo is: how to build it with random weights, and what to feed it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: ``source/model``, unique.
        family: What it stands for; the zoo counts families.
        build: Makes the model; weights are random.
        inputs: Makes ``(args, kwargs)`` for evaluation.
        train_inputs: The same for training mode, where a model wants something else (targets, a larger batch).
        ci: Part of the spread that every test run takes.
        why_not_train: Reason why training mode is not checked.
        multiplies: Whether it multiplies and accumulates at all.
        outside: Floating operators known to run outside any site; ``why_outside`` says why that is right.
    """

    name: str
    family: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], Inputs]
    train_inputs: Callable[[], Inputs] | None = None
    ci: bool = False
    why_not_train: str = ""
    multiplies: bool = True
    outside: int = 0
    why_outside: str = ""

    def make(self, seed: int = 0) -> torch.nn.Module:
        """The model in evaluation mode, the same weights for the same seed."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build().eval()

    def arguments(self, training: bool = False, seed: int = 1) -> Inputs:
        """Inputs, the same for the same seed."""
        torch.manual_seed(seed)
        return self.train_inputs() if training and self.train_inputs is not None else self.inputs()


@dataclass
class Registry:
    """The zoo's models by name."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Add a model.

        Raises:
            ValueError: The name is taken.
        """
        if entry.name in self.entries:
            msg = f"the zoo has a model called {entry.name!r} already"
            raise ValueError(msg)
        self.entries[entry.name] = entry


def image(size: int = 64, batch: int = 1, channels: int = 3) -> Callable[[], Inputs]:
    """Random images, float32 ``[batch, channels, size, size]``."""
    return lambda: ((torch.randn(batch, channels, size, size),), {})
