"""The words that refusals of files share, and the names from files that they quote."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pathconvert.errors import CheckpointError, first_line

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file"
EXPORT_AGAIN = "Give the PyTorch checkpoint that it was exported from."
AGAIN = "Download or copy the file again, and compare its size with the original's."


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the file.

    Raises:
        CheckpointError: the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {why}.", "Check the file's permissions."
        ) from error


def one_line(text: str, limit: int = 160) -> str:
    """Text that may quote a file: printable, on one line, and of limited length."""
    line = "".join(c if c.isprintable() else "?" for c in text).rstrip(".")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def reason(error: BaseException) -> str:
    """The first line of an error, which may quote the file, as :func:`one_line` gives it."""
    return one_line(first_line(error))


def quote(text: object, limit: int = 80) -> str:
    """A name from a file, safe to print on one line."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def listing(names: Iterable[object], limit: int = 5) -> str:
    """The first names, and how many more there are if some are left out."""
    shown = list(names)
    text = ", ".join(quote(name) for name in shown[:limit]) or "nothing"
    return text if len(shown) <= limit else f"{text} and {len(shown) - limit} more"
