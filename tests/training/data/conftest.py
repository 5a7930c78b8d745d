"""A data set in folders."""

from pathlib import Path

import pytest
from labelled_images import class_folders


@pytest.fixture
def flowers(tmp_path) -> Path:
    """A data set with two parts and three classes."""
    class_folders(tmp_path / "flowers" / "train", {"rose": 6, "aster": 4, "lily": 8})
    class_folders(tmp_path / "flowers" / "val", {"rose": 2, "aster": 3, "lily": 2})
    return tmp_path / "flowers"
