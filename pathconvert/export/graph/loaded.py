"""Export a network that was loaded from a file, with its model card and images to compare on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pathconvert.errors import PathconvertError
from pathconvert.export.card import ModelCard
from pathconvert.export.graph.export import ExportReport, export_with
from pathconvert.export.graph.options import ExportOptions
from pathconvert.networks.images import folder_images
from pathconvert.networks.inputs import load_images, random_input
from pathconvert.networks.loading import LoadedNetwork


def card_of(network: LoadedNetwork) -> ModelCard:
    """The model card of a file that is exported from ``network``."""
    file = network.checkpoint
    return ModelCard(
        architecture=network.architecture,
        form=network.form,
        source_name=file.path.name if file else None,
        source_sha256=file.sha256 if file else None,
        preprocessing=network.preprocessing,
        labels=network.labels,
    )


def parse_batch(text: str) -> int | None:
    """Parse a batch size: ``dynamic`` → None, ``4`` → 4.

    Raises:
        PathconvertError: the text is neither ``dynamic`` nor a positive number.
    """
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise PathconvertError(
            f"{text!r} is not a batch size", "Give --batch dynamic, or a number such as --batch 1."
        )
    return int(text)


def export_network(
    network: LoadedNetwork,
    path: Path,
    options: ExportOptions | None = None,
    *,
    batch: int | None = None,
    with_preprocessing: bool = False,
    images: Path | None = None,
    force: bool = False,
    **changes: Any,
) -> tuple[ExportReport, ModelCard]:
    """Do what :func:`~pathconvert.export.graph.export.export_onnx` does, for a loaded network.

    Args:
        network: a network in any form.
        path: the file to write.
        options: of the export; None for the defaults. The batch, the preprocessing, the card and
            the images are filled in.
        batch: the fixed batch size; None for a dynamic one.
        with_preprocessing: put the recorded normalisation into the graph.
        images: a folder of images to compare on, besides random inputs.
        force: replace an existing file.
        **changes: fields of ``options`` to replace.

    Returns:
        The report, and the card that was written into the file.

    Raises:
        PathconvertError: the network is a detector, its preprocessing is not known but was asked
            for, or the export is refused.
        OutputError: the path cannot be written.
        EquivalenceError: the graph does not compute what the network computes.
    """
    architecture, card = network.architecture, card_of(network)
    if architecture.task == "detection":
        raise PathconvertError(
            f"{architecture.name} is a detector and is not exported: the number of boxes depends "
            "on the image, which a graph of standard operators cannot follow",
            "Export its backbone from Python: "
            "pathconvert.export.export_onnx(model.backbone.body, …).",
        )
    if with_preprocessing and card.preprocessing is None:
        raise PathconvertError(
            f"the preprocessing of {architecture.name} is not known, "
            "so it cannot go into the graph",
            "Give it, such as --mean 0.5 --std 0.5, or leave --with-preprocessing out.",
        )
    found = folder_images(images) if images else None
    options = dataclasses.replace(
        options or ExportOptions(),
        dynamic_batch=batch is None,
        preprocessing=card.preprocessing if with_preprocessing else None,
        card=card,
        images=load_images(found, architecture, card.preprocessing) if found else None,
        **changes,
    )
    report = export_with(
        network.model,
        path,
        random_input(architecture, batch or 2),
        options,
        force=force,
        source=network.checkpoint.path if network.checkpoint else None,
    )
    return report, options.filled_card()


def report_rows(report: ExportReport, card: ModelCard) -> dict[str, str]:
    """The report as the rows of a table, title → text."""
    left = (
        f", {report.batch_norms_left} of them BatchNorms left"
        if report.batch_norms_left
        else ", no BatchNorm"
    )
    ratio = report.file_bytes / max(1, report.weight_bytes)
    shapes = ", ".join("×".join(map(str, shape)) for shape in report.checked_shapes)
    equality = f"error {report.max_error:.1e}"
    if report.precision == "fp32":
        equality += f", {report.noise_ratio:.1f} × float32's own noise"
    rows = {
        "network": card.architecture.name if card.architecture else "unknown",
        "form": card.form,
        "graph": f"opset {report.opset}, {report.precision}, {report.nodes} nodes{left}",
        "file": f"{report.file_bytes / 1e6:.1f} MB, {ratio:.3f} × the weights",
        "equality": f"{equality} (ONNX Runtime against float64, inputs {shapes})",
    }
    for i, note in enumerate(report.notes):
        rows["notes" if i == 0 else " " * i] = note
    return rows | {
        "time": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    }
