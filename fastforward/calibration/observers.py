"""All observers under one name: ``ff.observers.MinMax`` and the others."""

from fastforward.calibration.error_grid import HalfQuadratic, MeanSquaredError
from fastforward.calibration.histogram import Histogram, HistogramObserver, Percentile
from fastforward.calibration.min_max import MeanMinMax, MinMax, MovingAverageMinMax
from fastforward.calibration.observer import BlockObserver, Observer
from fastforward.calibration.torchao_observers import (
    AffineQuantizedFixedQParamObserver,
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMSEObserver,
    AffineQuantizedObserverBase,
)

__all__ = [
    "AffineQuantizedFixedQParamObserver",
    "AffineQuantizedMSEObserver",
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedObserverBase",
    "BlockObserver",
    "HalfQuadratic",
    "Histogram",
    "HistogramObserver",
    "MeanMinMax",
    "MeanSquaredError",
    "MinMax",
    "MovingAverageMinMax",
    "Observer",
    "Percentile",
]
