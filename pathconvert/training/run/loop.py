"""The training loop: epochs of steps, with validation and checkpoints from which an interrupted run can resume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from pathconvert.errors import CheckpointError, DataError, PathconvertError, TrainingError
from pathconvert.networks.saving import save_trained
from pathconvert.training.data.augmentation import Transform
from pathconvert.training.data.batches import Batches, batches
from pathconvert.training.data.labelled import Data
from pathconvert.training.optimizer.choice import make_optimizer, make_schedule
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.run.folder import RunFolder
from pathconvert.training.run.metrics import EvaluationReport, evaluate
from pathconvert.training.run.position import Position, Progress, Result
from pathconvert.training.run.preparation import Prepared
from pathconvert.training.run.sync_batch_norm import synchronise_batch_norms
from pathconvert.training.settings import Settings

#: Weight of an auxiliary classifier's loss (GoogLeNet, section 5).
AUXILIARY = 0.3


class Run:
    """A training run.

    Args:
        prepared: the network, which is trained in place.
        data: the labelled images.
        settings: the run's settings.
        folder: where the run's files go.
        fabric: from ``make_fabric``, launched.

    Raises:
        DataError: there are fewer training images than one batch needs.
        RecordError: G-SGD is asked for, and the network carries no record of its conversion.
    """

    def __init__(self, prepared: Prepared, data: Data, settings: Settings, folder: RunFolder, fabric: Fabric) -> None:
        self.prepared, self.data, self.settings, self.folder, self.fabric = prepared, data, settings, folder, fabric
        self.position = Position()
        self.raw = prepared.model
        if settings.freeze_backbone:
            for name, parameter in self.raw.named_parameters():
                parameter.requires_grad_(name in prepared.head)
        if fabric.world_size > 1:
            self.raw = synchronise_batch_norms(self.raw, fabric.device)
        if settings.channels_last:
            self.raw = self.raw.to(memory_format=torch.channels_last)
        self.raw.to(fabric.device)
        input_size = prepared.network.architecture.input_size
        assert input_size is not None
        self.raw_optimizer = make_optimizer(self.raw, settings, input_size)
        compiled = cast(nn.Module, torch.compile(self.raw)) if settings.compile else self.raw
        self.model, self.optimizer = fabric.setup(compiled, self.raw_optimizer)
        self.steps_an_epoch = math.ceil(len(self._batches(0)) / settings.accumulate)
        self.total_steps = settings.steps or settings.epochs * self.steps_an_epoch
        self.schedule = make_schedule(self.raw_optimizer, settings, self.total_steps)
        self.average = None
        if settings.ema is not None:
            self.average = AveragedModel(self.raw, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.mixup = v2.MixUp(alpha=settings.mixup, num_classes=len(prepared.labels)) if settings.mixup else None

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of fp16's gradients; None with other precisions."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The content of ``last.ckpt``. It has no generators: random numbers follow from seed and position."""
        return {
            "model": self.raw.state_dict(),
            "optimizer": self.raw_optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "position": dataclasses.asdict(self.position),
            "data": self.data.digest,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which :meth:`state` gave.

        Raises:
            DataError: the data set is not the one that the run began with.
        """
        if state["data"] != self.data.digest:
            raise DataError(
                f"{self.data.name} is not the data set that the run began with: classes, images or names changed",
                "Restore the data set, or begin a new run from the best network of this one.",
            )
        self.raw.load_state_dict(state["model"])
        self.raw_optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if state["scaler"]:
            assert self._scaler is not None
            self._scaler.load_state_dict(state["scaler"])
        stored = dict(state["position"])
        stored["best"] = None if stored["best"] is None else tuple(stored["best"])
        self.position = Position(**stored)

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            self.folder.save(self.state())
        self.fabric.barrier()

    # ---- training --------------------------------------------------------------------------------------------------

    def train(self, progress: Progress | None = None) -> Result:
        """Train from the run's position to its end.

        Args:
            progress: is told about every batch and every epoch.

        Raises:
            TrainingError: the loss or the outputs are not finite (exit code 1), memory is short, or a batch is too
                small for BatchNorm.
            CheckpointError: an image cannot be read.
            OutputError: a file of the run cannot be written; the last checkpoint stays.
        """
        with _explained(self.settings.batch_size):
            while self.position.step < self.total_steps or self.position.images:
                self._epoch(progress)
        best = max(self.position.history, key=_quality)
        shortened = self.raw_optimizer.shortened() if isinstance(self.raw_optimizer, GSGD) else None
        return Result(self.position.history, best, shortened)

    def _batches(self, start: int) -> Batches:
        s = self.settings
        return batches(
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

    def _workers(self) -> int:
        if self.settings.workers is not None:
            return self.settings.workers
        return 4 if self.fabric.device.type == "cuda" else 0

    def _epoch(self, progress: Progress | None) -> None:
        s, p = self.settings, self.position
        self.model.train()
        if s.freeze_backbone:
            _freeze_statistics(self.raw)
        loader = self._batches(p.batch) if p.step < self.total_steps else ()
        total = p.batch + len(loader)
        begun = saved = time.perf_counter()
        before = p.seconds
        for images, labels in loader:
            p.batch += 1
            last = p.batch % s.accumulate == 0 or p.batch == total
            parts = min(s.accumulate, total - (p.batch - 1) // s.accumulate * s.accumulate)
            loss, correct = self._batch(images, labels, parts, last)
            p.loss_sum += loss * len(labels)
            p.correct += correct
            p.images += len(labels)
            p.seconds = before + time.perf_counter() - begun
            if progress:
                progress.step(p.epoch, p.batch, total, p.loss_sum / p.images, p.correct / p.images, len(labels))
            if last and p.step >= self.total_steps:
                break
            if last and time.perf_counter() - saved > 60 * s.checkpoint_minutes and p.batch < total:
                self._require_finite(images)
                self._save()
                saved = time.perf_counter()
        self._end_of_epoch(progress)

    def _batch(self, images: Tensor, labels: Tensor, parts: int, last: bool) -> tuple[float, int]:
        """Forward and backward pass of one batch, and the step if this is the ``last`` of its ``parts`` batches.

        Returns:
            The batch's loss, and how many of its images were classified correctly.

        Raises:
            TrainingError: the loss is not finite.
        """
        s, p = self.settings, self.position
        # random numbers of dropout and mixup follow from the position alone, so that a resumed run draws the same
        torch.manual_seed(hash((s.seed, p.epoch, p.batch, self.fabric.global_rank)) % 2**63)
        images, labels = self.fabric.to_device((images, labels))
        if s.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        mixed, targets = self.mixup(images, labels) if self.mixup else (images, labels)
        with self.fabric.no_backward_sync(self.model, enabled=not last):
            output = self.model(mixed)
            logits, *auxiliary = _all_logits(output)
            loss = F.cross_entropy(logits, targets, label_smoothing=s.label_smoothing)
            for other in auxiliary:
                loss = loss + AUXILIARY * F.cross_entropy(other, targets, label_smoothing=s.label_smoothing)
            self.fabric.backward(loss / parts)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} in epoch {p.epoch + 1}, batch {p.batch}")
        if last:
            self._step(value)
        return value, int((logits.argmax(1) == labels).sum())

    def _diverged(self, what: str) -> TrainingError:
        """The error of a run that diverged; ``what`` says what is not finite."""
        tip = f"Try --lr {self.settings.lr / 3:.1g}, --warmup-steps 100, or --clip 1."
        kept = "the last checkpoint is unchanged" if self.folder.has_checkpoint else "there is no checkpoint yet"
        return TrainingError(f"{what}; {kept}", tip, exit_code=1)

    def _step(self, loss: float) -> None:
        s, p = self.settings, self.position
        if s.clip is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=s.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        p.step += 1
        if self.average:
            self.average.update_parameters(self.raw)
        self.fabric.log_dict({"step/loss": loss, "step/lr": self.schedule.get_last_lr()[0]}, step=p.step)
        self.schedule.step()

    # ---- epochs ----------------------------------------------------------------------------------------------------

    def _end_of_epoch(self, progress: Progress | None) -> None:
        p = self.position
        try:
            report = self.validate()
        except CheckpointError:  # save the finished epoch before an unreadable image ends the run
            if self.fabric.is_global_zero:
                self.folder.save(self.state())
            raise
        loss, accuracy = self._over_processes(p.loss_sum / p.images, p.correct / p.images)
        row: dict[str, Any] = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": loss,
            "train_top1": accuracy,
            "val_loss": report.loss,
            "val_top1": report.top1,
            "val_top5": report.top5,
            "images_per_second": p.images * self.fabric.world_size / p.seconds,
        }
        if isinstance(self.raw_optimizer, GSGD):
            row["shortened"] = self.raw_optimizer.shortened()
        p.history.append(row)
        self.fabric.log_dict({f"epoch/{name}": value for name, value in row.items()}, step=p.step)
        is_best = p.best is None or _quality(row) > p.best
        if is_best:
            p.best = _quality(row)
        p.epoch, p.batch, p.loss_sum, p.correct, p.images, p.seconds = p.epoch + 1, 0, 0.0, 0, 0, 0.0
        if self.fabric.is_global_zero:
            if is_best:
                self._write_network("best", row)
            self.folder.write_history(p.history)
        self._save()
        if progress:
            progress.epoch(row)

    def _over_processes(self, *values: float) -> list[float]:
        found = []
        for value in values:
            metric = MeanMetric().to(self.fabric.device)
            metric.update(value)
            found.append(float(metric.compute()))
        return found

    def validate(self) -> EvaluationReport:
        """Evaluate the network, or its average where one is kept, on the held-out images."""
        model = self.average.module if self.average else self.raw
        s = self.settings
        loader = batches(
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
        model.eval()
        epoch = self.position.epoch + 1

        def classify(images: Tensor) -> Tensor:
            return self._logits(model, images, f"outputs on held-out images are no longer finite after epoch {epoch}")

        return evaluate(classify, loader, num_classes=len(self.prepared.labels))

    def _logits(self, model: nn.Module, images: Tensor, otherwise: str) -> Tensor:
        """Class scores of a batch, float32.

        Raises:
            TrainingError: they are not finite; the message is ``otherwise``.
        """
        with self.fabric.autocast():
            logits: Tensor = _all_logits(model(images.to(self.fabric.device)))[0]
        if not bool(logits.isfinite().all()):
            raise self._diverged(otherwise)
        return logits.float()

    @torch.no_grad()
    def _require_finite(self, images: Tensor) -> None:
        """Check before a checkpoint is written that training can continue from it.

        Raises:
            TrainingError: outputs for ``images`` are not finite.
        """
        p = self.position
        self.raw.eval()
        self._logits(self.raw, images, f"outputs are no longer finite after epoch {p.epoch + 1}, batch {p.batch}")
        self.model.train()
        if self.settings.freeze_backbone:
            _freeze_statistics(self.raw)

    def write_initial(self) -> None:
        """Write the network ``initial``, from which a resumed run builds its own."""
        if self.fabric.is_global_zero:
            self._write_network("initial", None)
        self.fabric.barrier()

    def _write_network(self, name: str, row: Mapping[str, Any] | None) -> None:
        model = self.average.module if self.average and row else self.raw
        save_trained(
            model,
            self.prepared.network,
            self.folder.network(name, self.prepared.form),
            preprocessing=self.prepared.preprocessing,
            labels=self.prepared.labels,
            training={
                "settings": dataclasses.asdict(self.settings),
                "data_sha256": self.data.digest,
                "head": list(self.prepared.head),
                "measured": dict(row) if row else None,
            },
        )


def _quality(row: Mapping[str, Any]) -> tuple[float, float]:
    """Top-1 and negative loss of a row: of two rows, the better one compares as larger."""
    return row["val_top1"], -row["val_loss"]


def _all_logits(output: Any) -> list[Tensor]:
    """The class scores of a network's output, followed by those of its auxiliary classifiers (GoogLeNet, Inception)."""
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def _freeze_statistics(model: nn.Module) -> None:
    """Put BatchNorms whose parameters are frozen into evaluation mode, so that their statistics stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


@contextmanager
def _explained(batch_size: int) -> Iterator[None]:
    """Turn torch's errors for short memory and for batches too small for BatchNorm into a TrainingError with a tip."""
    try:
        yield
    except PathconvertError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "a batch gives BatchNorm one value per channel, which has no variance",
            f"Give --batch-size {batch_size + 1} or more, or larger images: --size.",
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        short = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not short:
            raise
        raise TrainingError(
            f"out of memory with batches of {batch_size}; the last checkpoint, if any, is unchanged",
            f"Give --batch-size {max(1, batch_size // 2)} --accumulate 2, or --amp bf16.",
        ) from error
