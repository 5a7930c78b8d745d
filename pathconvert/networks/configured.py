"""What the ``config.json`` beside a file says of images and classes.

timm writes how images are prepared under ``pretrained_cfg``; Hugging Face writes the names of the
classes as ``id2label``. Anything else that such a file may hold is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pathconvert.errors import CheckpointError, class_and_text
from pathconvert.files.checkpoint import Checkpoint
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import INTERPOLATIONS, Preprocessing

#: What timm assumes where its configuration does not say.
_CROP_SHARE = 0.875


def configured_preprocessing(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> Preprocessing | None:
    """timm's preprocessing at the architecture's input size.

    Returns:
        None without a configuration that gives mean and standard deviation; or if it resizes
        images in another way than to a length of the shorter side and a centre crop, or for
        another number of channels.

    Raises:
        CheckpointError: the configuration is damaged.
    """
    stored = _config(checkpoint).get("pretrained_cfg")
    size = architecture.input_size
    if not isinstance(stored, Mapping) or size is None or len(size) != 3:
        return None
    interpolation = stored.get("interpolation") or "bilinear"
    if stored.get("crop_mode", "center") != "center" or interpolation not in INTERPOLATIONS:
        return None
    if not stored.get("mean") or not stored.get("std") or len(stored["mean"]) != size[0]:
        return None
    try:
        resize = math.floor(max(size[1:]) / float(stored.get("crop_pct") or _CROP_SHARE))
        found = {name: stored[name] for name in ("mean", "std")}
        return Preprocessing.from_json(
            found | {"resize": resize, "crop": size[1:], "interpolation": interpolation}
        )
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise _damaged(checkpoint, "pretrained_cfg", class_and_text(error)) from error


def configured_labels(
    checkpoint: Checkpoint | None, architecture: Architecture
) -> tuple[str, ...] | None:
    """Hugging Face's names of the classes.

    Returns:
        None without them, if the network has another number of classes, or if they are
        placeholders (``LABEL_0``).

    Raises:
        CheckpointError: they are damaged.
    """
    stored = _config(checkpoint).get("id2label")
    if not isinstance(stored, Mapping) or not stored:
        return None
    try:
        by_index = {int(index): str(name) for index, name in stored.items()}
        names = tuple(by_index[index] for index in range(len(by_index)))
    except (KeyError, ValueError) as error:
        raise _damaged(checkpoint, "id2label", class_and_text(error)) from error
    if names[0] == "LABEL_0" or len(names) != architecture.arguments.get("num_classes"):
        return None
    return names


def _config(checkpoint: Checkpoint | None) -> Mapping[str, Any]:
    """The configuration beside a plain file; empty for any other."""
    if checkpoint is None or checkpoint.metadata is not None:
        return {}
    return checkpoint.config or {}


def _damaged(checkpoint: Checkpoint | None, key: str, reason: str) -> CheckpointError:
    path = checkpoint.path if checkpoint else "the file"
    return CheckpointError(
        f"the config.json beside {path} is damaged: {key}: {reason}",
        f"Remove {key} from it, and give --mean, --std or --labels.",
    )
