"""Images in class folders, how they are prepared, and what an error has to say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathconvert.errors import PathconvertError
from pathconvert.networks.preprocessing import Preprocessing

RECIPE = Preprocessing(9, (8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def picture(number: int, shape: tuple[int, ...] = (10, 12, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


def class_folders(
    folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (10, 12, 3)
) -> Path:
    """Class folders with the given number of images each, all different."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(1000 * place + i, shape)).save(folder / name / f"{i:02}.png")
    return folder


def refusal(call, *arguments, **options) -> PathconvertError:
    with pytest.raises(PathconvertError) as refused:
        call(*arguments, **options)
    assert len(str(refused.value).splitlines()) == 1
    assert refused.value.tip
    return refused.value
