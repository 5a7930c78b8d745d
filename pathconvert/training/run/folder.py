"""The folder of a run, which holds::

    config.yaml                the run's settings, in the format that --config reads
    initial.path.safetensors   the network that training began with
    last.ckpt                  what --resume needs: weights, optimizer, average, schedule,
                               position, history
    best.path.safetensors      the network with the best validation so far
    metrics.csv, curves.png    the measurements of every epoch
    tensorboard/               the same for TensorBoard, and loss and learning rate of every step

The two networks are named ``initial.safetensors`` and ``best.safetensors`` if they are not
converted. All files are written atomically. ``last.ckpt`` has its own, versioned format.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathconvert.errors import CheckpointError, OutputError
from pathconvert.files.writing import prepare_output, write_atomically
from pathconvert.formats import require_format
from pathconvert.version import __version__

#: The format of ``last.ckpt``. In version 2, G-SGD's momentum is divided by the gauge of the row.
FORMAT_VERSION = 2
CONFIG, LAST, METRICS, CURVES = "config.yaml", "last.ckpt", "metrics.csv", "curves.png"


class RunFolder:
    """A run's folder.

    Args:
        path: where the folder is, or is to be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path, *, force: bool) -> RunFolder:
        """Make a folder for a new run, or clear the files of an earlier run from it.

        Args:
            path: the folder.
            force: take a folder that holds something.

        Raises:
            OutputError: the folder cannot be made, or holds something and ``force`` is not set.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            used = any(path.iterdir())
        except OSError as error:
            raise OutputError(
                f"The folder {path} cannot be made: {error.strerror}.", "Give another --output-dir."
            ) from error
        if used and not force:
            raise OutputError(
                f"The folder {path} is not empty.",
                f"Give another --output-dir; resume the run in it with --resume {path}; or"
                " overwrite it with --force.",
            )
        folder = RunFolder(path)
        networks = (
            folder.network(name, form) for name in ("initial", "best") for form in ("plain", "path")
        )
        for file in (*(path / name for name in (CONFIG, LAST, METRICS, CURVES)), *networks):
            # so that no file of an earlier run is taken for one of this run
            file.unlink(missing_ok=True)
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open the folder of a run that has begun.

        Raises:
            CheckpointError: the folder is missing, or no run has begun in it.
        """
        if not (path / CONFIG).is_file():
            what = (
                "has no config.yaml, so no run began there" if path.is_dir() else "is not a folder"
            )
            raise CheckpointError(
                f"{path} {what}", "Give the folder that finetune wrote to (its --output-dir)."
            )
        return RunFolder(path)

    def network(self, name: str, form: str) -> Path:
        """The path of a network of the run.

        Args:
            name: ``initial`` or ``best``.
            form: ``plain``, ``path`` or ``path-bn``.
        """
        return self.path / (
            f"{name}.safetensors" if form == "plain" else f"{name}.path.safetensors"
        )

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the folder."""
        self._write(name, lambda path: path.write_text(text))

    def write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``metrics.csv`` and ``curves.png``, from one row per epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
        self.write_text(METRICS, text.getvalue())
        self._write(CURVES, lambda path: _plot(path, history))

    @property
    def has_checkpoint(self) -> bool:
        """Whether the folder holds a ``last.ckpt``."""
        return (self.path / LAST).exists()

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``last.ckpt``.

        Args:
            state: plain values and tensors; those of the network under ``model``.

        Raises:
            OutputError: the file cannot be written; an earlier one stays.
        """
        stored = {"format_version": FORMAT_VERSION, "tool": f"pathconvert {__version__}"} | dict(
            state
        )

        def write(path: Path) -> None:
            # given a path, torch.save hides the system's error; given a file, it does not
            with path.open("wb") as file:
                torch.save(stored, file)

        self._write(LAST, write, state["model"])

    def load(self) -> dict[str, Any] | None:
        """Read ``last.ckpt``; None where the run ended before it was written.

        Raises:
            CheckpointError: the file is damaged, or has another format version.
        """
        path = self.path / LAST
        if not self.has_checkpoint:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for damaged files
            raise CheckpointError(
                f"{path} is damaged: {' '.join(str(error).split())[:200]}",
                "Begin a new run, from the best network of this one if there is one.",
            ) from error
        require_format(state, FORMAT_VERSION, f"{path} has", CheckpointError)
        return state

    def _write(
        self,
        name: str,
        write: Callable[[Path], object],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        path = prepare_output(
            self.path / name, force=True, source=None, suffixes=(Path(name).suffix,)
        )
        write_atomically(path, tensors or {}, write, lambda _: None, force=True)


def default_folder(source: str) -> Path:
    """The folder of a run that was given none: ``runs/<stem of the source>-<time>``."""
    stem = Path(source).name
    for suffix in (".safetensors", ".pth", ".pt", ".path", ".path-bn"):
        stem = stem.removesuffix(suffix)
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _plot(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss and accuracy over the epochs, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axis, what, unit in ((left, "loss", "nats"), (right, "top1", "share of images")):
        for part in ("train", "val"):
            axis.plot(epochs, [row[f"{part}_{what}"] for row in history], marker=".", label=part)
        axis.set(xlabel="epoch", ylabel=f"{what} ({unit})")
        axis.legend()
    figure.savefig(path, format="png", dpi=120)
