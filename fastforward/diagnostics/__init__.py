"""Seeing what quantization did: coverage, noise, sensitivity, a report; names are loaded on first use."""

from fastforward._lazy import lazy_names

_NAMES = {
    "Coverage": "covering",
    "coverage": "covering",
    "sqnr": "metrics",
    "sensitivity": "sensitivities",
    "report": "reporting",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
