"""How well a network classifies labelled images, in whatever form it is and wherever it runs."""

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
    """The result of :func:`evaluate`.

    Attributes:
        top1, top5: share of the images, in [0, 1], whose class has the highest score, or one of the
            five highest.
        loss: mean cross entropy over the images, in nats.
        images: number of images, in all processes together.
        seconds: time that this process took, including the reading of images.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, with the images per second."""
        return asdict(self) | {
            "images_per_second": self.images / self.seconds if self.seconds else None
        }


def evaluate(
    classify: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_classes: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> EvaluationReport:
    """Measure accuracy and loss on labelled images.

    In a run of several processes, on the images of all of them.

    Args:
        classify: images [N, C, H, W] as they come from ``batches`` → logits [N, num_classes], on
            any device.
        batches: images, and labels int64 [N]; on the CPU or where ``classify`` needs them.
        num_classes: number of classes of the network.
        progress: called with the number of batches done and of all batches (None where ``batches``
            has no length).

    Raises:
        DataError: there are no images, or a label is not a class of the network.
        PathconvertError: the network's outputs are not class scores, or are not finite.
    """
    begun = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    accuracies = MetricCollection(
        {"top1": _accuracy(num_classes, 1), "top5": _accuracy(num_classes, 5)}
    )
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
            raise DataError(
                "there are no images to measure on", "Add images to the folder that --data names."
            )
        found = {name: float(value) for name, value in accuracies.compute().items()}
        return EvaluationReport(
            **found,
            loss=float(loss.compute()),
            images=int(images.compute()),
            seconds=time.perf_counter() - begun,
        )


def _accuracy(num_classes: int, top: int) -> MulticlassAccuracy:
    """Accuracy over images, not averaged over classes. It does not check the labels."""
    return MulticlassAccuracy(
        num_classes, top_k=min(top, num_classes), average="micro", validate_args=False
    )


def _require_labels(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(
            f"an image has class {int(wrong[0])}, but the network has {num_classes} classes, 0 to"
            f" {num_classes - 1}",
            "Give the data that the network was trained for, or fine-tune it on this data.",
        )


def _logits(output: Any, images: int, num_classes: int) -> Tensor:
    """Class scores [images, num_classes], checked, in float32 or float64.

    Raises:
        PathconvertError: the output is not a tensor of this shape, or is not finite.
    """
    if not isinstance(output, Tensor):
        raise PathconvertError(
            f"the network returns a {type(output).__name__}, not a tensor of class scores"
        )
    scores = output.flatten(1) if output.ndim > 2 and set(output.shape[2:]) == {1} else output
    if tuple(scores.shape) != (images, num_classes):
        given = "×".join(map(str, output.shape))
        raise PathconvertError(
            f"the network's outputs have the size {given}, not {images}×{num_classes} as class"
            " scores have"
        )
    if not bool(torch.isfinite(scores).all()):
        raise PathconvertError(
            "the network's outputs are not finite",
            "Its training diverged, or fp16 overflows: try fp32.",
        )
    return scores if scores.dtype == torch.float64 else scores.float()
