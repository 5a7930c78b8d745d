"""Top-1, top-5 and loss against their definitions, over batches, processes and forms.

And the command.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_files import CLASSES, save_linear
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from pathconvert.cli import run
from pathconvert.errors import DataError, PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.labelled import Data, open_data
from pathconvert.training.run.metrics import EvaluationReport, evaluate

NAMES = ("ant", "bee", "cat", "dog", "eel")
RESNET = Architecture("resnet18", {"num_classes": CLASSES}, (3, 4, 4), "classification")
RECIPE = Preprocessing(6, (4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def batches_of(logits: Tensor, labels: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Batches whose images are the logits themselves, so that the identity classifies them."""
    return list(zip(logits.split(sizes), labels.split(sizes), strict=True))


def identity(images: Tensor) -> Tensor:
    return images


@pytest.fixture
def measured() -> tuple[Tensor, Tensor]:
    """Logits of 25 images in 12 classes, and labels that are sometimes among the highest scores."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(25, 12, generator=generator)
    ranks = torch.randint(0, 9, (25,), generator=generator)
    return logits, logits.argsort(1, descending=True)[torch.arange(25), ranks]


@pytest.mark.parametrize("sizes", [[25], [8, 8, 8, 1], [1] * 25])
def test_every_image_counts_the_same_in_batches_of_any_size(measured, sizes):
    logits, labels = measured
    report = evaluate(identity, batches_of(logits, labels, sizes), num_classes=12)
    places = (logits > logits.gather(1, labels[:, None])).sum(1)
    # float32 metrics
    assert report.top1 == pytest.approx(float((places < 1).double().mean()), abs=1e-7)
    assert report.top5 == pytest.approx(float((places < 5).double().mean()), abs=1e-7)
    assert 0 < report.top1 < report.top5 < 1
    assert report.loss == pytest.approx(float(cross_entropy(logits.double(), labels)), rel=1e-6)
    assert report.images == 25
    assert report.seconds > 0


def test_top5_of_fewer_classes():
    logits = torch.tensor([[1.0, 0.0, 0.5]] * 4)
    report = evaluate(identity, [(logits, torch.tensor([0, 1, 2, 1]))], num_classes=3)
    assert (report.top1, report.top5) == (0.25, 1.0)


def test_json():
    report = EvaluationReport(0.5, 1.0, 0.7, 10, 2.0)
    assert report.to_json() == {
        "top1": 0.5, "top5": 1.0, "loss": 0.7, "images": 10, "seconds": 2.0,
        "images_per_second": 5.0,
    }  # fmt: skip


def test_progress_and_batches_without_a_length(measured):
    seen = []
    made = batches_of(*measured, [10, 10, 5])
    evaluate(
        identity, made, num_classes=12, progress=lambda done, total: seen.append((done, total))
    )
    evaluate(
        identity,
        iter(made),
        num_classes=12,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]


def test_low_precision_outputs_are_measured_in_float32(measured):
    logits, labels = measured
    low = evaluate(lambda x: x.bfloat16(), [(logits, labels)], num_classes=12)
    exact = cross_entropy(logits.bfloat16().double(), labels)
    assert low.loss == pytest.approx(float(exact), rel=1e-6)


def test_outputs_with_two_sides_of_one(measured):
    logits, labels = measured
    report = evaluate(lambda x: x[:, :, None, None], [(logits, labels)], num_classes=12)
    assert report == EvaluationReport(report.top1, report.top5, report.loss, 25, report.seconds)


@pytest.mark.parametrize(
    ("classify", "labels", "message"),
    [
        (identity, [0, 3], "an image has class 3, but the network has 3 classes, 0 to 2"),
        (identity, [0, -1], "an image has class -1, but the network has 3 classes, 0 to 2"),
        (
            lambda x: x[:, :2],
            [0, 1],
            "the network's outputs have the size 2×2, not 2×3 as class scores have",
        ),
        (lambda x: (x,), [0, 1], "the network returns a tuple, not a tensor of class scores"),
        (lambda x: x * math.nan, [0, 1], "the network's outputs are not finite"),
    ],
)
def test_what_cannot_be_measured(classify, labels, message):
    with pytest.raises(PathconvertError) as refused:
        evaluate(classify, [(torch.zeros(2, 3), torch.tensor(labels))], num_classes=3)
    assert str(refused.value) == message


def test_nothing_to_measure():
    with pytest.raises(DataError, match="there are no images to measure on"):
        evaluate(identity, [], num_classes=3)


def test_no_gradients_are_kept():
    layer = torch.nn.Linear(4, 3)
    outputs = []

    def classify(images: Tensor) -> Tensor:
        outputs.append(layer(images))
        return outputs[-1]

    evaluate(classify, [(torch.ones(2, 4), torch.tensor([0, 1]))], num_classes=3)
    assert not outputs[0].requires_grad


def share(rank: int, logits: Tensor, labels: Tensor, file: str, results) -> None:
    """One of two processes, which has three of the images or the other five."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    report = evaluate(identity, [(logits[mine], labels[mine])], num_classes=12)
    results[rank] = (report.top1, report.top5, report.loss, report.images)
    torch.distributed.destroy_process_group()


