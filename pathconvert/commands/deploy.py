"""Commands that export networks and run them: export, bench, predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathconvert.choices import ExportGauge
from pathconvert.commands.console import Steps, emit, facts, grid, note
from pathconvert.commands.loading import Loader, default_output, source_file
from pathconvert.commands.options import (
    Arch,
    Device,
    Force,
    Images,
    InputSize,
    Json,
    Key,
    NumClasses,
    Prefix,
    Source,
    TrustPickle,
    with_image_options,
)
from pathconvert.errors import CheckpointError, PathconvertError
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pathconvert.commands.console import Titled
    from pathconvert.export.runtime.bench import BenchReport, Timing
    from pathconvert.export.runtime.predict import PredictReport


@with_image_options
def export(
    source: Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (.onnx).")
    ] = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 24.")] = 20,
    precision: Annotated[str, typer.Option(help="Precision of the graph: fp32 or fp16.")] = "fp32",
    io_dtype: Annotated[
        str, typer.Option(help="Type of inputs and outputs: fp32, or fp16 with --precision fp16.")
    ] = "fp32",
    gauge: Annotated[
        ExportGauge,
        typer.Option(
            help="keep leaves the channels' ranges as they are; balanced evens them out, which"
            " helps fp16."
        ),
    ] = "keep",
    batch: Annotated[str, typer.Option(help="Batch size: dynamic or a fixed number.")] = "dynamic",
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Make height and width dynamic, too.")
    ] = False,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing", help="Include the normalisation: the graph takes uint8 pixels."
        ),
    ] = False,
    with_softmax: Annotated[
        bool, typer.Option("--with-softmax", help="Output probabilities instead of logits.")
    ] = False,
    auxiliary: Annotated[
        bool,
        typer.Option("--auxiliary", help="Include the auxiliary output of a segmentation network."),
    ] = False,
    images: Images = None,
    given: ImageOptions = NOTHING_GIVEN,
    key: Key = None,
    prefix: Prefix = None,
    force: Force = False,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write a network as one ONNX file, and check it in ONNX Runtime."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.export.graph.export import SUFFIXES
            from pathconvert.export.graph.loaded import export_network, parse_batch, report_rows
            from pathconvert.export.graph.options import ExportOptions
            from pathconvert.files.writing import prepare_output
            from pathconvert.networks.prepared import image_notes

            path = output or default_output(source, ".onnx")
            options = ExportOptions(
                opset=opset,
                precision=precision,
                io_dtype=io_dtype,
                gauge=gauge,
                dynamic_size=dynamic_size,
                softmax=with_softmax,
                auxiliary=auxiliary,
            )
            prepare_output(path, force=force, source=source_file(source), suffixes=SUFFIXES)
            fixed = parse_batch(batch)
            loader = Loader(arch, input_size, num_classes, key, trust_pickle, prefix)
            network = loader.open_prepared(source, given)
        with steps.step("export, verify and write"):
            report, card = export_network(
                network,
                path,
                options,
                batch=fixed,
                with_preprocessing=with_preprocessing,
                images=images,
                force=force,
            )
    for remark in image_notes(network) if card.preprocessing or images else ():
        note(f"note: {remark}")
    result = report.to_json() | {"source": source, "output": str(path), "card": card.to_json()}
    result["seconds"] = report.seconds | steps.seconds
    emit(result, facts(f"{source} → {path}", report_rows(report, card)), as_json)


def bench(
    sources: Annotated[
        list[str],
        typer.Argument(help="Networks to time: .onnx files, checkpoints or torchvision names."),
    ],
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, separated by commas (default: 1,8).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per network.", min=1)] = None,
    device: Device = "auto",
    repeats: Annotated[
        int, typer.Option(help="Timed turns of each network at each batch size.", min=1)
    ] = 20,
    compile: Annotated[
        bool, typer.Option("--compile", help="Time checkpoints with torch.compile as well.")
    ] = False,
    io_binding: Annotated[
        bool,
        typer.Option("--io-binding", help="On a GPU, do not time copies of inputs and outputs."),
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On a GPU, replay a captured CUDA graph.")
    ] = False,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    prefix: Prefix = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Compare the speed of networks: ONNX files in ONNX Runtime, checkpoints in PyTorch."""
    batch_sizes = _batch_sizes(batch)
    if (io_binding or cuda_graph) and not any(
        Path(source).suffix.lower() == ".onnx" for source in sources
    ):
        option = "--io-binding" if io_binding else "--cuda-graph"
        raise PathconvertError(
            f"{option} needs ONNX Runtime, and none of the networks is an .onnx file",
            f"Leave {option} out.",
        )
    steps = Steps(1)
    with steps.shown(), steps.step("load and measure"):
        from pathconvert.export.runtime.bench import measure

        loader = Loader(arch, input_size, num_classes, key, trust_pickle, prefix)
        loader.refuse_for_onnx(sources)
        report = measure(
            sources,
            batch_sizes,
            device=device,
            threads=threads,
            rounds=repeats,
            compile=compile,
            io_binding=io_binding,
            cuda_graph=cuda_graph,
            input_size=loader.size,
            load=loader.open,
        )
    for name, reason in report.fallbacks.items():
        note(f"note: {name} runs on the CPU: {reason}")
    emit(report.to_json() | {"seconds": steps.seconds}, _timing_table(report), as_json)


