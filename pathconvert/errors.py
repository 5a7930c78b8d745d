"""Typed refusals: what is wrong, where, and what to do.

Every error that a user can cause derives from :class:`PathconvertError`. The command line prints
``str(error)`` as its first line and ``error.tip``, which may be empty, as its second; it exits with
``error.exit_code``.
"""


def first_line(error: BaseException, *, after: str = "") -> str:
    """The first line of an error's innermost cause; the name of its class if it has no text.

    Args:
        error: the error.
        after: the end of a preamble; the text up to its last occurrence is left out.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).rpartition(after)[2] if after else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def class_and_text(error: BaseException) -> str:
    """The class and the whole text of an error in one line, for errors of code that is not ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class PathconvertError(Exception):
    """Base of all refusals.

    Args:
        message: what is wrong and where, in one line.
        tip: what to do about it, in one line; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.tip = tip


class CheckpointError(PathconvertError):
    """A file that cannot be read, or whose content cannot be used as what it was given for."""


class OutputError(PathconvertError):
    """An output path that cannot be written, or that would overwrite something."""


class ArchitectureError(PathconvertError):
    """A network that is not known, is ambiguous, or does not fit its tensors."""


class TraceError(PathconvertError):
    """A module whose ``forward`` cannot be traced on shapes alone."""


class RefusedNetwork(PathconvertError):
    """A network with an activation that is not positively homogeneous."""


class RecordError(PathconvertError):
    """A conversion record that is missing, too new, or does not fit the tensors."""


class DataError(PathconvertError):
    """Labelled images that are missing, damaged, or inconsistent with one another."""


class TrainingError(PathconvertError):
    """A training run that cannot begin, or cannot continue.

    Args:
        message, tip: as for :class:`PathconvertError`.
        exit_code: 1 if the training itself failed, else 2.
    """

    def __init__(self, message: str, tip: str = "", exit_code: int = 2) -> None:
        super().__init__(message, tip)
        self.exit_code = exit_code


class RuntimeUnavailable(PathconvertError):
    """A device of ONNX Runtime that was requested and cannot be used here."""


class EquivalenceError(PathconvertError):
    """A comparison of two networks that should be equal and are not."""

    exit_code = 1
