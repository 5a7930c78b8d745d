"""The command evaluate: how well a network in any form classifies labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathconvert.commands.console import Steps, emit, facts, note
from pathconvert.commands.loading import Loader
from pathconvert.commands.options import Arch, Device, DeviceChoice, InputSize, Json, Key, NumClasses, TrustPickle

if TYPE_CHECKING:
    from pathconvert.export.runtime.classifiers import Classifier
    from pathconvert.training.run.metrics import EvaluationReport

DataSpec = Annotated[
    str,
    typer.Option(
        "--data", help="Labelled images: a folder with train/ and val/, a folder of class folders, or NAME:ROOT."
    ),
]


def evaluate(
    source: Annotated[str, typer.Argument(help="A checkpoint in any form, an .onnx file, or a torchvision name.")],
    data: DataSpec,
    batch_size: Annotated[int, typer.Option(help="Images per call.", min=1)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="Use only this many images, drawn evenly from the classes.", min=1)
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of images held out from a folder of class folders (default: the run's, or 0.1)."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed of the held-out images and of --limit (default: the run's, or 0).", min=0),
    ] = None,
    device: Device = DeviceChoice.auto,
    workers: Annotated[int, typer.Option(help="Processes that read images.", min=0)] = 0,
    size: Annotated[
        str | None, typer.Option(help="Input size, such as 224 or 224x160 (default: the recorded size).")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel in [0, 1], such as 0.5 or 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each channel, given like --mean.")] = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Measure top-1, top-5 and loss on the held-out images of labelled data."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.export.runtime.scoring import logits_of, number_of_classes, remaining_preprocessing
            from pathconvert.networks.preprocessing import parse_sides, parse_values
            from pathconvert.training.data.augmentation import Transform, choose_preprocessing
            from pathconvert.training.data.batches import batches
            from pathconvert.training.data.labelled import open_data
            from pathconvert.training.data.matching import match_labels
            from pathconvert.training.run.metrics import evaluate as measure

            sides, means, stds = parse_sides(size), parse_values(mean, "--mean"), parse_values(std, "--std")
            loader = Loader(arch, input_size, num_classes, key, trust_pickle)
            classifier, run = _open(source, loader, device.value, sides)
            seed = run.get("seed", 0) if seed is None else seed
            val_fraction = run.get("val_fraction", 0.1) if val_fraction is None else val_fraction
            channels = classifier.input_size[0]
            found = open_data(data, val_fraction=val_fraction, seed=seed, limit_val=limit, channels=channels)
            chosen = choose_preprocessing(classifier.preprocessing, classifier.input_size, mean=means, std=stds)
            classes = number_of_classes(classifier)
            matched = match_labels(found, classifier.name, classifier.labels, classes)
        with steps.step("evaluate"):
            made = batches(
                replace(found.val, labels=matched.labels),
                Transform(remaining_preprocessing(classifier, chosen.preprocessing, given=bool(means or stds))),
                batch_size=classifier.batch if classifier.fixed_batch else batch_size,
                epoch=0,
                seed=seed,
                shuffle=False,
                workers=workers,
                drop_last=False,
            )
            report = measure(logits_of(classifier), made, num_classes=classes, progress=steps.part)
    if classifier.fallback:
        note(f"note: {source} runs on the CPU: {classifier.fallback}")
    held_out = ""
    if found.split and not run:
        held_out = (
            f"{val_fraction:g} of {data} is held out, chosen by seed {seed}; "
            "a run with another seed held out other images"
        )
    for text in (chosen.note, matched.note, held_out):
        if text:
            note(f"note: {text}")
    result = report.to_json() | {"source": source, "data": data, "classes": classes, "data_digest": found.digest}
    result |= {"engine": classifier.engine, "device": classifier.device, "steps": steps.seconds}
    emit(result, facts(f"{source} on {data}", _rows(report, classes, classifier) | steps.total()), as_json)


def _rows(report: EvaluationReport, classes: int, classifier: Classifier) -> dict[str, str]:
    """The rows of the table that evaluate prints."""
    return {
        "top-1": f"{report.top1:.2%}",
        f"top-{min(5, classes)}": f"{report.top5:.2%}",
        "loss": f"{report.loss:.4f}",
        "images": f"{report.images}, {report.images / report.seconds:.0f} per second",
        "engine": f"{classifier.engine} on {classifier.device}",
    }


def _open(source: str, loader: Loader, device: str, sides: tuple[int, int] | None) -> tuple[Classifier, dict[str, Any]]:
    """Open the source as a classifier, for inputs of ``sides`` if they are given.

    Returns:
        The classifier, and the settings of the run that fine-tuned it (empty if none did).
    """
    from pathconvert.export.runtime.classifiers import session_classifier, torch_classifier
    from pathconvert.export.runtime.providers import open_session

    loader.refuse_for_onnx([source])
    if Path(source).suffix.lower() == ".onnx":
        session = open_session(source, device)
        fixed = session.input_shape[1] if len(session.input_shape) > 1 else None
        channels = fixed if isinstance(fixed, int) else 3
        return session_classifier(session, (channels, *sides) if sides else loader.size), {}
    network = loader.open(source)
    if sides:
        channels = (network.architecture.input_size or (3,))[0]
        network = replace(network, architecture=replace(network.architecture, input_size=(channels, *sides)))
    return torch_classifier(source, network, device), (network.training or {}).get("settings", {})
