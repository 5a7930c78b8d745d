"""What the tests of large networks share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def free_memory() -> Iterator[None]:
    """Networks are large, so free the memory of a test before the next one."""
    yield
    gc.collect()
