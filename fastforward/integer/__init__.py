"""Integer execution: a simulated model becomes one whose layers multiply integers."""

import importlib
from typing import Any

_NAMES = {
    "convert": "convert",
    "explain": "explain",
    "supported": "explain",
    "export": "exporting",
    "IntegerLinear": "linear",
    "IntegerConv1d": "conv",
    "IntegerConv2d": "conv",
    "IntegerConv3d": "conv",
    "IntegerEmbedding": "embedding",
    "WeightOnlyLinear": "weight_only",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
