"""How images are read, and how they are prepared for a network."""

import pickle

import pytest
import torch
from labelled_images import RECIPE, picture, refusal
from PIL import Image
from torch import nn

from pathconvert.errors import CheckpointError
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.augmentation import Transform, choose_preprocessing, preprocessing_of
from pathconvert.training.data.images import Array, Files, Images
from pathconvert.training.data.labelled import Data

# ---- reading -------------------------------------------------------------------------------------


def test_small_files_are_decoded_once(flowers):
    paths = sorted((flowers / "train" / "rose").iterdir())
    Image.fromarray(picture(1, (5, 5, 3))).save(paths[3])  # of another size: never kept
    reader = Files(paths, 3)
    reader.keep()
    first = [reader(i).clone() for i in range(6)]
    copy = pickle.loads(pickle.dumps(reader))
    for path in paths[:3]:
        path.unlink()
    assert all(torch.equal(reader(i), first[i]) for i in range(6))
    assert isinstance(refusal(copy, 0), CheckpointError)
    Image.fromarray(picture(2, (5, 5, 3))).save(paths[3])
    assert not torch.equal(reader(3), first[3])


def test_too_much_is_not_kept(flowers):
    paths = sorted((flowers / "train" / "rose").iterdir())
    reader = Files(paths, 3)
    reader.keep(limit=6 * 10 * 12 * 3 - 1)
    paths[0].unlink()
    assert str(refusal(reader, 0)) == f"{paths[0]} does not exist"


def test_arrays_of_grey_and_colour():
    grey, colour = (
        torch.from_numpy(picture(0, (2, 4, 5))),
        torch.from_numpy(picture(0, (2, 4, 5, 3))),
    )
    assert torch.equal(Array(grey, 3)(1), grey[1].expand(3, 4, 5))
    assert torch.equal(Array(colour, 3)(1), colour[1].permute(2, 0, 1))
    assert Array(colour, 1)(1).shape == (1, 4, 5)


# ---- preparing -----------------------------------------------------------------------------------


def test_evaluation_is_the_recorded_preprocessing():
    pixels = torch.from_numpy(picture(0, (3, 20, 13)))
    assert torch.equal(Transform(RECIPE)(pixels), RECIPE.normalise(RECIPE.place(pixels)))


def test_images_of_several_sizes_and_of_one_are_prepared_alike():
    images = [torch.from_numpy(picture(i, (3, 20, 13))) for i in range(3)]
    other = torch.from_numpy(picture(9, (3, 7, 9)))
    for augmentation in ("none", "crop-flip", "resized-crop"):
        transform, seeds = Transform(RECIPE, augmentation), [4, 5, 6, 7]
        together, mixed = transform.many(images, seeds), transform.many([*images, other], seeds)
        assert torch.equal(together, mixed[:3])
        assert mixed.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("side", "chosen"), [(32, "crop-flip"), (64, "crop-flip"), (65, "resized-crop")]
)
def test_auto_goes_by_the_inputs_size(side, chosen):
    pixels = torch.from_numpy(picture(0, (3, side, side)))
    recipe = Preprocessing.plain((3, side, side))
    auto, named = (Transform(recipe, name).many([pixels], [3]) for name in ("auto", chosen))
    assert torch.equal(auto, named)
    assert auto.shape == (1, 3, side, side)


