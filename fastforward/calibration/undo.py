"""Puts a model back as it was when a step after the first change fails."""

from collections.abc import Callable
from typing import Any

import torch


class Undo:
    """A list of what to take back, last first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def add(self, action: Callable[[], object]) -> None:
        """Take this back later."""
        self._actions.append(action)

    def keep_values(self, module: torch.nn.Module) -> None:
        """Remember the module's own parameters and buffers by value, and which there are."""
        for store in (module._parameters, module._buffers):
            self._keep_store(store)

    def _keep_store(self, store: dict[str, Any]) -> None:
        before = dict(store)
        values = {name: tensor.detach().clone() for name, tensor in store.items() if tensor is not None}

        def restore() -> None:
            store.clear()
            store.update(before)
            with torch.no_grad():
                for name, value in values.items():
                    tensor = store[name]
                    assert tensor is not None
                    tensor.copy_(value)

        self.add(restore)

    def roll_back(self) -> None:
        """Take everything back."""
        while self._actions:
            self._actions.pop()()
