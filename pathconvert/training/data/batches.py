"""Batches of one epoch, or of the rest of an epoch.

They do not depend on the number of processes that make them. The order is that of
:class:`torch.utils.data.DistributedSampler`. The augmentation of sample i in epoch e follows from
(seed, e, i) alone, so that a run that is resumed in the middle of an epoch continues bit for bit,
with any number of workers. This module does not draw from torch's default generator, and leaves its
state unchanged.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pathconvert.errors import DataError, PathconvertError
from pathconvert.training.data.augmentation import Transform
from pathconvert.training.data.images import Images

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Batches:
    """Iterates over batches: images float32 [N, C, H, W] and labels int64 [N].

    Each iteration reads the images anew.

    Attributes:
        samples: the indices of the images in each batch.
    """

    samples: list[list[int]]
    _loader: DataLoader[Batch | PathconvertError]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        """Read the batches.

        Yields:
            Images, float32 [N, C, H, W], and labels, int64 [N].

        Raises:
            CheckpointError: a file is not an intact image, whichever process found out.
            DataError: a worker process was killed.
        """
        with _lost_workers():
            for batch in self._loader:
                if isinstance(batch, PathconvertError):
                    raise batch
                yield batch


def epoch_batches(
    dataset: Images,
    transform: Transform,
    *,
    batch_size: int,
    epoch: int,
    start_batch: int = 0,
    seed: int,
    shuffle: bool,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    drop_last: bool,
    pin_memory: bool = False,
) -> Batches:
    """The batches of one epoch from ``start_batch`` on.

    Args:
        dataset: the stored images.
        transform: what turns them into inputs.
        batch_size: images per batch in one process.
        epoch: every epoch has its own order and augmentation.
        start_batch: number of batches to skip without reading them.
        seed: of the order and the augmentation, not negative.
        shuffle: False keeps the dataset's order; then no image occurs twice, and a process may have
            one batch less than another.
        rank, world_size: the number of this process, and of all. With ``shuffle`` all processes
            have equally many batches: images from the start of the epoch fill the gaps, or, with
            ``drop_last``, surplus images are left out.
        workers: processes that read images, with one thread each; 0 reads in this process.
        drop_last: leave an incomplete last batch out.
        pin_memory: put batches into pinned memory, from which copies to a GPU are faster.

    Raises:
        DataError: ``drop_last`` is set, and the images are too few for one batch.
    """
    order = _order(dataset, seed, epoch, rank, world_size, shuffle=shuffle, drop_last=drop_last)
    whole = len(order) - len(order) % batch_size if drop_last else len(order)
    if drop_last and whole == 0:
        raise DataError(
            f"{len(dataset)} images are fewer than one batch, which has {world_size * batch_size}",
            "Give a smaller --batch-size.",
        )
    samples = [order[i : i + batch_size] for i in range(0, whole, batch_size)][start_batch:]
    loader = DataLoader(
        _WholeBatches(dataset, transform, seed, epoch),
        batch_sampler=samples,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        # forked processes share what is decoded; the default elsewhere
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # the loader draws a number from it, and would else draw it from torch's default
        generator=torch.Generator(),
    )
    return Batches(samples, loader)


def _order(
    dataset: Images,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
) -> list[int]:
    """Indices of the images that one process gets, in the order in which it gets them."""
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
        dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last and shuffle
    )
    sampler.set_epoch(epoch)
    order = list(cast(Iterator[int], iter(sampler)))  # its type says items, but it yields indices
    if not shuffle and rank + world_size * (len(order) - 1) >= len(dataset):
        order.pop()  # the sampler repeats an image to give all processes equally many
    return order


class _WholeBatches(Dataset[Batch]):
    """A dataset whose items are whole batches of transformed images.

    Errors are returned as values, because the loader would wrap a raised one in many lines.
    """

    def __init__(self, images: Images, transform: Transform, seed: int, epoch: int) -> None:
        self._images, self._transform = images, transform
        self._seeds = (
            np.random.SeedSequence((seed, epoch)).generate_state(len(images))
            if transform.is_random
            else None
        )

    def __getitems__(self, indices: Sequence[int]) -> Batch | PathconvertError:
        try:
            pixels = [self._images[index][0] for index in indices]
        except PathconvertError as error:
            return error
        seeds = None if self._seeds is None else [int(self._seeds[index]) for index in indices]
        with torch.random.fork_rng(devices=[]):
            return self._transform.many(pixels, seeds), self._images.labels[torch.tensor(indices)]


def _as_it_is(batch: Any) -> Any:
    """No collation: the dataset gives out whole batches."""
    return batch


@contextlib.contextmanager
def _lost_workers() -> Iterator[None]:
    """Turn the loader's error for a killed worker into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images was killed: {str(error).splitlines()[0]}",
            "Memory may be short: try fewer --workers.",
        ) from error
