"""Seeing what quantization did: coverage, noise, sensitivity, a report; names are loaded on first use."""

import importlib
from typing import Any

_NAMES = {
    "Coverage": "covering",
    "coverage": "covering",
    "sqnr": "metrics",
    "sensitivity": "sensitivities",
    "report": "reporting",
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
