"""The words that refusals of files share, and the names from files that they quote."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pathconvert.errors import CheckpointError

EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file"
AGAIN = "Download or copy the file again, and compare its size with the original's."


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a :class:`CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {reason}.", "Check the file's permissions."
        ) from error


def quote(text: object, limit: int = 80) -> str:
    """A name from a file, safe to print on one line."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def listing(names: Iterable[object], limit: int = 5) -> str:
    """The first names, and how many more there are if some are left out."""
    shown = list(names)
    text = ", ".join(quote(name) for name in shown[:limit]) or "nothing"
    return text if len(shown) <= limit else f"{text} and {len(shown) - limit} more"
