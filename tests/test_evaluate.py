"""Top-1, top-5 and loss against their definitions, over batches, processes and forms; and the command."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pathconvert.errors import DataError, PathconvertError
from pathconvert.training.evaluate import EvaluationReport, evaluate


def batches_of(logits: Tensor, labels: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The logits themselves as images, so that the identity classifies."""
    return list(zip(logits.split(sizes), labels.split(sizes), strict=True))


def identity(images: Tensor) -> Tensor:
    return images


@pytest.fixture
def measured() -> tuple[Tensor, Tensor]:
    """Logits of 25 images in 12 classes, and labels that are among the first some of the time."""
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
        "top1": 0.5, "top5": 1.0, "loss": 0.7, "images": 10, "seconds": 2.0, "images_per_second": 5.0,
    }  # fmt: skip


def test_progress_and_batches_without_a_length(measured):
    seen = []
    made = batches_of(*measured, [10, 10, 5])
    evaluate(identity, made, num_classes=12, progress=lambda done, total: seen.append((done, total)))
    evaluate(identity, iter(made), num_classes=12, progress=lambda done, total: seen.append((done, total)))
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
        (identity, [0, 3], "an image is of class 3, and the network has 3 classes, 0 to 2"),
        (identity, [0, -1], "an image is of class -1, and the network has 3 classes, 0 to 2"),
        (lambda x: x[:, :2], [0, 1], "the network gives outputs of size 2×2, not 2×3 class scores"),
        (lambda x: (x,), [0, 1], "the network gives a tuple, no class scores"),
        (lambda x: x * math.nan, [0, 1], "the network gives outputs that are not finite"),
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
    """One of two processes: three images, or the other five."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
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
            context.Process(target=share, args=(rank, logits, labels, str(tmp_path / "meet"), results))
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        together = dict(results)
    assert together[0] == together[1]
    assert together[0] == pytest.approx((alone.top1, alone.top5, alone.loss, 8), rel=1e-7)  # float32 sums
