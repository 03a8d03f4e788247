"""Calibration: observers and ranges, the recorded dataflow, and the steps that make rounding cost less.

Names are loaded on first use.
"""

import importlib
from typing import Any

_NAMES = {
    "RangeEstimation": "estimate",
    "estimate_ranges": "estimate",
    "track_ranges": "estimate",
    "Flow": "flow",
    "record_flow": "flow",
    "FlowRecorder": "recorder",
}
_SUBMODULES = ("observers",)

__all__ = sorted({*_NAMES, *_SUBMODULES})


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
