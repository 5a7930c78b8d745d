"""The folder of a run, and what is in it::

    config.yaml                   the resolved settings; the form that --config reads
    initial.path.safetensors      the network that training began with (initial.safetensors without a conversion)
    last.ckpt                     all that --resume needs: weights, optimizer, average, schedule, position, history
    best.path.safetensors         the network with the best validation so far (best.safetensors without a conversion)
    metrics.csv, curves.png       what was measured, an epoch a line
    tensorboard/                  the same for TensorBoard, and the loss and rate of the steps

All files are written whole or not at all. ``last.ckpt`` is a versioned format of its own.
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
from pathconvert.version import __version__

#: 2: G-SGD's momentum is divided by the gauge of the row.
FORMAT_VERSION = 2
CONFIG, LAST, METRICS, CURVES = "config.yaml", "last.ckpt", "metrics.csv", "curves.png"


class RunFolder:
    """A run's folder.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path, *, force: bool) -> RunFolder:
        """A new folder for a run.

        Raises:
            OutputError: it cannot be made, or holds something already (without ``force``).
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            used = any(path.iterdir())
        except OSError as error:
            raise OutputError(f"The folder {path} cannot be made: {error.strerror}.", "Give another.") from error
        if used and not force:
            raise OutputError(
                f"{path} holds something already.",
                "Give another --output-dir, --resume it, or --force.",
            )
        folder = RunFolder(path)
        networks = (folder.network(name, form) for name in ("initial", "best") for form in ("plain", "path"))
        for file in (*(path / name for name in (CONFIG, LAST, METRICS, CURVES)), *networks):
            file.unlink(missing_ok=True)  # nothing of an earlier run passes for this one's
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        """The folder of a run that began.

        Raises:
            CheckpointError: it is none.
        """
        if not (path / CONFIG).is_file():
            what = "has no config.yaml, so that no run began there" if path.is_dir() else "is no folder"
            raise CheckpointError(f"{path} {what}", "Give the folder that finetune wrote (--output-dir).")
        return RunFolder(path)

    def network(self, name: str, form: str) -> Path:
        """Where ``initial`` or ``best`` is."""
        return self.path / (f"{name}.safetensors" if form == "plain" else f"{name}.path.safetensors")

    def write_text(self, name: str, text: str) -> None:
        """A text file."""
        self._write(name, lambda path: path.write_text(text))

    def write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """``metrics.csv`` and ``curves.png``."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
        self.write_text(METRICS, text.getvalue())
        self._write(CURVES, lambda path: _plot(path, history))

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a ``last.ckpt``."""
        return (self.path / LAST).exists()

    def save(self, state: Mapping[str, Any]) -> None:
        """``last.ckpt``."""
        stored = {"format_version": FORMAT_VERSION, "tool": f"pathconvert {__version__}"} | dict(state)

        def write(path: Path) -> None:
            with path.open("wb") as file:  # a file of Python's keeps the system's error
                torch.save(stored, file)

        self._write(LAST, write, state["model"])

    def load(self) -> dict[str, Any] | None:
        """``last.ckpt``; None where the run ended before it was written.

        Raises:
            CheckpointError: it is damaged, or of another format.
        """
        path = self.path / LAST
        if not self.has_checkpoint:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the file makes it stumble upon
            raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
        if state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {state.get('format_version')}; this is pathconvert {__version__}, which "
                f"reads version {FORMAT_VERSION}",
                f"Resume with the version that wrote it: {state.get('tool', 'unknown')}.",
            )
        return state

    def _write(self, name: str, write: Callable[[Path], object], tensors: Mapping[str, Tensor] | None = None) -> None:
        path = prepare_output(self.path / name, force=True, source=None, suffixes=(Path(name).suffix,))
        write_atomically(path, tensors or {}, write, lambda _: None, force=True)


def default_folder(source: str) -> Path:
    """``runs/<stem>-<time>``."""
    stem = Path(source).name
    for suffix in (".safetensors", ".pth", ".pt", ".path", ".path-bn"):
        stem = stem.removesuffix(suffix)
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _plot(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and accuracy over the epochs."""
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
