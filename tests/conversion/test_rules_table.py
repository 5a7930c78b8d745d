"""``docs/operations.md`` lists every rule as it is."""

from __future__ import annotations

from pathlib import Path

from pathconvert.conversion.tracing.rules import RULES
from pathconvert.conversion.tracing.rules_table import first_sentence, named_rule, table

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"


def test_the_table_is_up_to_date() -> None:
    assert OPERATIONS.read_text() == table(), (
        "python -m pathconvert.conversion.tracing.rules_table > docs/operations.md"
    )


def test_every_rule_says_what_it_does() -> None:
    for name, rule in RULES.items():
        assert len(first_sentence(named_rule(rule)).split()) > 3, name
