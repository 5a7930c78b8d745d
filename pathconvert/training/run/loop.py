"""The training loop: epochs of steps, with validation and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torchmetrics import MeanMetric

from pathconvert.errors import CheckpointError, DataError, TrainingError
from pathconvert.networks.saving import save_trained
from pathconvert.training.data.augmentation import Transform
from pathconvert.training.data.batches import Batches, epoch_batches
from pathconvert.training.data.labelled import Data
from pathconvert.training.run.failures import explained
from pathconvert.training.run.folder import RunFolder
from pathconvert.training.run.learner import Learner
from pathconvert.training.run.metrics import EvaluationReport, evaluate
from pathconvert.training.run.position import Position, Progress, Result
from pathconvert.training.run.preparation import Prepared
from pathconvert.training.settings import Settings


class Run:
    """A training run.

    Args:
        prepared: the network, which is trained in place.
        data: the labelled images.
        settings: the run's settings.
        folder: where the run's files go.
        fabric: from ``make_fabric``, launched.

    Attributes:
        position: how far the run has come.
        learner: the network with its optimizer, schedule and average.
        steps_per_epoch, total_steps: number of steps of an epoch, and of the run.

    Raises:
        DataError: there are fewer training images than one batch needs.
        RecordError: G-SGD is asked for, and the network carries no record of its conversion.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: Data,
        settings: Settings,
        folder: RunFolder,
        fabric: Fabric,
    ) -> None:
        self.prepared, self.data, self.settings = prepared, data, settings
        self.folder, self.fabric = folder, fabric
        self.position = Position()
        self.steps_per_epoch = math.ceil(len(self._training_batches()) / settings.accumulate)
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.learner = Learner(prepared, settings, fabric, self.total_steps)

    # ---- resuming and saving ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The content of ``last.ckpt``.

        It has no state of random generators: random numbers follow from the seed and the position.
        """
        position = dataclasses.asdict(self.position)
        return self.learner.state() | {"position": position, "data": self.data.digest}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which :meth:`state` gave.

        Raises:
            DataError: the data set is not the one that the run began with.
        """
        if state["data"] != self.data.digest:
            raise DataError(
                f"{self.data.name} is not the data set that the run began with: "
                "classes, images or names changed",
                "Restore the data set, or begin a new run from the best network of this one.",
            )
        self.learner.load_state(state)
        self.position = Position.from_state(state["position"])

    def _save(self) -> None:
        """Write ``last.ckpt``, in the first of several processes; the others wait for it."""
        if self.fabric.is_global_zero:
            self.folder.save(self.state())
        self.fabric.barrier()

    def write_initial(self) -> None:
        """Write the network ``initial``, from which a resumed run builds its own."""
        if self.fabric.is_global_zero:
            self._write_network("initial", self.learner.raw, None)
        self.fabric.barrier()

    def _write_network(self, name: str, model: nn.Module, row: Mapping[str, Any] | None) -> None:
        """Write a network of the run into its folder.

        Args:
            name: ``initial`` or ``best``.
            model: the network.
            row: what was measured after its epoch; None before the first.
        """
        save_trained(
            model,
            self.prepared.network,
            self.folder.network(name, self.prepared.form),
            preprocessing=self.prepared.preprocessing,
            labels=self.prepared.labels,
            training={
                "settings": self.settings.model_dump(),
                "data_sha256": self.data.digest,
                "head": list(self.prepared.head),
                "measured": dict(row) if row else None,
            },
        )

    # ---- training --------------------------------------------------------------------------------

    def train(self, progress: Progress | None = None) -> Result:
        """Train from the run's position to its end.

        Args:
            progress: is told about every batch and every epoch.

        Raises:
            TrainingError: the loss or the outputs are not finite (exit code 1), memory is short, or
                a batch is too small for BatchNorm.
            CheckpointError: an image cannot be read.
            OutputError: a file of the run cannot be written; the last checkpoint stays.
        """
        with explained(self.settings.batch_size):
            while self.position.step < self.total_steps or self.position.images:
                self._epoch(progress)
        best = max(self.position.history, key=_quality)
        return Result(self.position.history, best, self.learner.shortened)

    def _epoch(self, progress: Progress | None) -> None:
        """The rest of an epoch, with checkpoints on the way, and what follows an epoch."""
        s, p = self.settings, self.position
        self.learner.train_mode()
        loader = self._training_batches(p.batch) if p.step < self.total_steps else ()
        total = p.batch + len(loader)
        begun = saved = time.perf_counter()
        before = p.seconds
        for images, labels in loader:
            p.batch += 1
            last = p.batch % s.accumulate == 0 or p.batch == total
            parts = min(s.accumulate, total - (p.batch - 1) // s.accumulate * s.accumulate)
            loss, correct = self._batch(images, labels, parts, last=last)
            p.loss_sum += loss * len(labels)
            p.correct += correct
            p.images += len(labels)
            p.seconds = before + time.perf_counter() - begun
            if progress:
                means = p.loss_sum / p.images, p.correct / p.images
                progress.step(p.epoch, p.batch, total, *means, len(labels))
            if last and p.step >= self.total_steps:
                break
            overdue = time.perf_counter() - saved > 60 * s.checkpoint_minutes
            if last and overdue and p.batch < total:
                self._require_finite(images)
                self._save()
                saved = time.perf_counter()
        self._end_of_epoch(progress)

    def _batch(
        self, images: Tensor, labels: Tensor, parts: int, *, last: bool
    ) -> tuple[float, int]:
        """Train on one batch, and take a step if it is the last of the ``parts`` batches of a step.

        Returns:
            The batch's loss, and how many of its images were classified correctly.

        Raises:
            TrainingError: the loss is not finite.
        """
        p = self.position
        # random numbers follow from the position alone, so that a resumed run draws the same
        place = (self.settings.seed, p.epoch, p.batch, self.fabric.global_rank)
        seed = hash(place) % 2**63
        loss, correct = self.learner.backward(images, labels, seed=seed, parts=parts, last=last)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} in epoch {p.epoch + 1}, batch {p.batch}")
        if last:
            rate = self.learner.step()
            p.step += 1
            self.fabric.log_dict({"step/loss": loss, "step/lr": rate}, step=p.step)
        return loss, correct

    def _end_of_epoch(self, progress: Progress | None) -> None:
        """Validate, and write what was measured, the best network and a checkpoint."""
        p = self.position
        try:
            report = self.validate()
        except CheckpointError:  # save the finished epoch before an unreadable image ends the run
            if self.fabric.is_global_zero:
                self.folder.save(self.state())
            raise
        row = self._measured(report)
        p.history.append(row)
        self.fabric.log_dict({f"epoch/{name}": value for name, value in row.items()}, step=p.step)
        is_best = p.best is None or _quality(row) > p.best
        if is_best:
            p.best = _quality(row)
        p.begin_next_epoch()
        if self.fabric.is_global_zero:
            if is_best:
                self._write_network("best", self.learner.kept, row)
            self.folder.write_history(p.history)
        self._save()
        if progress:
            progress.epoch(row)

    def _measured(self, report: EvaluationReport) -> dict[str, Any]:
        """The row of ``metrics.csv`` for an epoch that ended with the validation ``report``."""
        p = self.position
        loss, accuracy = self._over_processes(p.loss_sum / p.images, p.correct / p.images)
        row: dict[str, Any] = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "lr": self.learner.rate,
            "train_loss": loss,
            "train_top1": accuracy,
            "val_loss": report.loss,
            "val_top1": report.top1,
            "val_top5": report.top5,
            "images_per_second": p.images * self.fabric.world_size / p.seconds,
        }
        shortened = self.learner.shortened
        return row if shortened is None else row | {"shortened": shortened}

    def _over_processes(self, *values: float) -> list[float]:
        """The mean of each value over all processes."""
        found = []
        for value in values:
            metric = MeanMetric().to(self.fabric.device)
            metric.update(value)
            found.append(float(metric.compute()))
        return found

    # ---- batches and outputs ---------------------------------------------------------------------

    def _training_batches(self, start: int = 0) -> Batches:
        """This process's batches of the current epoch, from batch ``start`` on."""
        s = self.settings
        return epoch_batches(
            self.data.train,
            Transform(self.prepared.preprocessing, s.augment),
            batch_size=s.batch_size // self.fabric.world_size,
            epoch=self.position.epoch,
            start_batch=start,
            seed=s.seed,
            shuffle=True,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=self._workers(),
            drop_last=len(self.data.train) >= s.batch_size,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def _held_out_batches(self) -> Batches:
        """This process's batches of the held-out images."""
        s = self.settings
        return epoch_batches(
            self.data.val,
            Transform(self.prepared.preprocessing),
            batch_size=max(1, s.batch_size // self.fabric.world_size),
            epoch=0,
            seed=s.seed,
            shuffle=False,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=self._workers(),
            drop_last=False,
        )

    def _workers(self) -> int:
        """Processes that read images."""
        if self.settings.workers is not None:
            return self.settings.workers
        return 4 if self.fabric.device.type == "cuda" else 0

    def validate(self) -> EvaluationReport:
        """Evaluate the network, or its average where one is kept, on the held-out images.

        Raises:
            TrainingError: its outputs are not finite.
        """
        model = self.learner.kept.eval()
        when = f"on held-out images are no longer finite after epoch {self.position.epoch + 1}"

        def classify(images: Tensor) -> Tensor:
            return self._finite_scores(model, images, f"outputs {when}")

        return evaluate(classify, self._held_out_batches(), num_classes=len(self.prepared.labels))

    @torch.no_grad()
    def _require_finite(self, images: Tensor) -> None:
        """Check before a checkpoint is written that training can continue from it.

        Raises:
            TrainingError: outputs for ``images`` are not finite.
        """
        p = self.position
        when = f"after epoch {p.epoch + 1}, batch {p.batch}"
        model = self.learner.raw.eval()
        self._finite_scores(model, images, f"outputs are no longer finite {when}")
        self.learner.train_mode()

    def _finite_scores(self, model: nn.Module, images: Tensor, otherwise: str) -> Tensor:
        """Class scores of a batch, float32 [N, classes].

        Raises:
            TrainingError: they are not finite; the message is ``otherwise``.
        """
        scores = self.learner.scores(model, images)
        if not bool(scores.isfinite().all()):
            raise self._diverged(otherwise)
        return scores

    def _diverged(self, what: str) -> TrainingError:
        """The error of a run that diverged; ``what`` says what is not finite."""
        tip = f"Try --lr {self.settings.lr / 3:.1g}, --warmup-steps 100, or --clip 1."
        stays = "the last checkpoint is unchanged"
        kept = stays if self.folder.has_checkpoint else "there is no checkpoint yet"
        return TrainingError(f"{what}; {kept}", tip, exit_code=1)


def _quality(row: Mapping[str, Any]) -> tuple[float, float]:
    """Top-1 and negative loss of a row: of two rows, the better one compares as larger."""
    return row["val_top1"], -row["val_loss"]
