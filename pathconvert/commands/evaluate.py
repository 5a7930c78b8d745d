"""The command evaluate: how well a network in any form classifies labelled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from pathconvert.commands.console import Steps, emit, facts, note
from pathconvert.commands.loading import Loader
from pathconvert.commands.options import (
    Arch,
    Device,
    InputSize,
    Json,
    Key,
    NumClasses,
    Prefix,
    TrustPickle,
    with_image_options,
)
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions

if TYPE_CHECKING:
    from pathconvert.export.runtime.engines import Engine
    from pathconvert.export.runtime.image_classifier import ImageClassifier
    from pathconvert.networks.preprocessing import Preprocessing
    from pathconvert.training.data.images import Images
    from pathconvert.training.run.metrics import EvaluationReport

DataSpec = Annotated[
    str,
    typer.Option(
        "--data",
        help=(
            "Labelled images: a folder with train/ and val/, a folder of class folders, "
            "or NAME:ROOT."
        ),
    ),
]


@with_image_options
def evaluate(
    source: Annotated[
        str, typer.Argument(help="A checkpoint in any form, an .onnx file, or a torchvision name.")
    ],
    data: DataSpec,
    batch_size: Annotated[int, typer.Option(help="Images per call.", min=1)] = 64,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only this many images, drawn evenly from the classes.", min=1),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of images held out from a folder of class folders "
            "(default: the run's, or 0.1)."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Random seed of the held-out images and of --limit (default: the run's, or 0).",
            min=0,
        ),
    ] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(help="Processes that read images.", min=0)] = 0,
    given: ImageOptions = NOTHING_GIVEN,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    prefix: Prefix = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Measure top-1, top-5 and loss on the held-out images of labelled data."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.export.runtime.scoring import logits_of
            from pathconvert.training.data.augmentation import Transform
            from pathconvert.training.data.batches import epoch_batches
            from pathconvert.training.run.metrics import evaluate as measure

            loader = Loader(arch, input_size, num_classes, key, trust_pickle, prefix)
            classifier = _open(source, loader, device, given)
            engine = classifier.engine
            test = labelled_test(
                classifier,
                data,
                val_fraction=val_fraction,
                seed=seed,
                limit=limit,
                given=given,
            )
        with steps.step("evaluate"):
            batches = epoch_batches(
                test.images,
                Transform(test.preprocessing),
                batch_size=engine.fixed_batch or batch_size,
                epoch=0,
                seed=0,
                shuffle=False,
                workers=workers,
                drop_last=False,
            )
            report = measure(
                logits_of(classifier), batches, num_classes=test.classes, progress=steps.part
            )
    if engine.fallback:
        note(f"note: {source} runs on the CPU: {engine.fallback}")
    for text in test.notes:
        note(f"note: {text}")
    result = report.to_json() | {"source": source, "data": data, "classes": test.classes}
    result |= {"data_digest": test.digest, "engine": engine.library, "device": engine.device}
    result["steps"] = steps.seconds
    rows = _rows(report, test.classes, engine) | steps.total()
    emit(result, facts(f"{source} on {data}", rows), as_json)


def _rows(report: EvaluationReport, classes: int, engine: Engine) -> dict[str, str]:
    """The rows of the table that evaluate prints."""
    return {
        "top-1": f"{report.top1:.2%}",
        f"top-{min(5, classes)}": f"{report.top5:.2%}",
        "loss": f"{report.loss:.4f}",
        "images": f"{report.images}, {report.images / report.seconds:.0f} per second",
        "engine": f"{engine.library} on {engine.device}",
    }


def _open(source: str, loader: Loader, device: str, given: ImageOptions) -> ImageClassifier:
    """Open the source as a classifier, with the user's options for its images."""
    from pathconvert.export.runtime.engines import open_engine
    from pathconvert.export.runtime.image_classifier import classifier_with

    loader.refuse_for_onnx([source])
    engine = open_engine(source, device, load=loader.opener(given))
    return classifier_with(engine, loader.size, given)


# ---- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledTest:
    """Labelled images as one classifier needs them.

    Attributes:
        images: the held-out images; labels are indices of the classifier's classes.
        preprocessing: what is left to do before the classifier takes an image.
        classes: number of the classifier's classes.
        digest: of the images that were found, and of their labels.
        notes: remarks for the user on how all this was chosen.
    """

    images: Images
    preprocessing: Preprocessing
    classes: int
    digest: str
    notes: tuple[str, ...]


def labelled_test(
    classifier: ImageClassifier,
    spec: str,
    *,
    val_fraction: float | None = None,
    seed: int | None = None,
    limit: int | None = None,
    given: ImageOptions = NOTHING_GIVEN,
) -> LabelledTest:
    """Find labelled images and match them to a classifier.

    Args:
        classifier: what will be measured.
        spec: the images, as :func:`~pathconvert.training.data.labelled.open_data` takes them.
        val_fraction: share that is held out, where the images have only one part; default: that of
            the run that fine-tuned the network, or 0.1.
        seed: of that choice and of ``limit``; default: the run's, or 0.
        limit: take at most this many images; None takes all.
        given: the user's options; those of the images are in the classifier already.

    Raises:
        DataError: the images cannot be used, or there is not one label per output.
        PathconvertError: the images' classes are not the network's, or its outputs are not class
            scores.
    """
    from pathconvert.export.runtime.scoring import number_of_classes, remaining_preprocessing
    from pathconvert.training.data.augmentation import choose_preprocessing
    from pathconvert.training.data.labelled import open_data
    from pathconvert.training.data.matching import match_labels

    engine, size = classifier.engine, classifier.input_size
    run = (engine.training or {}).get("settings", {})
    seed = run.get("seed", 0) if seed is None else seed
    val_fraction = run.get("val_fraction", 0.1) if val_fraction is None else val_fraction
    found = open_data(spec, val_fraction=val_fraction, seed=seed, limit_val=limit, channels=size[0])
    chosen = choose_preprocessing(engine.preprocessing, size, given=given)
    classes = number_of_classes(classifier)
    given.require_labels_for(classes, engine.name)
    matched = match_labels(found, engine.name, engine.labels, classes)
    held_out = (
        f"{val_fraction:g} of {spec} is held out, chosen by seed {seed}; "
        "a run with another seed held out other images"
    )
    notes = (chosen.note, matched.note, held_out if found.split and not run else "")
    return LabelledTest(
        images=replace(found.val, labels=matched.labels),
        preprocessing=remaining_preprocessing(engine, chosen.preprocessing),
        classes=classes,
        digest=found.digest,
        notes=tuple(text for text in notes if text),
    )
