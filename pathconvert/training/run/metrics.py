"""How well a network, in whatever form and wherever it runs, classifies labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from pathconvert.errors import DataError, PathconvertError


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured.

    Attributes:
        top1, top5: shares of the images, in [0, 1], whose class is the first, or among the first five.
        loss: cross entropy in nats, the images' mean.
        images: how many there were, in all processes together.
        seconds: what this process took, reading included.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self) | {"images_per_second": self.images / self.seconds if self.seconds else None}


def evaluate(
    classify: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_classes: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> EvaluationReport:
    """Measure on labelled images; in several processes on those of all together.

    Args:
        classify: images [N, C, H, W] as they come from ``batches`` → logits [N, num_classes], on any device.
        batches: images and labels int64 [N], on the CPU or where ``classify`` wants them.
        num_classes: of the network.
        progress: called with the batches done and their number (None where ``batches`` has no length).

    Raises:
        DataError: a label is none of the network's classes, or there are no images.
        PathconvertError: the network gives other outputs than logits, or some that are not finite.
    """
    begun = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    accuracies = MetricCollection({"top1": _accuracy(num_classes, 1), "top5": _accuracy(num_classes, 5)})
    loss, images = MeanMetric().set_dtype(torch.float64), SumMetric().set_dtype(torch.float64)
    with torch.inference_mode():
        for done, (inputs, labels) in enumerate(batches, 1):
            _require_labels(labels, num_classes)
            logits = _logits(classify(inputs), len(labels), num_classes)
            labels = labels.to(logits.device)
            for metric in (accuracies, loss, images):
                metric.to(logits.device)
            accuracies.update(logits, labels)
            loss.update(cross_entropy(logits, labels), len(labels))
            images.update(len(labels))
            if progress:
                progress(done, total)
        if not images.update_called:
            raise DataError("there are no images to measure on", "Give some, or a larger limit.")
        found = {name: float(value) for name, value in accuracies.compute().items()}
        return EvaluationReport(
            **found, loss=float(loss.compute()), images=int(images.compute()), seconds=time.perf_counter() - begun
        )


def _accuracy(num_classes: int, top: int) -> MulticlassAccuracy:
    """Of images, not of classes. Labels are checked before."""
    return MulticlassAccuracy(num_classes, top_k=min(top, num_classes), average="micro", validate_args=False)


def _require_labels(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(
            f"an image is of class {int(wrong[0])}, and the network has {num_classes} classes, 0 to {num_classes - 1}",
            "Give the data that the network was trained for, or fine-tune it to these.",
        )


def _logits(output: Any, images: int, num_classes: int) -> Tensor:
    """Checked, and in float32 at least."""
    if not isinstance(output, Tensor):
        raise PathconvertError(f"the network gives a {type(output).__name__}, no class scores")
    scores = output.flatten(1) if output.ndim > 2 and set(output.shape[2:]) == {1} else output
    if tuple(scores.shape) != (images, num_classes):
        given = "×".join(map(str, output.shape))
        raise PathconvertError(f"the network gives outputs of size {given}, not {images}×{num_classes} class scores")
    if not bool(torch.isfinite(scores).all()):
        raise PathconvertError(
            "the network gives outputs that are not finite", "Its training diverged, or fp16 overflows: try fp32."
        )
    return scores if scores.dtype == torch.float64 else scores.float()
