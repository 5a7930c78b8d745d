"""The typed record: what it keeps of its JSON, older records, and what it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from path_networks import Bottleneck

import pathconvert
from pathconvert.conversion.record import Record, attach_record, form_of, record_of
from pathconvert.errors import RecordError


def stored(form: str = "path", gauge: str = "unit") -> dict[str, Any]:
    """The JSON record of a small network."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    conversion = pathconvert.reparameterize(Bottleneck().eval(), x, "network", gauge=gauge)
    if form == "path":
        return conversion.record
    return pathconvert.to_path_bn(conversion, x, skip_scale=0.5).path_record


@pytest.mark.parametrize("form", ["path", "path-bn"])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_reading_and_writing_a_record_changes_nothing(form: str, gauge: str) -> None:
    before = json.loads(json.dumps(stored(form, gauge)))
    record = Record.from_json(before)
    assert record.to_json() == before
    assert (record.form, record.gauge, record.path_bn is not None) == (
        form,
        gauge,
        form == "path-bn",
    )


def test_attaching_a_record_makes_the_form() -> None:
    model = Bottleneck()
    assert form_of(model) == "plain"
    attach_record(model, Record.from_json(stored("path-bn")))
    assert form_of(model) == "path-bn"
    assert record_of(model).choices == {"scope": "network", "pivot": "matching", "gauge": "unit"}


def test_a_record_from_before_chains_were_recorded_can_be_read() -> None:
    before = copy.deepcopy(stored())
    del before["pivots"]["next_unit"], before["held_back"], before["row_ends"]
    record = Record.from_json(before)
    assert record.pivots.next_unit is None
    assert not record.held_back.size
    assert record.row_ends == {}
    assert "next_unit" not in record.to_json()["pivots"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("groups"), "the conversion record is damaged: KeyError: 'groups'"),
        (lambda r: r["pivots"].pop("row"), "the conversion record is damaged: KeyError: 'row'"),
        (
            lambda r: r.update(form="sideways"),
            "the conversion record is damaged: ValueError: there is no form 'sideways'",
        ),
        (
            lambda r: r.update(scales=[[1.0]]),
            "the conversion record is damaged: a factor is not a positive number",
        ),
        (
            lambda r: r["path_bn"].update(format_version=7),
            (
                "the Path-BN record has format version 7; this is pathconvert "
                f"{pathconvert.__version__}, which reads version 1"
            ),
        ),
        (
            lambda r: r["path_bn"]["layers"][0].pop("bn"),
            "the Path-BN record belongs to another network or is damaged: 'bn'",
        ),
    ],
    ids=["groups", "pivots", "form", "scales", "version", "layer"],
)
def test_a_damaged_record_is_refused_when_it_is_read(change: Any, message: str) -> None:
    damaged = copy.deepcopy(stored("path-bn"))
    change(damaged)
    with pytest.raises(RecordError) as refused:
        Record.from_json(damaged)
    assert str(refused.value) == message
