"""Errors that users meet.  Every message names the thing, the values that disagree and the way out.

All derive from `JaxqError` (a `ValueError`), so that a caller can catch the library's own refusals
without catching programming errors; the command line prints them in one line and exits with code 2.
"""


class JaxqError(ValueError):
    """Base of every error the library raises on purpose."""


class SpecError(JaxqError):
    """A quantization spec, method or recipe is contradictory or does not fit a tensor."""


class ModelError(JaxqError):
    """A folder is not a model, the architecture is unknown, or weights do not fit the model."""


class CheckpointError(JaxqError):
    """A checkpoint is damaged, incomplete or of another kind than expected."""


class CalibrationError(JaxqError):
    """Calibration data is empty, malformed or does not belong to the model."""


class NonFiniteError(JaxqError):
    """A weight, an activation or a statistic is NaN or infinite."""


class OutputError(JaxqError):
    """An output folder cannot be used: not empty, not writable, no room."""


class ResourceError(JaxqError):
    """A run needs more memory than the device or the host has."""


class ProcessError(JaxqError):
    """Another process of the same run failed, is missing, or was started differently."""
