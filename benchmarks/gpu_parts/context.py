"""What a part is told, and where it keeps what it measured."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run may be stopped at any moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


@dataclass
class Context:
    """A part's surroundings; the part runs in a process of its own.

    Attributes:
        device: ``cuda`` or, in a rehearsal, ``cpu``.
        rehearse: run the same code at toy size.
        data: the folder with the images and weights; they may be anywhere in it.
        work: a folder for files that a ``prepare`` leaves for its ``measure``.
        into: where the results are written after every :meth:`keep`.
        deadline: of :func:`time.monotonic`; the part is stopped then.
        results: what was kept so far.
    """

    device: str
    rehearse: bool
    data: Path
    work: Path
    into: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Keep a result, so that it is there whatever happens next."""
        self.results[name] = value
        write_json(self.into, self.results)

    def seconds_left(self) -> float:
        """Until the part is stopped."""
        return self.deadline - time.monotonic()

    def size(self, real: T, toy: T) -> T:
        """``toy`` in a rehearsal."""
        return toy if self.rehearse else real

    def file(self, name: str) -> Path | None:
        """The file of that name anywhere in the data folder, or None.

        Raises:
            FileNotFoundError: the file is missing. A rehearsal uses made-up data instead and does
                not raise.
        """
        found = next(self.data.rglob(name), None) if self.data.is_dir() else None
        if found is None and not self.rehearse:
            raise FileNotFoundError(
                f"{self.data} holds no {name}: name the folder that does with --data DIR"
            )
        return found
