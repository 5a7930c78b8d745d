"""Which output belongs to which class of the data: by name where possible, else by position."""

from __future__ import annotations

import pytest
import torch

from pathconvert.errors import PathconvertError
from pathconvert.training.data.images import Images
from pathconvert.training.data.labelled import Data
from pathconvert.training.data.matching import match_labels

LABELS = [2, 0, 1, 2, 1]


def data(*classes: str) -> Data:
    """Data of these classes with five held-out images, whose labels are ``LABELS``."""
    images = Images.of([f"{i}.png" for i in range(5)], LABELS, lambda _: torch.zeros(3, 4, 4))
    return Data("animals", classes, images, images, 3, (4, 4), "digest", split=False)


def test_the_same_names_in_the_same_order():
    matched = match_labels(data("ant", "bee", "cat"), "net", ("ant", "bee", "cat"), 3)
    assert matched.labels.tolist() == LABELS
    assert matched.note == ""


def test_the_same_names_in_another_order():
    matched = match_labels(data("ant", "bee", "cat"), "net", ("cat", "ant", "bee"), 3)
    assert matched.labels.tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in LABELS]
    assert matched.labels.dtype == torch.int64
    assert matched.note == ""


def test_some_of_the_networks_classes():
    names = ("eel", "cat", "dog", "ant", "bee")
    matched = match_labels(data("ant", "bee", "cat"), "net", names, 5)
    assert [names[i] for i in matched.labels] == [("ant", "bee", "cat")[label] for label in LABELS]
    assert matched.note == ""


def test_no_names_are_recorded():
    matched = match_labels(data("ant", "bee", "cat"), "net", None, 3)
    assert matched.labels.tolist() == LABELS
    assert matched.note == ""


def test_as_many_classes_with_other_names_are_matched_by_position():
    matched = match_labels(data("ant", "wasp", "cat"), "net", ("ant", "bee", "cat"), 3)
    assert matched.labels.tolist() == LABELS
    assert (
        matched.note
        == "the network has no class 'wasp', so the data's classes were matched by position"
    )


def test_a_name_that_the_network_has_twice_says_nothing():
    """ImageNet has two classes named crane: a bird and a machine."""
    matched = match_labels(data("ant", "crane", "eel"), "net", ("crane", "ant", "crane"), 3)
    assert matched.labels.tolist() == LABELS
    assert (
        matched.note
        == "the network has no class 'eel', so the data's classes were matched by position"
    )
    with pytest.raises(PathconvertError, match="animals has 2 classes, but net has 3"):
        match_labels(data("ant", "crane"), "net", ("crane", "ant", "crane"), 3)


@pytest.mark.parametrize(
    "names",
    [
        None,
        ("ant", "bee", "dog", "eel"),  # cat is missing
        ("ant", "bee", "cat"),  # not as many names as outputs, so they are not used
    ],
)
def test_another_number_of_classes_is_refused(names):
    with pytest.raises(PathconvertError) as refused:
        match_labels(data("ant", "bee", "cat"), "net", names, 4)
    assert str(refused.value) == "animals has 3 classes, but net has 4"
    assert (
        refused.value.tip
        == "Give the data that the network was trained for: as many class folders, or folders"
        " named "
        "after its classes."
    )
