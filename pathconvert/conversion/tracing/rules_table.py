"""The table of all operations in ``docs/operations.md``, from ``RULES`` and the rules' docstrings.

``python -m pathconvert.conversion.tracing.rules_table > docs/operations.md`` writes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from pathconvert.conversion.tracing.rules import RULES

HEAD = """\
# Operations

<!-- python -m pathconvert.conversion.tracing.rules_table > docs/operations.md -->

A conversion follows every channel's factor through these operations. Their in-place, operator and
method variants follow the same rule. What an operation that is not listed reads and returns keeps
factor 1: the conversion stays exact, and those channels are not rescaled.

| operations | rule | what it does |
|---|---|---|
"""


def named_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a rule is known by; for ``convolution(2)`` that is ``convolution``."""
    maker = rule.__qualname__.partition(".")[0]
    named: Callable[..., Any] = getattr(sys.modules[rule.__module__], maker)
    return named


def first_sentence(rule: Callable[..., Any]) -> str:
    """The first sentence of a rule's docstring, on one line of a table."""
    paragraph, _, _ = (inspect.getdoc(rule) or "").partition("\n\n")
    sentence, _, _ = " ".join(paragraph.split()).partition(". ")
    return sentence.removesuffix(".").replace("|", "\\|") + "."


def table() -> str:
    """``docs/operations.md``: one line per rule, in the order of ``RULES``."""
    names: dict[Callable[..., Any], list[str]] = {}
    for name, rule in RULES.items():
        names.setdefault(named_rule(rule), []).append(f"`{name}`")
    lines = [
        f"| {', '.join(listed)} | `{rule.__name__}` | {first_sentence(rule)} |\n"
        for rule, listed in names.items()
    ]
    return HEAD + "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table())
