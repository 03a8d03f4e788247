"""Calibration: observers, ranges, dataflow."""

from fastforward.calibration.estimate import RangeEstimation, estimate_ranges, track_ranges

__all__ = ["RangeEstimation", "estimate_ranges", "track_ranges"]
