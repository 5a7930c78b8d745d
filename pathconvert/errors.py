"""Typed refusals: what is wrong, where, and what to do.

Every error that a user can cause derives from :class:`PathconvertError`. ``str(error)`` is the first line
that the command line prints; ``error.tip`` (may be empty) is the second one. ``exit_code`` is the process's.
"""


def first_line(error: BaseException) -> str:
    """The innermost cause in one line; its class where it has no words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PathconvertError(Exception):
    """Base of all refusals.

    Args:
        message: what is wrong and where, one line.
        tip: what to do about it, one line; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.tip = tip


class CheckpointError(PathconvertError):
    """A file that cannot be read as a checkpoint, or whose tensors are no usable weights."""


class OutputError(PathconvertError):
    """An output path that cannot be written, or that would overwrite something."""


class ArchitectureError(PathconvertError):
    """A network that is not known, not unique, or does not fit its tensors."""


class TraceError(PathconvertError):
    """A module whose forward cannot be followed on shapes alone."""


class RefusedNetwork(PathconvertError):
    """A network with an activation that is not positively homogeneous."""


class RecordError(PathconvertError):
    """A conversion record that is missing, too new, or does not fit the tensors."""


class DataError(PathconvertError):
    """Labelled images that are missing, damaged, or do not go together."""


class TrainingError(PathconvertError):
    """A run that cannot begin here, or cannot go on.

    Args:
        message, tip: as of :class:`PathconvertError`.
        exit_code: 1 where training itself went wrong.
    """

    def __init__(self, message: str, tip: str = "", exit_code: int = 2) -> None:
        super().__init__(message, tip)
        self.exit_code = exit_code


class RuntimeUnavailable(PathconvertError):
    """A device of ONNX Runtime that was asked for and cannot be used here."""


class EquivalenceError(PathconvertError):
    """A check of equality that failed."""

    exit_code = 1
