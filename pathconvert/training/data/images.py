"""Labelled images as they are stored, before any resizing: uint8 [C, H, W], from files or from an array in memory.

Small files are decoded once: their pixels stay in memory that worker processes share with the process that forked them
(an anonymous mapping, which a container's small ``/dev/shm`` does not limit; it takes only the pages that are written).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from pathconvert.networks.images import read_image
from pathconvert.networks.preprocessing import whole_levels

#: Bytes of decoded pixels that are kept, at most.
CACHE = 10**9

Reader = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images.

    Attributes:
        names: what tells one from another; of files the path below the data's folder.
        labels: int64 [N].
        places: int64 [N], the number under which ``reader`` has each.
        reader: a number → uint8 [C, H, W], which is not to be written to.
    """

    names: tuple[str, ...]
    labels: Tensor
    places: Tensor
    reader: Reader

    @staticmethod
    def of(names: Sequence[str], labels: Sequence[int] | Tensor, reader: Reader) -> Images:
        """All that a reader has."""
        return Images(tuple(names), torch.as_tensor(labels, dtype=torch.int64), torch.arange(len(names)), reader)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label.

        Raises:
            CheckpointError: its file is no intact image.
        """
        return self.reader(int(self.places[index])), int(self.labels[index])

    def only(self, indices: Tensor) -> Images:
        """Those at ``indices``, int64 [M], in that order."""
        names = tuple(self.names[i] for i in indices.tolist())
        return Images(names, self.labels[indices], self.places[indices], self.reader)


class Files:
    """Reads image files of any kind (:func:`~pathconvert.networks.inputs.read_image`).

    Args:
        paths: the files.
        channels: 1 for grey, 3 for RGB.
    """

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        self._paths, self._channels = tuple(paths), channels
        self._pixels: Tensor | None = None
        self._known: Tensor | None = None

    def __call__(self, number: int) -> Tensor:
        if self._known is not None and self._pixels is not None and self._known[number]:
            return self._pixels[number]
        pixels = whole_levels(read_image(self._paths[number], self._channels).pixels)
        if self._known is not None and self._pixels is not None and pixels.shape == self._pixels.shape[1:]:
            self._pixels[number] = pixels
            self._known[number] = 1
        return pixels

    def keep(self, limit: int = CACHE) -> None:
        """From now on keep what is decoded, where all files are of the first one's size and fit into ``limit``."""
        shape = (len(self._paths), *self(0).shape)
        if math.prod(shape) <= limit:
            self._pixels, self._known = _shared(shape), _shared(shape[:1])

    def __getstate__(self) -> dict[str, object]:
        """Without what is kept: a process that is not forked starts anew."""
        return vars(self) | {"_pixels": None, "_known": None}


def _shared(shape: tuple[int, ...]) -> Tensor:
    """Zeros, uint8, in memory that forked processes share."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


class Array:
    """Reads an array in memory.

    Args:
        pixels: uint8, [N, H, W] grey or [N, H, W, 3] RGB.
        channels: 1 for grey, 3 for RGB.
    """

    def __init__(self, pixels: Tensor, channels: int) -> None:
        planes = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        if channels == 1 and planes.shape[1] == 3:
            planes = v2.functional.rgb_to_grayscale(planes)
        self._pixels = planes.expand(-1, channels, -1, -1)

    def __call__(self, number: int) -> Tensor:
        return self._pixels[number]
