"""Errors of torch that a run explains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pathconvert.errors import PathconvertError, TrainingError


@contextmanager
def explained(batch_size: int) -> Iterator[None]:
    """Turn torch's errors for short memory and for batches too small for BatchNorm into a tip.

    Args:
        batch_size: of the run, from which the tip follows.

    Raises:
        TrainingError: in place of these errors. All others pass unchanged.
    """
    try:
        yield
    except PathconvertError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "a batch gives BatchNorm one value per channel, which has no variance",
            f"Give --batch-size {batch_size + 1} or more, or larger images: --size.",
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory with batches of {batch_size}; "
            "the last checkpoint, if any, is unchanged",
            f"Give --batch-size {max(1, batch_size // 2)} --accumulate 2, or --amp bf16.",
        ) from error