def test_two_processes_measure_all_images_together(measured, tmp_path):
    logits, labels = (part[:8] for part in measured)
    alone = evaluate(identity, [(logits, labels)], num_classes=12)
    context = torch.multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [
            context.Process(
                target=share, args=(rank, logits, labels, str(tmp_path / "meet"), results)
            )
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        together = dict(results)
    assert together[0] == together[1]
    # float32 sums
    assert together[0] == pytest.approx((alone.top1, alone.top5, alone.loss, 8), rel=1e-7)


# ---- the command ---------------------------------------------------------------------------------


def class_folders(folder: Path, names: tuple[str, ...], count: int = 2) -> Path:
    """``val/`` with smooth images, and ``train/`` with as few as are allowed."""
    generator = np.random.default_rng(0)
    for part, images in (("train", 1), ("val", count)):
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 256, (2, 3, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC)
                image.save(folder / part / name / f"{i}.png")
    return folder


def result(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert run(["evaluate", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected(
    data: Data, weight: np.ndarray, recipe: Preprocessing, places: list[int]
) -> tuple[float, float]:
    """Top-1 and loss of the network of ``onnx_files.save_linear``, computed image by image."""
    right, loss = 0, 0.0
    for pixels, label in (data.val[i] for i in range(len(data.val))):
        scores = (
            recipe.normalise(recipe.place(pixels)).double().mean((1, 2))
            @ torch.from_numpy(weight).double()
        )
        right += int(scores.argmax()) == places[label]
        loss += float(cross_entropy(scores, torch.tensor(places[label]))) / len(data.val)
    return right / len(data.val), loss


def test_every_form_is_measured_alike(here, capsys):
    """Plain, path, Path-BN calibrated on the same images, ONNX with a fixed batch and a softmax."""
    class_folders(here / "d", NAMES)
    size = ("--size", "64")
    (here / "photos").symlink_to(here / "d" / "val" / "ant")
    for arguments in (
        ["reparam", "sq.pt", "--input-size", "3x64x64"],
        ["reparam", "sq.path.safetensors", "--form", "path-bn", "--calibrate", "photos"],
        [
            "export",
            "sq.pt",
            "-o",
            "sq.onnx",
            "--input-size",
            "3x64x64",
            "--with-softmax",
            "--batch",
            "4",
        ],
    ):
        assert run(arguments) == 0
    plain = result(capsys, "sq.pt", "--data", "d", *size)
    assert (plain["images"], plain["classes"], plain["engine"], plain["data"]) == (
        10,
        5,
        "torch",
        "d",
    )
    assert plain["top1"] <= plain["top5"] == 1
    for other in ("sq.path.safetensors", "sq.path-bn.safetensors", "sq.onnx"):
        found = result(capsys, other, "--data", "d", "--batch-size", "3")
        assert (found["top1"], found["images"]) == (plain["top1"], 10), other
        # float32 through other roundings
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-3), other


def test_against_the_definition(here, capsys):
    class_folders(here / "d", NAMES, 3)
    data = open_data(here / "d")
    for card, recipe in (
        (ModelCard(RESNET, preprocessing=RECIPE), RECIPE),
        (None, Preprocessing.plain((3, 4, 4))),
    ):
        weight = save_linear(here / "l.onnx", card=card)
        top1, loss = expected(data, weight, recipe, [0, 1, 2, 3, 4])
        found = result(capsys, "l.onnx", "--data", "d")
        assert (found["top1"], found["loss"]) == (
            pytest.approx(top1),
            pytest.approx(loss, rel=1e-5),
        )
    card = ModelCard(RESNET, preprocessing=RECIPE, preprocessing_in_graph=True)
    weight = save_linear(here / "bytes.onnx", kind=TensorProto.UINT8, card=card)
    # what goes in where the graph would normalise
    pixels = Preprocessing(6, (4, 4), (0.0,) * 3, (1 / 255,) * 3)
    loss = expected(data, weight, pixels, [0, 1, 2, 3, 4])[1]
    assert result(capsys, "bytes.onnx", "--data", "d")["loss"] == pytest.approx(loss, rel=1e-5)
    flagged = Preprocessing(4, (4, 4), (0.5,) * 3, (0.25, 0.5, 1.0))
    found = result(capsys, "l.onnx", "--data", "d", "--mean", "0.5", "--std", "0.25,0.5,1")
    assert found["loss"] == pytest.approx(
        expected(data, weight, flagged, [0, 1, 2, 3, 4])[1], rel=1e-5
    )
    assert result(capsys, "l.onnx", "--data", "d", "--workers", "1")["images"] == 15
    assert result(capsys, "l.onnx", "--data", "d", "--limit", "7")["images"] == 7


def test_classes_are_found_by_their_names(here, capsys):
    """The data has fewer classes than the network, in another order."""
    names = ("bee", "eel")
    weight = save_linear(
        here / "l.onnx", card=ModelCard(RESNET, preprocessing=RECIPE, labels=NAMES)
    )
    data = open_data(class_folders(here / "d", names, 4))
    top1, loss = expected(data, weight, RECIPE, [1, 4])
    found = result(capsys, "l.onnx", "--data", "d")
    assert (found["top1"], found["loss"]) == (pytest.approx(top1), pytest.approx(loss, rel=1e-5))


def test_a_fine_tuned_files_own_preprocessing_is_used(here, capsys):
    class_folders(here / "d", NAMES)
    assert run(["reparam", "sq.pt", "--input-size", "3x64x64"]) == 0
    path = here / "sq.path.safetensors"
    before = result(capsys, path, "--data", "d")
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["pathconvert"])
    stored["preprocessing"] = {"resize": 64, "crop": [64, 64], "mean": [0.0] * 3, "std": [1.0] * 3}
    save_file(load_file(path), path, {"pathconvert": json.dumps(stored)})
    after = result(capsys, path, "--data", "d")
    assert after["loss"] != before["loss"]
    flags = ("--mean", "0", "--std", "1")
    assert result(capsys, path, "--data", "d", *flags)["loss"] == after["loss"]


def test_the_table_and_its_notes(here, capsys):
    class_folders(here / "d", ("a", "b", "c", "d", "e"))
    save_linear(here / "l.onnx", card=ModelCard(RESNET, labels=NAMES))
    assert run(["evaluate", "l.onnx", "--data", "d", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("l.onnx on d\n")
    assert [line.split()[0] for line in printed.out.splitlines()[1:] if line.strip()] == [
        "top-1", "top-5", "loss", "images", "engine", "time",
    ]  # fmt: skip
    assert printed.err.splitlines() == [
        (
            "note: no preprocessing is recorded: images are resized to 4×4 and scaled to [0, 1],"
            " not normalised"
        ),
        "note: the network has no class 'a', so the data's classes were matched by position",
    ]


def test_refusals_of_the_command(refused, here):
    class_folders(here / "two", ("a", "b"))
    save_linear(here / "l.onnx")
    line, tip = refused("evaluate", "l.onnx", "--data", "two", "--device", "cpu")
    assert line == "error: two has 2 classes, but l.onnx has 5"
    assert tip.startswith("tip: Give the data that the network was trained for")
    assert (
        refused("evaluate", "l.onnx", "--data", "none", "--device", "cpu")[0]
        == "error: none does not exist; a folder of class folders is needed"
    )
    assert (
        refused("evaluate", "l.onnx", "--data", "two", "--size", "big")[0]
        == "error: --size 'big' is not a size"
    )
    assert (
        refused("evaluate", "l.onnx", "--data", "two", "--std", "x")[0]
        == "error: --std 'x' is not a list of numbers"
    )
    assert (
        refused("evaluate", "l.onnx", "--data", "two", "--size", "8", "--device", "cpu")[0]
        == "error: l.onnx takes images of size 3x4x4, not 3x8x8"
    )
    card = ModelCard(RESNET, preprocessing=RECIPE, preprocessing_in_graph=True)
    save_linear(here / "bytes.onnx", kind=TensorProto.UINT8, card=card)
    class_folders(here / "five", NAMES)
    assert (
        refused("evaluate", "bytes.onnx", "--data", "five", "--mean", "0", "--device", "cpu")[0]
        == "error: bytes.onnx normalises its input itself"
    )
    broken = here / "five" / "val" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for workers in (0, 1):
        line, tip = refused(
            "evaluate", "bytes.onnx", "--data", "five", "--workers", workers, "--device", "cpu"
        )
        assert line.startswith("error: five/val/cat/1.png is not an intact image: ")
