"""Batches of one epoch, or of the rest of one, that do not depend on how many processes make them.

The order is that of :class:`torch.utils.data.DistributedSampler`. Chance for sample i of epoch e follows from (seed,
e, i) alone, so that a run taken up in the middle of an epoch goes on with the same bits, with any number of workers.
Nothing here draws from torch's own generator, nor leaves it changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    """(images float32 [N, C, H, W], labels int64 [N]), batch by batch; each iteration reads anew.

    Attributes:
        samples: the indices of the images of every batch.
    """

    samples: list[list[int]]
    _loader: DataLoader[Batch | PathconvertError]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        """Read.

        Raises:
            CheckpointError: a file is no intact image, whichever process found out.
            DataError: a worker process was ended from outside.
        """
        with _lost_workers():
            for batch in self._loader:
                if isinstance(batch, PathconvertError):
                    raise batch
                yield batch


def batches(
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
        dataset: raw images.
        transform: what is done to each.
        batch_size: images a batch of one process.
        epoch: gives another order and other chance each.
        start_batch: leave so many out, without reading them.
        seed: not negative.
        shuffle: False keeps the dataset's order; then no image comes twice, and processes may have one batch less.
        rank, world_size: of this process. With ``shuffle`` all have equally many batches: what is missing to that is
            filled up with images of the epoch's beginning, or with ``drop_last`` left out.
        workers: processes that read, of one thread each; 0 reads in this one.
        drop_last: leave an incomplete batch out.
        pin_memory: for quicker copies to a GPU.

    Raises:
        DataError: there is not one whole batch.
    """
    order = _order(len(dataset), shuffle, seed, epoch, rank, world_size, drop_last)
    whole = len(order) - len(order) % batch_size if drop_last else len(order)
    if drop_last and whole == 0:
        raise DataError(
            f"{len(dataset)} images are fewer than {world_size * batch_size}, one batch", "Give a smaller --batch-size."
        )
    samples = [order[i : i + batch_size] for i in range(0, whole, batch_size)][start_batch:]
    loader = DataLoader(
        _Prepared(dataset, transform, seed, epoch),
        batch_sampler=samples,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        # forked processes share what is decoded; the default elsewhere
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # it draws a number that nobody needs, else from torch's own
    )
    return Batches(samples, loader)


def _order(count: int, shuffle: bool, seed: int, epoch: int, rank: int, world_size: int, drop_last: bool) -> list[int]:
    """The indices of one process."""
    numbers: Dataset[int] = _Numbers(count)
    sampler: DistributedSampler[int] = DistributedSampler(
        numbers, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last and shuffle
    )
    sampler.set_epoch(epoch)
    order = [int(index) for index in sampler]
    if not shuffle and rank + world_size * (len(order) - 1) >= count:
        order.pop()  # the sampler filled up
    return order


class _Numbers(Dataset[int]):
    """What the sampler wants to know of a dataset."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


class _Prepared(Dataset[Batch]):
    """Whole batches; a refusal is handed on as a value, as the loader would wrap it in many lines."""

    def __init__(self, images: Images, transform: Transform, seed: int, epoch: int) -> None:
        self._images, self._transform = images, transform
        self._seeds = np.random.SeedSequence((seed, epoch)).generate_state(len(images)) if transform.is_random else None

    def __getitems__(self, indices: Sequence[int]) -> Batch | PathconvertError:
        try:
            pixels = [self._images[index][0] for index in indices]
        except PathconvertError as error:
            return error
        seeds = None if self._seeds is None else [int(self._seeds[index]) for index in indices]
        with torch.random.fork_rng(devices=[]):
            return self._transform.many(pixels, seeds), self._images.labels[torch.tensor(indices)]


def _as_it_is(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _lost_workers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images was ended: {str(error).splitlines()[0]}",
            "Memory may be short: give fewer --workers.",
        ) from error
