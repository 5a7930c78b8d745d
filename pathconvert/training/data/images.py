"""Labelled images as they are stored, before any resizing: uint8 [C, H, W].

They come from files, or from an array in memory. Small files are decoded only once: their pixels
stay in memory that worker processes share with the process that forked them. This is an anonymous
mapping: a container's small ``/dev/shm`` does not limit it, and it takes up only the pages that are
written.
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

#: The most bytes of decoded pixels that are kept.
CACHE = 10**9

Reader = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images.

    Attributes:
        names: a distinct name for each image; for files, the path below the data's folder.
        labels: int64 [N].
        places: the number by which ``reader`` knows each image, int64 [N].
        reader: a number → uint8 [C, H, W], which must not be written to.
    """

    names: tuple[str, ...]
    labels: Tensor
    places: Tensor
    reader: Reader

    @staticmethod
    def of(names: Sequence[str], labels: Sequence[int] | Tensor, reader: Reader) -> Images:
        """All images of a reader, in its order."""
        return Images(
            tuple(names),
            torch.as_tensor(labels, dtype=torch.int64),
            torch.arange(len(names)),
            reader,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, uint8 [C, H, W], and its label.

        Raises:
            CheckpointError: the image's file is not an intact image.
        """
        return self.reader(int(self.places[index])), int(self.labels[index])

    def only(self, indices: Tensor) -> Images:
        """The images at ``indices``, int64 [M], in that order."""
        names = tuple(self.names[i] for i in indices.tolist())
        return Images(names, self.labels[indices], self.places[indices], self.reader)


class Files:
    """Reads image files of any kind (:func:`~pathconvert.networks.images.read_image`).

    Args:
        paths: the files.
        channels: 1 for grey, 3 for RGB.
    """

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        self._paths, self._channels = tuple(paths), channels
        self._pixels: Tensor | None = None
        self._known: Tensor | None = None

    def __call__(self, number: int) -> Tensor:
        """One image, uint8 [C, H, W].

        Raises:
            CheckpointError: the file is not an intact image.
        """
        if self._known is not None and self._pixels is not None and self._known[number]:
            return self._pixels[number]
        pixels = whole_levels(read_image(self._paths[number], self._channels).pixels)
        if (
            self._known is not None
            and self._pixels is not None
            and pixels.shape == self._pixels.shape[1:]
        ):
            self._pixels[number] = pixels
            self._known[number] = 1
        return pixels

    def keep(self, limit: int = CACHE) -> None:
        """From now on keep decoded pixels, if all files together fit into ``limit`` bytes.

        Every file is taken to be as large as the first; those of another size are not kept.
        """
        shape = (len(self._paths), *self(0).shape)
        if math.prod(shape) <= limit:
            self._pixels, self._known = _shared(shape), _shared(shape[:1])

    def __getstate__(self) -> dict[str, object]:
        """The state without decoded pixels, which a process that is not forked cannot share."""
        return vars(self) | {"_pixels": None, "_known": None}


def _shared(shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros, uint8, in memory that forked processes share."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


class Array:
    """Reads images from an array in memory.

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
        """One image, uint8 [C, H, W]."""
        return self._pixels[number]
