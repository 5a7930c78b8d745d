"""The commands, and the one place where errors become a line and a tip.

torch is imported inside the commands: ``pathconvert --help`` has to be quick.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathconvert.errors import ArchitectureError, EquivalenceError, OutputError, PathconvertError, RecordError
from pathconvert.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from pathconvert.files import LoadedNetwork

INTERRUPTED = 130

app = typer.Typer(
    help="Move pretrained ReLU networks into path space and back, exactly.",
    epilog="Start with: pathconvert demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Scope(StrEnum):
    block = "block"
    network = "network"


class PivotChoice(StrEnum):
    matching = "matching"
    max = "max"
    diagonal = "diagonal"


class Form(StrEnum):
    path = "path"
    path_bn = "path-bn"


class GaugeChoice(StrEnum):
    unit = "unit"
    pow2 = "pow2"


class ExportGauge(StrEnum):
    keep = "keep"
    balanced = "balanced"


class DeviceChoice(StrEnum):
    auto = "auto"
    cuda = "cuda"
    tensorrt = "tensorrt"
    cpu = "cpu"


class _Settings:
    """What holds for the whole process."""

    debug = False


def _set_debug(value: bool) -> None:
    _Settings.debug = _Settings.debug or value


Source = Annotated[str, typer.Argument(help="A .pt, .pth or .safetensors file, or a torchvision name (resnet50).")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The file to write: .safetensors, .pt or .pth.")]
Arch = Annotated[
    str | None, typer.Option(help="A torchvision name, package.module:builder or timm/NAME; else recognised.")
]
InputSize = Annotated[str | None, typer.Option(help="Such as 3x32x32, where the architecture does not tell.")]
NumClasses = Annotated[int | None, typer.Option(help="Overrides the number that the tensors show.", min=1)]
Key = Annotated[str | None, typer.Option(help="The wrapper key to take, such as model_ema.")]
Device = Annotated[DeviceChoice, typer.Option(help="auto takes a GPU if one works, and says when it does not.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Load a pickled module, which runs its code.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show tracebacks.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pathconvert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


# ---- output ----------------------------------------------------------------------------------------------------


def _note(message: str) -> None:
    """A remark for people: stderr."""
    typer.echo(message, err=True)


def _emit(result: dict[str, Any], table: Table, as_json: bool) -> None:
    """The result: a table on stdout, or one JSON object instead."""
    if as_json:
        finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no Infinity
        typer.echo(json.dumps(finite))
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(table)


def _table(title: str, rows: dict[str, str]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False, box=box.SIMPLE, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


class _Steps:
    """Progress over named steps, shown on stderr once they have taken two seconds."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total)
        self._timer = threading.Timer(2.0, self._progress.start)
        self._timer.daemon = True
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The bar, while the steps run."""
        self._timer.start()
        try:
            yield
        finally:
            self._timer.cancel()
            if self._progress.live.is_started:
                self._progress.stop()
            self.seconds["total"] = time.perf_counter() - self._begun

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One of them; its seconds add up under its name."""
        begun = time.perf_counter()
        self._progress.update(self._task, description=name)
        yield
        self._progress.advance(self._task)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


# ---- loading ---------------------------------------------------------------------------------------------------


def _open(
    source: str,
    arch: str | None = None,
    input_size: str | None = None,
    num_classes: int | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
) -> LoadedNetwork:
    """Load a network and say what was chosen on the way."""
    from pathconvert.architectures import parse_input_size
    from pathconvert.files import open_network

    size = parse_input_size(input_size) if input_size else None
    network = open_network(
        source, arch=arch, num_classes=num_classes, input_size=size, key=key, trust_pickle=trust_pickle
    )
    if network.checkpoint and network.checkpoint.key:
        _note(f"{source}: taking the weights under {network.checkpoint.key!r}")
    if network.checkpoint and network.checkpoint.prefix:
        _note(f"{source}: prefix {network.checkpoint.prefix!r} removed from every name")
    return network


def _open_pair(a: str, b: str, arch: str | None, input_size: str | None, trust_pickle: bool) -> list[LoadedNetwork]:
    """Two forms of one network; a converted file knows what a plain checkpoint of an own class does not tell."""
    opened: dict[str, LoadedNetwork] = {}
    refusals: list[ArchitectureError] = []
    for source in (a, b, a, b):
        if source in opened:
            continue
        known = next((n.architecture for n in opened.values()), None) if refusals else None
        size = "x".join(map(str, known.input_size)) if known and known.input_size else None
        try:
            name, classes = (known.name, known.arguments.get("num_classes")) if known else (arch, None)
            opened[source] = _open(source, name, input_size or size, classes, trust_pickle=trust_pickle)
        except ArchitectureError as error:
            refusals.append(error)
            if len(refusals) == 2 or arch:
                raise refusals[0] from None
    return [opened[a], opened[b]]


