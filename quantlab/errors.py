"""The exceptions a person can meet.

Every message is one line that says what was wrong and what would be right; the command line prints
it on stderr and exits with code 2, the page shows it where the person is looking.
"""


class QuantLabError(Exception):
    """Root of everything QuantLab raises on purpose."""

    hint: str | None = None
    """What to try next, shown beside the message where there is one."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(QuantLabError, ValueError):
    """An argument or option has a value that cannot work."""


class ModelError(QuantLabError):
    """A model cannot be found, read or trusted."""


class TextError(QuantLabError):
    """A calibration or evaluation text cannot be found or is too short."""


class MethodError(QuantLabError):
    """A quantizer met weights or statistics it cannot handle."""


class StorageError(QuantLabError):
    """Results or artifacts cannot be written or read (for example a full disk)."""


class JobError(QuantLabError):
    """A comparison job cannot be queued, found or finished."""


class Cancelled(QuantLabError):
    """The person cancelled; what was finished is kept."""
