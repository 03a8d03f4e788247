"""Autoquant: Python source in, quantized Python source out; knows no tensor's value."""

from fastforward._lazy import lazy_names

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

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _SUBMODULES)
