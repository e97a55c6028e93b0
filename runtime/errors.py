"""The errors a user can meet, each with the exit code its command ends with."""


class OutriderError(Exception):
    """Root of every error that outrider raises on purpose; printed as one line, no traceback."""

    exit_code = 1


class UsageError(OutriderError, ValueError):
    """An option or request field is out of range, unknown or contradictory."""

    exit_code = 2


class InvalidDataError(OutriderError):
    """Weights, a store, a trace or a predictor are missing, damaged or of the wrong shape."""

    exit_code = 3


class UnsupportedModelError(InvalidDataError):
    """The model's family or encoding cannot be run; the message gives the reason."""


class InsufficientMemoryError(OutriderError):
    """A budget or allocation does not fit; the message gives both sizes."""

    exit_code = 4


class TransferError(OutriderError):
    """An expert's weights could not be read into their slot."""


class DeviceLostError(OutriderError):
    """The device's context is lost: whatever runs on it has failed, and nothing can go on."""


class FieldError(UsageError):
    """One option or request field is out of range; `field` is its name, as the wire reports it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
