"""Calibration: observers and ranges, the recorded dataflow, and the steps that make rounding cost less.

Names are loaded on first use.
"""

from fastforward._lazy import lazy_names

_NAMES = {
    "RangeEstimation": "estimate",
    "estimate_ranges": "estimate",
    "track_ranges": "estimate",
    "Flow": "flow",
    "record_flow": "flow",
    "FlowRecorder": "recorder",
}
_SUBMODULES = ("observers",)

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _SUBMODULES)
