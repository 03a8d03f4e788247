"""Modules whose float32 and integer buffers get their shape from data, and keep their type."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LazyBuffers(torch.nn.Module):
    """Base of quantizers and observers.

    Loading a state adopts the saved shapes, because a fresh instance has empty buffers. Moving or casting the module
    moves the buffers and leaves their type alone: a scale in half precision would be another scale.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LazyBuffers":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, current in (*self._buffers.items(), *self._parameters.items()):
            saved = state_dict.get(prefix + name)
            if current is None or not isinstance(saved, Tensor) or saved.shape == current.shape:
                continue
            blank = torch.empty(saved.shape, dtype=current.dtype, device=current.device)
            setattr(self, name, torch.nn.Parameter(blank) if name in self._parameters else blank)
        super()._load_from_state_dict(state_dict, prefix, *args)
