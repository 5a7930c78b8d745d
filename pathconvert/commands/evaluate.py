"""How well a network in any form classifies labelled images: evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathconvert.commands.console import Steps, emit, facts, note
from pathconvert.commands.loading import Loader
from pathconvert.commands.options import Arch, Device, DeviceChoice, InputSize, Json, Key, NumClasses, TrustPickle
from pathconvert.errors import PathconvertError

if TYPE_CHECKING:
    from torch import Tensor

    from pathconvert.export.runtime.classifiers import Classifier
    from pathconvert.networks.preprocessing import Preprocessing
    from pathconvert.training.data.labelled import Data

DataSpec = Annotated[
    str, typer.Option("--data", help="A folder with train/ and val/, one of class folders, or NAME:ROOT (cifar10:.).")
]


def evaluate(
    source: Annotated[str, typer.Argument(help="A checkpoint of any form, an .onnx file, or a torchvision name.")],
    data: DataSpec,
    batch_size: Annotated[int, typer.Option(help="Images a call.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Take so many images, evenly from the classes.", min=1)] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Of one folder of class folders, the share held out; else the run's, or 0.1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of that choice and of --limit; else the run's, or 0.", min=0)
    ] = None,
    device: Device = DeviceChoice.auto,
    workers: Annotated[int, typer.Option(help="Processes that read images.", min=0)] = 0,
    size: Annotated[
        str | None, typer.Option(help="Of the input, in place of what is recorded: 224 or 224x160.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="For values in [0, 1]: 0.5 or 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Top-1, top-5 and loss on the held-out images of labelled data."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.networks.preprocessing import parse_sides, parse_values
            from pathconvert.training.data.augmentation import Transform, choose_preprocessing
            from pathconvert.training.data.batches import batches
            from pathconvert.training.data.labelled import open_data
            from pathconvert.training.run.metrics import evaluate as measure

            sides, means, stds = parse_sides(size), parse_values(mean, "--mean"), parse_values(std, "--std")
            loader = Loader(arch, input_size, num_classes, key, trust_pickle)
            classifier, run = _open(source, loader, device.value, sides)
            seed = run.get("seed", 0) if seed is None else seed
            val_fraction = run.get("val_fraction", 0.1) if val_fraction is None else val_fraction
            channels = classifier.input_size[0]
            found = open_data(data, val_fraction=val_fraction, seed=seed, limit_val=limit, channels=channels)
            chosen = choose_preprocessing(classifier.preprocessing, classifier.input_size, mean=means, std=stds)
            classes = _number_of_classes(classifier)
            labels, remark = _labels(classifier, classes, found)
        with steps.step("evaluate"):
            made = batches(
                replace(found.val, labels=labels),
                Transform(_for_graph(classifier, chosen.preprocessing, given=bool(means or stds))),
                batch_size=classifier.batch if classifier.fixed_batch else batch_size,
                epoch=0,
                seed=seed,
                shuffle=False,
                workers=workers,
                drop_last=False,
            )
            report = measure(_classify(classifier), made, num_classes=classes, progress=steps.part)
    if classifier.fallback:
        note(f"note: {source} runs on the CPU: {classifier.fallback}")
    unknown = ""
    if found.split and not run:
        unknown = (
            f"{val_fraction:g} of {data} is held out, chosen by seed {seed}: not what a run by another seed held out"
        )
    for text in (chosen.note, remark, unknown):
        if text:
            note(f"note: {text}")
    rows = {
        "top-1": f"{report.top1:.2%}",
        f"top-{min(5, classes)}": f"{report.top5:.2%}",
        "loss": f"{report.loss:.4f}",
        "images": f"{report.images}, {report.images / report.seconds:.0f} a second",
        "engine": f"{classifier.engine} on {classifier.device}",
    }
    result = report.to_json() | {"source": source, "data": data, "classes": classes, "data_digest": found.digest}
    result |= {"engine": classifier.engine, "device": classifier.device, "steps": steps.seconds}
    emit(result, facts(f"{source} on {data}", rows | steps.total()), as_json)


# ---- what is measured ------------------------------------------------------------------------------------------------


def _open(source: str, loader: Loader, device: str, sides: tuple[int, int] | None) -> tuple[Classifier, dict[str, Any]]:
    """The source as a classifier, for inputs of ``sides`` where given; settings of the run that fine-tuned it."""
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


def _classify(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """Images → logits, float32; of a graph that gives probabilities their logarithms, which have the same softmax."""
    import torch

    def classify(images: Tensor) -> Tensor:
        missing = classifier.batch - len(images) if classifier.fixed_batch else 0
        inputs = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        if classifier.takes_pixels:
            inputs = (inputs * 255).round().to(torch.uint8)
        scores = torch.from_numpy(classifier.run(inputs.numpy()))[: len(images)].float()
        are = classifier.gives_probabilities
        if are is None:
            are = bool((scores >= 0).all() and ((scores.sum(1) - 1).abs() < 1e-3).all())
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log() if are else scores

    return classify


def _for_graph(classifier: Classifier, recipe: Preprocessing, *, given: bool) -> Preprocessing:
    """Without the normalisation where the graph does that itself.

    Raises:
        PathconvertError: another one was given.
    """
    if not classifier.takes_pixels:
        return recipe
    if given:
        raise PathconvertError(f"{classifier.name} normalises its input itself", "Leave --mean and --std out.")
    return replace(recipe, mean=(0.0,) * len(recipe.mean), std=(1.0,) * len(recipe.std))


def _number_of_classes(classifier: Classifier) -> int:
    import numpy as np

    batch = classifier.batch if classifier.fixed_batch else 1
    kind = np.uint8 if classifier.takes_pixels else np.float32
    shape = classifier.run(np.zeros((batch, *classifier.input_size), kind)).shape
    if len(shape) < 2 or any(side != 1 for side in shape[2:]):
        shown = "×".join(map(str, shape))
        raise PathconvertError(f"{classifier.name} gives outputs of size {shown}, no class scores")
    return int(shape[1])


def _labels(classifier: Classifier, classes: int, data: Data) -> tuple[Tensor, str]:
    """The held-out images' places in the output, and what is to be said of how they were found.

    Raises:
        PathconvertError: the data's classes are not the network's.
    """
    names = classifier.labels if classifier.labels and len(classifier.labels) == classes else None
    labels = data.val.labels
    if names == data.classes:
        return labels, ""
    if names and all(names.count(name) == 1 for name in data.classes):  # ImageNet has two kinds of crane
        import torch

        return torch.tensor([names.index(name) for name in data.classes])[labels], ""
    if len(data.classes) == classes:
        odd = next((name for name in data.classes if name not in (names or data.classes)), None)
        said = f"the network has no class {odd!r}: the data's classes were taken in their order" if odd else ""
        return labels, said
    raise PathconvertError(
        f"{data.name} has {len(data.classes)} classes, {classifier.name} {classes}",
        "Give the data that the network was trained for: as many class folders, or such as are called what it records.",
    )


# ---- options ---------------------------------------------------------------------------------------------------------
