"""How many random examples a property test draws, and how."""

from __future__ import annotations

import os
from typing import Any

import hypothesis


def examples(count: int) -> Any:
    """``count`` examples, the same in every run, or as many as ``PATHCONVERT_EXAMPLES`` says.

    By hand: ``PATHCONVERT_EXAMPLES=2000 pytest tests/conversion/test_random_programs.py``.
    """
    return hypothesis.settings(
        max_examples=int(os.environ.get("PATHCONVERT_EXAMPLES", count)), derandomize=True,
        deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
