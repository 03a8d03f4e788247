"""Where Triton kernels run in tests: on the GPU if there is one, in Triton's interpreter otherwise.

Expected results always come from the reference on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` with the tensors of its arguments on the device; return its results on the CPU."""
    return moved(function(*(moved(argument, DEVICE) for argument in arguments)), torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """Return ``value`` with every tensor in it, at any depth of lists and tuples, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        items = [moved(item, device) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