def _timing_table(report: BenchReport) -> Titled:
    """One row per timing. A device that all share stands in the title.

    A narrow terminal gets no quartiles.
    """
    devices = list(dict.fromkeys(t.device for t in report.timings))
    size = "x".join(map(str, report.input_size))
    title = f"{size}, {'/'.join(devices)}, {report.threads} threads, {report.rounds} turns: median"
    kinds = {"network": "wrap", "engine": "left"} | dict.fromkeys(
        ("batch", "ms", "images/s", "× first"), "right"
    )
    rows = [_timing_row(t, t.device if len(devices) > 1 else "") for t in report.timings]
    with_quartiles = dict.fromkeys(
        ("network", "engine", "batch", "ms", "quartiles", "images/s", "× first"), "right"
    )
    wide = grid(f"{title} (quartiles)", with_quartiles | kinds, rows)
    if wide.fits():
        return wide
    return grid(title, kinds, (row[:4] + row[5:] for row in rows))


def _timing_row(t: Timing, device: str) -> tuple[str, ...]:
    quartiles = f"{_short(t.low_ms)}–{_short(t.high_ms)}"
    speed = (_short(t.median_ms), quartiles, _short(t.throughput), _short(t.ratio))
    return (
        Path(t.source).name,
        f"{t.engine}, {device}" if device else t.engine,
        str(t.batch),
        *speed,
    )


def _short(value: float) -> str:
    """Three significant digits, or all digits before the point if there are more."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _batch_sizes(text: str | None) -> list[int] | None:
    try:
        batch_sizes = None if text is None else [int(size) for size in text.split(",")]
    except ValueError:
        batch_sizes = []
    if batch_sizes is not None and (not batch_sizes or min(batch_sizes) < 1):
        raise PathconvertError(
            f"{text!r} is not a list of batch sizes", "Give positive numbers, such as --batch 1,8."
        )
    return batch_sizes


@with_image_options
def predict(
    model: Annotated[
        str, typer.Argument(help="An .onnx file, a checkpoint in any form, or a torchvision name.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of images.")],
    top: Annotated[int, typer.Option(help="Classes shown per image.", min=1)] = 5,
    device: Device = "auto",
    given: ImageOptions = NOTHING_GIVEN,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    prefix: Prefix = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Classify images with the preprocessing and labels that are recorded for the network."""
    steps = Steps(1)
    with steps.shown(), steps.step("load and classify"):
        from pathconvert.export.runtime.predict import predict as classify

        loader = Loader(arch, input_size, num_classes, key, trust_pickle, prefix)
        loader.refuse_for_onnx([model])
        report = classify(
            model,
            images,
            top,
            device,
            input_size=loader.size,
            load=loader.opener(given),
            given=given,
        )
    if report.fallback:
        note(f"note: {model} runs on the CPU: {report.fallback}")
    for remark in report.notes:
        note(f"note: {remark}")
    for prediction in report.predictions:
        for remark in prediction.notes:
            note(f"note: {prediction.image}: {remark}")
    for one in report.unread:
        note(f"note: {one.reason}")
    columns = {"image": "wrap", "class": "right", "label": "wrap", "probability": "right"}
    table = grid(f"{model}, {report.engine} on {report.device}", columns, _guesses(report))
    emit(report.to_json() | {"seconds": steps.seconds}, table, as_json)
    if report.unread:
        count = len(report.unread)
        raise CheckpointError(
            f"{count} of {count + len(report.predictions)} images could not be read: "
            f"{', '.join(one.image for one in report.unread[:5])}{', …' if count > 5 else ''}",
            "Repair or remove them; the other images were classified.",
        )


def _guesses(report: PredictReport) -> Iterator[tuple[str, ...]]:
    for prediction in report.predictions:
        for place, guess in enumerate(prediction.classes):
            image = prediction.image if place == 0 else ""
            yield image, str(guess.index), guess.label or "", f"{guess.probability:.1%}"