def _stem(source: str, kind: str) -> str:
    """``a/resnet50.pt`` → ``resnet50``; on the way back also ``resnet50.path.safetensors`` → ``resnet50``."""
    stem = Path(source).name
    for suffix in (".safetensors", ".pth", ".pt"):
        stem = stem.removesuffix(suffix)
    return stem if kind == "path" else stem.removesuffix(".path").removesuffix(".path-bn")


def _output(source: str, output: Path | None, kind: str, force: bool) -> Path:
    """Where the result goes, checked before any work."""
    from pathconvert.checkpoint import prepare_output

    file = Path(source)
    path = output or (file.parent if file.exists() else Path()) / f"{_stem(source, kind)}.{kind}.safetensors"
    return prepare_output(path, force=force, source=file if file.exists() else None)


# ---- commands --------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: pathconvert reparam resnet50.pt --pivot max -o resnet50.path.safetensors; "
    "pathconvert reparam resnet50.pt --form path-bn --calibrate photos/"
)
def reparam(
    source: Source,
    output: Output = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    scope: Annotated[
        Scope, typer.Option(help="block leaves residual streams alone; network takes them.")
    ] = Scope.block,
    pivot: Annotated[PivotChoice, typer.Option(help="Which outgoing weight becomes ±1.")] = PivotChoice.matching,
    gauge: Annotated[GaugeChoice, typer.Option(help="unit: pivots ±1; pow2: bit-identical.")] = GaugeChoice.unit,
    form: Annotated[Form, typer.Option(help="path: rescaled weights; path-bn: Path-BN layers, to train.")] = Form.path,
    calibrate: Annotated[Path | None, typer.Option(help="Folder of images for Path-BN's statistics.")] = None,
    skip_scale: Annotated[float, typer.Option(help="λ of Path-BN's skip; 0.1 is the papers' for ResNets.")] = 1.0,
    partial: Annotated[bool, typer.Option("--partial", help="Pin what is not homogeneous, convert the rest.")] = False,
    key: Key = None,
    force: Force = False,
    report: Annotated[Path | None, typer.Option(help="Write every group and pivot to this JSON file.")] = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Move a network into path space: same class, names, shapes and dtypes; proven equal before the file appears."""
    del debug
    steps = _Steps(3 + bool(report) + (form == Form.path_bn))
    if form == Form.path and (calibrate or skip_scale != 1):
        raise PathconvertError("--calibrate and --skip-scale belong to Path-BN", "Add --form path-bn.")
    from pathconvert import reports

    path = _output(source, output, form.value, force)
    if report:
        reports.prepare_report(report, force=force, taken=(Path(source), path))
    with steps.shown():
        with steps.step("load"):
            network = _open(source, arch, input_size, num_classes, key, trust_pickle)
        from pathconvert.conversions import convert_network, enter_path_bn, resume_conversion, save_checked
        from pathconvert.path_bn import record_of

        if network.form == form or network.form == "path-bn":
            raise RecordError(f"{source} is converted already", f"Restore it first: pathconvert restore {source}")
        with steps.step("convert"):
            conversion = (
                resume_conversion(network)
                if network.record
                else convert_network(network, scope.value, pivot.value, gauge.value, partial)
            )
        path_bn = None
        if form == Form.path_bn:
            with steps.step("Path-BN"):
                conversion, path_bn = enter_path_bn(network, conversion, calibrate, skip_scale)
        with steps.step("verify and write"):
            equality = save_checked(path_bn or conversion, network, path, force=force)
        if report:
            with steps.step("report"):
                reports.write_report(conversion, report)
    parts = record_of(path_bn)["path_bn"] if path_bn else None
    if network.record:
        _note(f"note: {source} is in path form; its scope, pivot rule and gauge were kept")
    summary = reports.summarise(conversion, parts, network, equality, steps.seconds)
    summary |= {"source": source, "output": str(path)}
    for note in summary["notes"]:
        _note(f"note: {note}")
    _emit(summary, _table(f"{source} → {path}", reports.summary_rows(summary)), as_json)


@app.command(epilog="Example: pathconvert restore resnet50.path.safetensors -o resnet50.pt")
def restore(
    source: Source,
    output: Output = None,
    arch: Arch = None,
    input_size: InputSize = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take a conversion back: the original network, fine-tuned or not."""
    del debug
    steps = _Steps(2)
    path = _output(source, output, "restored", force)
    with steps.shown():
        with steps.step("load"):
            network = _open(source, arch, input_size)
        if network.record is None:
            raise RecordError(
                f"{source} was never converted by pathconvert: it holds no conversion record",
                "Give the .path.safetensors file that pathconvert reparam wrote.",
            )
        from pathconvert.conversions import restore_checked

        with steps.step("restore, verify and write"):
            equality, identical = restore_checked(network, path, force=force)
    from pathconvert import reports

    result = {
        "source": source,
        "output": str(path),
        "architecture": network.architecture.name,
        "equality": equality.to_json(),
        "bit_identical_to_the_original": identical,
        "seconds": steps.seconds,
    }
    rows = {"network": network.architecture.name, "equality": reports.equality_text(equality)}
    rows["original file"] = "restored to the bit" if identical else "restored to rounding (2 units in the last place)"
    _emit(result, _table(f"{source} → {path}", rows | {"time": f"{steps.seconds['total']:.1f} s"}), as_json)


@app.command(
    epilog="Examples: pathconvert export resnet50.pt -o resnet50.onnx; "
    "pathconvert export resnet50.pt --precision fp16 --gauge balanced"
)
def export(
    source: Source,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .onnx file to write.")] = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    opset: Annotated[int, typer.Option(help="18 to 24.")] = 20,
    precision: Annotated[str, typer.Option(help="fp32 or fp16; inputs and outputs stay float32.")] = "fp32",
    gauge: Annotated[
        ExportGauge, typer.Option(help="balanced: even out the channels' ranges, for fp16.")
    ] = ExportGauge.keep,
    batch: Annotated[str, typer.Option(help="dynamic, or a fixed number.")] = "dynamic",
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Height and width dynamic too.")] = False,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="The graph takes uint8 pixels and normalises them.")
    ] = False,
    with_softmax: Annotated[bool, typer.Option("--with-softmax", help="Probabilities in place of logits.")] = False,
    auxiliary: Annotated[bool, typer.Option("--auxiliary", help="A segmentation network's second output too.")] = False,
    images: Annotated[Path | None, typer.Option(help="Compare on the images of this folder too.")] = None,
    key: Key = None,
    force: Force = False,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Fold and write one .onnx file; proven equal in ONNX Runtime before it appears."""
    del debug
    steps = _Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.export.networks import check_export, export_network, parse_batch, report_rows

            file = Path(source)
            path = output or (file.parent if file.exists() else Path()) / f"{_stem(source, 'onnx')}.onnx"
            check_export(path, opset, precision, force=force, source=file if file.exists() else None)
            fixed = parse_batch(batch)
            network = _open(source, arch, input_size, num_classes, key, trust_pickle)
        with steps.step("export, verify and write"):
            report, card = export_network(
                network,
                path,
                batch=fixed,
                with_preprocessing=with_preprocessing,
                images=images,
                opset=opset,
                precision=precision,
                gauge=gauge.value,
                dynamic_size=dynamic_size,
                with_softmax=with_softmax,
                auxiliary=auxiliary,
                force=force,
            )
    result = report.to_json() | {"source": source, "output": str(path), "card": card.to_json()}
    result["seconds"] = report.seconds | steps.seconds
    _emit(result, _table(f"{source} → {path}", report_rows(report, card)), as_json)


@app.command(epilog="Example: pathconvert verify resnet50.pt resnet50.path.safetensors --images photos/")
def verify(
    a: Annotated[str, typer.Argument(help="The original.")],
    b: Annotated[str, typer.Argument(help="The other network, in any form.")],
    images: Annotated[Path | None, typer.Option(help="Compare on the images of this folder too.")] = None,
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Compare two networks of one architecture; exit 1 if they are not the same function."""
    del debug
    steps = _Steps(2)
    with steps.shown():
        with steps.step("load"):
            network_a, network_b = _open_pair(a, b, arch, input_size, trust_pickle)
        from pathconvert import reports
        from pathconvert.conversions import compare

        with steps.step("verify"):
            comparison = compare(network_a, network_b, images)
    result = comparison.to_json() | {"a": a, "b": b, "seconds": steps.seconds}
    rows = {"equality": reports.equality_text(comparison.equality)}
    if comparison.images:
        rows["images"] = f"same top-1 on {comparison.same_top1} of {comparison.images}"
    _emit(result, _table(f"{a} and {b}", rows | {"time": f"{steps.seconds['total']:.1f} s"}), as_json)
    if not comparison.passed:
        raise EquivalenceError(f"{a} and {b} are not the same function")


@app.command(epilog="Example: pathconvert inspect resnet50.pt")
def inspect(
    source: Source,
    arch: Arch = None,
    input_size: InputSize = None,
    key: Key = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Tell what a file is; for a plain checkpoint, how uneven its channel scales are."""
    del debug
    steps = _Steps(2)
    with steps.shown():
        with steps.step("load"):
            network = _open(source, arch, input_size, None, key, trust_pickle)
        from pathconvert import reports

        with steps.step("inspect"):
            result = {"file": source} | reports.inspect_network(network)
    _emit(result, _table(source, reports.inspection_rows(result)), as_json)


@app.command(epilog="Example: pathconvert bench squeezenet.onnx squeezenet1_1.pth --batch 1,8")
def bench(
    sources: Annotated[list[str], typer.Argument(help=".onnx files, checkpoints, torchvision names.")],
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8.", show_default="1,8")] = None,
    threads: Annotated[int | None, typer.Option(help="On the CPU, of each.", min=1)] = None,
    device: Device = DeviceChoice.auto,
    repeats: Annotated[int, typer.Option(help="Turns of each at every batch size.", min=1)] = 20,
    compile: Annotated[bool, typer.Option("--compile", help="Time checkpoints under torch.compile too.")] = False,
    io_binding: Annotated[bool, typer.Option("--io-binding", help="On a GPU, leave copies out.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="On a GPU, replay captured kernels.")] = False,
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Time networks in turns: ONNX files on ONNX Runtime, checkpoints in PyTorch. Ratios are over the first."""
    del debug
    sizes = _batch_sizes(batch)
    steps = _Steps(1)
    with steps.shown(), steps.step("load and measure"):
        from pathconvert.architectures import parse_input_size
        from pathconvert.export.bench import measure

        report = measure(
            sources,
            sizes,
            device=device.value,
            threads=threads,
            rounds=repeats,
            compile=compile,
            io_binding=io_binding,
            cuda_graph=cuda_graph,
            input_size=parse_input_size(input_size) if input_size else None,
            load=lambda source: _open(source, arch, input_size, trust_pickle=trust_pickle),
        )
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for name, reason in report.fallbacks.items():
        _note(f"note: {name} runs on the CPU: {reason}")
    size = "x".join(map(str, report.input_size))
    title = f"{size}, {report.threads} threads, {report.rounds} turns: median (quartiles)"
    table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold")
    table.add_column("network", overflow="fold")
    table.add_column("engine", no_wrap=True)
    for column in ("batch", "ms", "quartiles", "images/s", "× first"):
        table.add_column(column, justify="right", no_wrap=True)
    for t in report.timings:
        quartiles = f"{_short(t.low_ms)}–{_short(t.high_ms)}"
        speed = (_short(t.median_ms), quartiles, _short(t.throughput), _short(t.ratio))
        table.add_row(escape(Path(t.source).name), f"{t.engine}, {t.device}", str(t.batch), *speed)
    _emit(report.to_json() | {"seconds": steps.seconds}, table, as_json)


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _batch_sizes(text: str | None) -> list[int] | None:
    try:
        sizes = None if text is None else [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise PathconvertError(f"{text!r} is no list of batch sizes", "Such as --batch 1,8")
    return sizes


@app.command(epilog="Example: pathconvert predict squeezenet.onnx photos/ --top 3")
def predict(
    model: Annotated[str, typer.Argument(help="An .onnx file, a checkpoint of any form, or a torchvision name.")],
    images: Annotated[list[str], typer.Argument(help="Images, or folders of them.")],
    top: Annotated[int, typer.Option(help="Classes an image.", min=1)] = 5,
    device: Device = DeviceChoice.auto,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    key: Key = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Classify images, with the preprocessing and labels that are recorded for the network."""
    del debug
    steps = _Steps(1)
    with steps.shown(), steps.step("load and classify"):
        from pathconvert.architectures import parse_input_size
        from pathconvert.export.predict import predict as classify

        report = classify(
            model,
            images,
            top,
            device.value,
            input_size=parse_input_size(input_size) if input_size else None,
            load=lambda source: _open(source, arch, input_size, num_classes, key, trust_pickle),
        )
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if report.fallback:
        _note(f"note: {model} runs on the CPU: {report.fallback}")
    for note in report.notes:
        _note(f"note: {note}")
    table = Table(box=box.SIMPLE, title=escape(f"{model}, {report.engine} on {report.device}"), title_justify="left")
    for column in ("image", "class", "label", "probability"):
        table.add_column(column, justify="right" if column in ("class", "probability") else "left")
    for prediction in report.predictions:
        for note in prediction.notes:
            _note(f"note: {prediction.image}: {note}")
        for place, guess in enumerate(prediction.classes):
            name = escape(prediction.image) if place == 0 else ""
            table.add_row(name, str(guess.index), escape(guess.label or ""), f"{guess.probability:.1%}")
    _emit(report.to_json() | {"seconds": steps.seconds}, table, as_json)


@app.command(epilog="Example: pathconvert archs --json")
def archs(as_json: Json = False, debug: Debug = False) -> None:
    """List the networks that are supported, and why the rest is not."""
    del debug
    from rich import box
    from rich.table import Table

    from pathconvert.architectures import catalogue

    table = Table(box=box.SIMPLE, title="torchvision networks", title_justify="left", title_style="bold")
    for column in ("network", "task", "supported"):
        table.add_column(column, no_wrap=column != "supported")
    entries = catalogue()
    for entry in entries:
        table.add_row(entry.name, entry.task, "yes" if entry.supported else f"no: {entry.reason}")
    keys = ("name", "task", "supported", "reason")
    _emit({"architectures": [{k: getattr(e, k) for k in keys} for e in entries]}, table, as_json)
    _note("Any other module: --arch package.module:builder, or timm/NAME where timm is installed.")


@app.command(epilog="Example: pathconvert demo --output-dir demo")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the files go.")] = Path("demo"),
    debug: Debug = False,
) -> None:
    """Train a small ResNet on scikit-learn's digits; convert, verify, restore; then Path-BN, ONNX, and its speed."""
    del debug
    from pathconvert.checkpoint import prepare_output
    from pathconvert.demo import save_digits, train_digits

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {output_dir} cannot be made: {error.strerror}.", "Give another.") from error
    source = prepare_output(output_dir / "digits_resnet18.pt", force=True, source=None)
    accuracy = train_digits(source, _note)
    _note(f"trained a torchvision resnet18 on digits: {accuracy:.1%} correct on held-out images, saved as {source}")
    digits, onnx = output_dir / "digits", output_dir / "digits_resnet18.onnx"
    images = save_digits(digits, 64)
    path, restored, path_bn = (
        str(output_dir / f"digits_resnet18.{kind}.safetensors") for kind in ("path", "restored", "path-bn")
    )
    for title, arguments in (
        ("convert", ["reparam", str(source), "--input-size", "3x32x32", "--force", "-o", path]),
        ("verify", ["verify", str(source), path, "--input-size", "3x32x32", "--images", str(digits)]),
        ("restore", ["restore", path, "--force", "-o", restored]),
        (
            "Path-BN",
            ["reparam", path, "--form", "path-bn", "--calibrate", str(digits), "--force", "-o", path_bn],
        ),
        ("export", ["export", path_bn, "--images", str(digits), "--force", "-o", str(onnx)]),
        ("predict", ["predict", str(onnx), *map(str, images[:3]), "--top", "1"]),
        ("latency", ["bench", str(onnx), str(source), "--input-size", "3x32x32", "--batch", "1,8"]),
    ):
        _note(f"\n{title}: pathconvert {' '.join(arguments)}")
        app(arguments, standalone_mode=False)


# ---- the error boundary ----------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; typed errors become a line and a tip, others a line that asks for a report."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without → or × shows ? there
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


def _terminated(number: int, _: object) -> None:
    """A job manager's end is an exit: temporary files go."""
    sys.exit(128 + number)


def run(arguments: list[str]) -> int:
    """Run with ``arguments``; the exit code: 0 done, 1 a check failed, 2 wrong input or usage."""
    _Settings.debug = False
    try:
        app(arguments, prog_name="pathconvert")
    except SystemExit as done:
        if done.code == INTERRUPTED:  # typer catches the interrupt
            _note("interrupted")
        return done.code if isinstance(done.code, int) else 0
    except PathconvertError as error:
        return _explain(error, error.tip, error.exit_code)
    except KeyboardInterrupt:
        _note("interrupted")
        return INTERRUPTED
    except Exception as error:
        error_line = (str(error).strip().splitlines() or [""])[0]
        unexpected = f"unexpected {type(error).__name__}: {error_line}"
        return _explain(unexpected, "run again with --debug and report what it prints", 2)
    return 0


def _explain(error: object, tip: str, code: int) -> int:
    """One line and a tip, after the traceback where --debug asks for it."""
    if _Settings.debug:
        traceback.print_exc()
    _note(f"error: {' '.join(str(error).splitlines())}")
    if tip:
        _note(f"tip: {' '.join(tip.splitlines())}")
    return code


if __name__ == "__main__":
    main()
