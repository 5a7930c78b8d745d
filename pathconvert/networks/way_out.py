"""The way out: how the file of a network lay, so that it can be written like that again.

``save_converted`` records the layout beside the source (``metadata.py``); ``restore`` writes the
network in it: the same container, keys, prefix and names, so that the training script that wrote
the file loads the restored one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pathconvert.errors import CheckpointError
from pathconvert.files.checkpoint import Checkpoint
from pathconvert.files.containers import Container
from pathconvert.files.layout import Layout, WrittenContainer
from pathconvert.files.refusals import AGAIN
from pathconvert.files.writing import SUFFIXES
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.names import View, shortened

#: How a file of each kind is written, and what such a file lacks of the one that was read.
WRITTEN_AS: dict[Container, tuple[WrittenContainer, str]] = {
    Container.ZIP: ("torch", ""),
    Container.LEGACY: ("torch-legacy", ""),
    Container.TAR: ("torch-legacy", "the tar archive of the first versions of torch"),
    Container.PICKLE: ("torch", "the plain pickle of NumPy arrays"),
    Container.SAFETENSORS: ("safetensors", ""),
    Container.SHARDED_SAFETENSORS: ("safetensors", "the division into several files"),
    Container.SHARDED_TORCH: ("torch", "the division into several files"),
    Container.DISTRIBUTED: ("torch", "the division into several files"),
}


def layout_of(network: LoadedNetwork) -> Layout | None:
    """The layout of the file that a network came from, before any conversion.

    Returns:
        None if torchvision provided the weights, or a converted file does not record the layout.

    Raises:
        CheckpointError: the layout that a converted file records is damaged.
    """
    checkpoint, view = network.checkpoint, network.view
    if checkpoint is None or network.metadata is not None:
        return recorded_layout(network)
    container, lost = WRITTEN_AS[checkpoint.container]
    missing = [lost] if lost else []
    if checkpoint.module is not None:
        missing.append(f"the pickled module ({checkpoint.module}), of which only tensors are kept")
    if not checkpoint.key_in_dicts:
        missing.append("the list or object that holds the weights, of which dictionaries are made")
    layout = Layout(container, checkpoint.key_path, lost=tuple(missing))
    if view is None:
        return dataclasses.replace(layout, prefix=checkpoint.prefix)
    return _of_view(layout, checkpoint, view)


def _of_view(layout: Layout, checkpoint: Checkpoint, view: View) -> Layout:
    """``layout`` with the names of the tensors, and what the file has besides them."""
    before = checkpoint.prefix
    prefix = before + view.prefix if _has_shown_prefix(view) else before
    there = {name: before + own for name, own in view.original.items()}
    beside = (*view.ignored, *checkpoint.skipped)
    lost = list(layout.lost)
    if view.parts:
        lost.append("the tensors from which weights were computed")
    if beside:
        lost.append(f"the entries {shortened(beside)}")
    return Layout(
        layout.container,
        layout.key,
        prefix,
        names={name: own for name, own in there.items() if own != prefix + name},
        counters={
            before + name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in view.stored.items()
        },
        lost=tuple(lost),
    )


def _has_shown_prefix(view: View) -> bool:
    """Whether names begin with the view's prefix as it is shown, so that new ones get it too."""
    return any(own == view.prefix + name for name, own in view.original.items())


def recorded_layout(network: LoadedNetwork) -> Layout | None:
    """The layout that a converted file records; None for files from before it was recorded.

    Raises:
        CheckpointError: it is damaged.
    """
    stored: Any = (network.metadata or {}).get("source", {}).get("layout")
    if stored is None:
        return None
    try:
        return Layout.from_json(stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        assert network.checkpoint is not None
        raise CheckpointError(
            f"{network.checkpoint.path} has damaged pathconvert metadata: the layout of its source",
            AGAIN,
        ) from error


def original_suffix(network: LoadedNetwork) -> str:
    """The suffix of the file that a network came from, if files of its kind are written with it.

    ``.safetensors`` if the file does not record it.
    """
    layout = recorded_layout(network)
    if layout is None or layout.container == "safetensors":
        return SUFFIXES[0]
    name = Path(str((network.metadata or {})["source"].get("name", ""))).name.lower()
    fitting = [suffix for suffix in SUFFIXES[1:] if name.endswith(suffix)]
    return max(fitting, key=len, default=".pth")
