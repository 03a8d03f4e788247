"""Autoquant: Python source in, quantized Python source out; knows no tensor's value."""

import importlib
from typing import Any

_SUBMODULES = ("optable", "patterns", "writer", "bind", "hook", "source", "rewrite", "recompile", "scope")

_NAMES = {
    "quantizable": "bind",
    "prepare": "bind",
    "quantize_imports": "hook",
    "autoquantize": "generate",
    "AutoQuantizedCode": "generate",
    "show_source": "show",
    "OperatorTable": "optable",
    "Operator": "optable",
    "PatternRule": "patterns",
}

__all__ = sorted([*_SUBMODULES, *_NAMES])


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
