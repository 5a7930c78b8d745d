"""Which output of a network belongs to which class of labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathconvert.errors import PathconvertError
from pathconvert.training.data.labelled import Data


@dataclass(frozen=True, eq=False)
class MatchedLabels:
    """The labels of the held-out images, as a network numbers its classes.

    Attributes:
        labels: for every held-out image the index of its class in the output, int64 [N].
        note: a remark on how the classes were matched; "" if there is nothing to say.
    """

    labels: Tensor
    note: str


def match_labels(
    data: Data, network: str, labels: tuple[str, ...] | None, classes: int
) -> MatchedLabels:
    """Match the data's classes to the outputs of a network: by name if possible, else by position.

    Args:
        data: the labelled images.
        network: the network's name, for errors.
        labels: the names that are recorded for the network's classes; None if there are none.
        classes: the number of the network's classes.

    Raises:
        PathconvertError: the data has another number of classes than the network, and not all their
            names are known.
    """
    names = labels if labels and len(labels) == classes else None
    if names == data.classes:
        return MatchedLabels(data.val.labels, "")
    # ImageNet has two classes named crane
    if names and all(names.count(name) == 1 for name in data.classes):
        return MatchedLabels(
            torch.tensor([names.index(name) for name in data.classes])[data.val.labels], ""
        )
    if len(data.classes) == classes:
        unknown = next((name for name in data.classes if name not in (names or data.classes)), None)
        note = (
            f"the network has no class {unknown!r}, so the data's classes were matched by position"
        )
        return MatchedLabels(data.val.labels, note if unknown else "")
    raise PathconvertError(
        f"{data.name} has {len(data.classes)} classes, but {network} has {classes}",
        "Give the data that the network was trained for: as many class folders, or folders named"
        " after its classes.",
    )
