"""The errors and the one warning class of FastForward.

Each message says what happened, where (file and line, or module path) and what to do.
"""


class FastForwardError(Exception):
    """Base of every error that FastForward raises on purpose."""


class QuantizationError(FastForwardError):
    """A model or tensor cannot be quantized as asked."""


class AutoquantError(FastForwardError):
    """Source code cannot be rewritten."""


class SourceMismatchError(AutoquantError):
    """The source found for a function is not the code that runs."""


class CalibrationError(FastForwardError):
    """Ranges cannot be estimated, or a quantizer is used before they were."""


class StateError(FastForwardError):
    """A quantization state file cannot be read or does not fit the model."""


class UnsupportedOperatorError(FastForwardError):
    """An operator has no form on this device or in this mode."""


class QuantizationWarning(UserWarning):
    """Something stays float or is not reached; says file and line, and the reason."""
