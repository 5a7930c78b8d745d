"""Run-length encoding of vectors of units, for JSON.

A run ``[first unit, length, repeat]`` stands for ``length`` consecutive units from ``first unit``
on, each ``repeat`` times (a flatten repeats one channel H·W times); first unit -1 stands for
factor 1.
"""

from __future__ import annotations

import numpy as np

from pathconvert.conversion.groups import FIXED
from pathconvert.conversion.tracing.trace import IdVector

RunLength = list[int]


def encode_runs(units: IdVector) -> list[RunLength]:
    """``units`` [n] as runs (see the module's docstring)."""
    if not len(units):
        return []
    edges = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    values, repeats = units[edges], np.diff(np.r_[edges, len(units)])
    follows = (
        (values[1:] == values[:-1] + 1) & (repeats[1:] == repeats[:-1]) & (values[:-1] != FIXED)
    )
    starts = np.flatnonzero(np.r_[True, ~follows])
    lengths = np.diff(np.r_[starts, len(values)])
    return [[int(values[s]), int(n), int(repeats[s])] for s, n in zip(starts, lengths, strict=True)]


def decode_runs(runs: list[RunLength]) -> IdVector:
    """The inverse of :func:`encode_runs`."""
    pieces = [np.repeat(np.arange(first, first + length), repeat) for first, length, repeat in runs]
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
