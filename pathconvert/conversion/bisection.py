"""Finding, among changes that do not work all together, those that do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def working(
    works: Callable[[list[T]], bool], changes: Sequence[T], base: Sequence[T] = ()
) -> list[T]:
    """The changes that work together, found by halving.

    Each of the others does not work together with those that were found before it. One bad change
    among n costs about 2 log₂ n trials.

    Args:
        works: whether the given changes work.
        changes: to choose from, in order.
        base: changes that are known to work.
    """
    base, changes = list(base), list(changes)
    if not changes or works(base + changes):
        return changes
    if len(changes) == 1:
        return []
    half = len(changes) // 2
    first = working(works, changes[:half], base)
    return first + working(works, changes[half:], base + first)