def test_crop_flip_shifts_by_four_pixels_in_thirty_two():
    """Every result is the image padded with black, shifted by up to 4 and perhaps mirrored."""
    pixels = torch.from_numpy(picture(0, (1, 32, 32)))
    transform = Transform(Preprocessing.plain((1, 32, 32)), "crop-flip")
    padded = nn.functional.pad(pixels, (4,) * 4)
    possible = {}
    for top in range(9):
        for left in range(9):
            part = padded[:, top : top + 32, left : left + 32]
            possible[part.numpy().tobytes()] = (top, left, False)
            possible[part.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    seen = {
        possible[(image * 255).round().to(torch.uint8).numpy().tobytes()]
        for image in transform.many([pixels] * 200, range(200))
    }
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {True, False}


def test_small_and_grey_images_fill_a_large_input():
    images = Array(torch.from_numpy(picture(0, (2, 28, 28))), 3)
    recipe = choose_preprocessing(None, (3, 32, 32), image_size=(28, 28)).preprocessing
    assert Transform(recipe)(images(0)).shape == (3, 32, 32)
    assert Transform(recipe, "resized-crop")(images(0)).shape == (3, 32, 32)


def test_transforms_that_are_refused():
    assert str(refusal(Transform, RECIPE, "mixup")) == "there is no augmentation 'mixup'"
    uncropped = Preprocessing(8, None, (0.0,) * 3, (1.0,) * 3)
    assert (
        str(refusal(Transform, uncropped))
        == "preprocessing without a crop gives inputs of different sizes"
    )


def network_of(
    name: str = "resnet18",
    size: tuple[int, ...] | None = (3, 224, 224),
    task: str = "classification",
):
    return LoadedNetwork(nn.Identity(), Architecture(name, {}, size, task), None, ())


def data_of(height: int, width: int) -> Data:
    images = Images.of(["0"], [0], Array(torch.zeros(1, height, width, 3, dtype=torch.uint8), 3))
    return Data("x", ("a", "b"), images, images, 3, (height, width), "", split=False)


def test_the_networks_own_preprocessing():
    chosen = preprocessing_of(network_of(), data_of(300, 400))
    assert chosen.preprocessing == Preprocessing(
        256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    assert chosen.note == ""
    half = preprocessing_of(
        network_of(), data_of(300, 400), given=ImageOptions(size=(112, 112))
    ).preprocessing
    assert (half.resize, half.crop) == (128, (112, 112))


def test_small_images_keep_their_edges():
    chosen = preprocessing_of(network_of(size=(3, 64, 64)), data_of(28, 28))
    assert (chosen.preprocessing.resize, chosen.preprocessing.crop) == (64, (64, 64))
    assert chosen.note == "images of 28×28 are resized to 64×64, and no edges are cut off"


def test_what_nothing_is_known_of_gets_values_between_0_and_1():
    network = network_of("package:net", (3, 32, 32), "other")
    chosen = preprocessing_of(network, data_of(28, 28))
    assert chosen.preprocessing == Preprocessing(32, (32, 32), (0.0,) * 3, (1.0,) * 3)
    assert (
        chosen.note
        == "no preprocessing is recorded: images are resized to 32×32 and scaled to [0, 1], not"
        " normalised"
    )
    flagged = preprocessing_of(
        network, data_of(28, 28), given=ImageOptions((0.5,), (0.1, 0.2, 0.3))
    )
    assert (flagged.preprocessing.mean, flagged.preprocessing.std) == ((0.5,) * 3, (0.1, 0.2, 0.3))
    assert flagged.note == ""
    grey = preprocessing_of(network_of("package:net", (1, 32, 32), "other")).preprocessing
    assert grey.mean == (0.0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "--mean has 2 values for 3 channels"),
        ({"std": (0.0,)}, "--std must be positive, not 0"),
        ({"mean": (float("nan"),)}, "--mean nan is out of range"),
    ],
)
def test_flags_without_sense(options, message):
    def choose() -> None:
        preprocessing_of(network_of(), data_of(8, 8), given=ImageOptions(**options))

    assert str(refusal(choose)) == message


def test_networks_that_take_no_images():
    assert "takes inputs of size 3x16x112x112, which are not images" in str(
        refusal(preprocessing_of, network_of("r3d_18", (3, 16, 112, 112), "video"))
    )
    assert "the input size of a:b is not known" in str(
        refusal(preprocessing_of, network_of("a:b", None, "other"))
    )
