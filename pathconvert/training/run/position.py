"""How far a run has come, what it tells while it trains, and what it returns at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Progress(Protocol):
    """What wants to be told while the loop runs."""

    def step(
        self, epoch: int, done: int, total: int, loss: float, accuracy: float, images: int
    ) -> None:
        """Called after every batch.

        Args:
            epoch: number of the epoch, from 0.
            done, total: batches of the epoch that are done, and all of them.
            loss, accuracy: averages over the epoch so far.
            images: number of images in this batch.
        """

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called after every epoch, with what was measured."""


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds besides the state of weights and optimizer.

    Attributes:
        epoch, batch, step: finished epochs, batches of the current epoch, and steps.
        loss_sum, correct, images, seconds: sums over the current epoch, in this process.
        best: top-1 and negative loss of the best validation; None before the first.
        history: what was measured, one row per epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0
    best: tuple[float, float] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Position:
        """The position that a checkpoint holds, as :func:`dataclasses.asdict` wrote it."""
        best = state["best"]
        return Position(**{**state, "best": None if best is None else tuple(best)})

    def begin_next_epoch(self) -> None:
        """Count the current epoch as finished, and reset what was summed over it."""
        self.epoch += 1
        self.batch, self.correct, self.images = 0, 0, 0
        self.loss_sum = self.seconds = 0.0


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        history: what was measured, one row per epoch.
        best: the row of the epoch with the best validation.
        shortened: number of steps of chains that were shortened; None for other optimizers than
            G-SGD.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    shortened: int | None
