"""Batches of images depend on the seed and the epoch, and on no worker."""

import os

import pytest
import torch
from labelled_images import RECIPE, picture, refusal
from torch import Tensor

from pathconvert.errors import CheckpointError, DataError
from pathconvert.training.data.augmentation import Transform
from pathconvert.training.data.batches import epoch_batches
from pathconvert.training.data.images import Array, Images
from pathconvert.training.data.labelled import open_data


def numbered(count: int, shape: tuple[int, ...] = (10, 10)) -> Images:
    """Images of random pixels, whose labels are their indices."""
    return Images.of(
        [str(i) for i in range(count)],
        list(range(count)),
        Array(torch.from_numpy(picture(0, (count, *shape))), 3),
    )


def collect(
    images: Images, augmentation: str = "crop-flip", **options
) -> list[tuple[Tensor, Tensor]]:
    options = {"batch_size": 4, "epoch": 1, "seed": 3, "shuffle": True, "drop_last": True} | options
    found = epoch_batches(images, Transform(RECIPE, augmentation), **options)
    made = [(x.clone(), y.clone()) for x, y in found]
    assert len(made) == len(found)
    return made


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(y, v)
        assert torch.equal(x, u)


def test_a_batch():
    x, y = collect(numbered(10))[0]
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (4, 3, 8, 8), torch.int64, (4,))


@pytest.mark.parametrize("augmentation", ["crop-flip", "resized-crop"])
def test_an_epoch_goes_on_with_the_same_bits(augmentation):
    """From any batch on, with any number of workers, and in any state of torch's generator."""
    images = numbered(30)
    whole = collect(images, augmentation)
    assert len(whole) == 7
    torch.manual_seed(99)
    for start in (0, 3, 7):
        assert_same(collect(images, augmentation, start_batch=start), whole[start:])
    assert_same(collect(images, augmentation, start_batch=2, workers=2), whole[2:])


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for workers in (0, 1):
        collect(numbered(9), workers=workers)
    assert torch.equal(torch.rand(3), expected)


def test_processes_share_the_images_that_one_would_see():
    images = numbered(32)
    alone = collect(images, batch_size=8)
    shared = [collect(images, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for (x, y), *parts in zip(alone, *shared, strict=True):
        together = dict(
            zip(
                torch.cat([p[1] for p in parts]).tolist(),
                torch.cat([p[0] for p in parts]),
                strict=True,
            )
        )
        assert sorted(together) == sorted(y.tolist())
        assert all(
            torch.equal(together[int(label)], image) for image, label in zip(x, y, strict=True)
        )


def test_order_and_chance_differ_from_epoch_to_epoch():
    images = numbered(16)
    runs = [collect(images, epoch=epoch, batch_size=16)[0] for epoch in (0, 1)]
    assert sorted(runs[0][1].tolist()) == sorted(runs[1][1].tolist()) == list(range(16))
    assert runs[0][1].tolist() != runs[1][1].tolist()
    first, second = ({int(label): image for image, label in zip(*run, strict=True)} for run in runs)
    assert sum(torch.equal(first[i], second[i]) for i in range(16)) < 4
    other = collect(images, seed=4, epoch=0, batch_size=16)[0]
    assert other[1].tolist() != runs[0][1].tolist()


def test_incomplete_batches():
    sizes = [len(y) for _, y in collect(numbered(10), drop_last=False)]
    assert sizes == [4, 4, 2]
    assert [len(y) for _, y in collect(numbered(10))] == [4, 4]
    assert str(refusal(collect, numbered(3))) == "3 images are fewer than one batch, which has 4"
    assert (
        str(refusal(collect, numbered(7), world_size=2))
        == "7 images are fewer than one batch, which has 8"
    )


@pytest.mark.parametrize("count", [1, 9, 10])
def test_without_shuffling_every_image_comes_once(count):
    options = {"shuffle": False, "drop_last": False, "world_size": 2}
    shares = [collect(numbered(count), "none", rank=rank, **options) for rank in (0, 1)]
    labels = [[int(label) for _, y in share for label in y] for share in shares]
    assert labels == [list(range(0, count, 2)), list(range(1, count, 2))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(flowers, workers):
    path = flowers / "train" / "lily" / "03.png"
    path.write_bytes(path.read_bytes()[:100])
    error = refusal(collect, open_data(flowers).train, workers=workers)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"{path} is not an intact image: ")
    assert error.tip == "Remove it from the folder, or replace it."


def end_worker(_: int) -> Tensor:
    os._exit(1)


def test_a_worker_that_was_ended_is_told_in_one_line():
    error = refusal(collect, Images.of(["0"] * 8, [0] * 8, end_worker), workers=1)
    assert isinstance(error, DataError)
    assert str(error).startswith("a process that reads images was killed: DataLoader worker (pid")


def test_workers_use_one_thread():
    seen = collect(Images.of(["0"] * 4, [0] * 4, threads), "none", workers=1)
    image = RECIPE.normalise(torch.ones(3, 8, 8, dtype=torch.uint8))
    assert torch.equal(seen[0][0][0], image)


def threads(_: int) -> Tensor:
    """The number of threads that this process uses, as an image."""
    return torch.full((3, 9, 9), torch.get_num_threads(), dtype=torch.uint8)
