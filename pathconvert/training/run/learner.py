"""What a step of training changes: the network, its optimizer, the schedule and the average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from pathconvert.training.optimizer.choice import make_optimizer, make_schedule
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.run.preparation import Prepared
from pathconvert.training.run.sync_batch_norm import synchronise_batch_norms
from pathconvert.training.settings import Settings

#: Weight of an auxiliary classifier's loss (from the GoogLeNet paper, section 5).
AUXILIARY = 0.3


class Learner:
    """A network with all that trains it.

    Args:
        prepared: the network, which is trained in place.
        settings: the run's settings.
        fabric: from ``make_fabric``, launched.
        steps: number of steps that the schedule is made for.

    Attributes:
        raw: the network as it is before DDP or ``torch.compile`` wraps it, on the run's device.
        raw_optimizer: the optimizer before Fabric wraps it.
        average: the moving average of the weights; None without ``--ema``.

    Raises:
        RecordError: G-SGD is asked for, and the network carries no record of its conversion.
    """

    def __init__(self, prepared: Prepared, settings: Settings, fabric: Fabric, steps: int) -> None:
        self._settings, self._fabric = settings, fabric
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
        self._model, self._optimizer = fabric.setup(compiled, self.raw_optimizer)
        self._schedule = make_schedule(self.raw_optimizer, settings, steps)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            averaging = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(self.raw, multi_avg_fn=averaging)
        self._mixup: v2.MixUp | None = None
        if settings.mixup:
            self._mixup = v2.MixUp(alpha=settings.mixup, num_classes=len(prepared.labels))

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and saved: the average where there is one."""
        return self.average.module if self.average else self.raw

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def shortened(self) -> int | None:
        """How often G-SGD has shortened the step of a chain; None for other optimizers."""
        return self.raw_optimizer.shortened() if isinstance(self.raw_optimizer, GSGD) else None

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the gradients in fp16; None in other precisions."""
        return getattr(self._fabric.strategy.precision, "scaler", None)

    def state(self) -> dict[str, Any]:
        """The state from which training continues bit for bit."""
        return {
            "model": self.raw.state_dict(),
            "optimizer": self.raw_optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.raw.load_state_dict(state["model"])
        self.raw_optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if state["scaler"]:
            assert self._scaler is not None
            self._scaler.load_state_dict(state["scaler"])

    def train_mode(self) -> None:
        """Put the network into training mode, but for BatchNorms whose parameters are frozen."""
        self._model.train()
        if self._settings.freeze_backbone:
            _freeze_statistics(self.raw)

    def backward(
        self, images: Tensor, labels: Tensor, *, seed: int, parts: int, last: bool
    ) -> tuple[float, int]:
        """Run forward and backward on one batch. Gradients are added to those that are there.

        Args:
            images: float32 [N, C, H, W].
            labels: int64 [N].
            seed: determines the random numbers of dropout and mixup.
            parts: number of batches that make one step; the gradients are divided by it.
            last: whether this is the last of them, so that processes exchange their gradients.

        Returns:
            The batch's loss, and how many of its images were classified correctly.
        """
        s = self._settings
        torch.manual_seed(seed)
        images, labels = self._fabric.to_device((images, labels))
        if s.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        mixed, targets = self._mixup(images, labels) if self._mixup else (images, labels)
        with self._fabric.no_backward_sync(self._model, enabled=not last):
            logits, *auxiliary = _all_logits(self._model(mixed))
            loss = F.cross_entropy(logits, targets, label_smoothing=s.label_smoothing)
            for other in auxiliary:
                extra = F.cross_entropy(other, targets, label_smoothing=s.label_smoothing)
                loss = loss + AUXILIARY * extra
            self._fabric.backward(loss / parts)
        return float(loss.detach()), int((logits.argmax(1) == labels).sum())

    def step(self) -> float:
        """Take a step with the gradients that are there, and remove them.

        Returns:
            The learning rate of the step.
        """
        if self._settings.clip is not None:
            self._fabric.clip_gradients(
                self._model,
                self._optimizer,
                max_norm=self._settings.clip,
                error_if_nonfinite=False,
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.raw)
        rate = self.rate
        self._schedule.step()
        return rate

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """Class scores of ``model``, computed in the run's precision; float32 [N, classes]."""
        with self._fabric.autocast():
            logits = _all_logits(model(images.to(self._fabric.device)))[0]
        return logits.float()


def _all_logits(output: Any) -> list[Tensor]:
    """The class scores of a network's output, then those of its auxiliary classifiers.

    GoogLeNet and Inception return both in training mode.
    """
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def _freeze_statistics(model: nn.Module) -> None:
    """Put BatchNorms with frozen parameters into evaluation mode, which keeps their statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()
