"""Export a network to one ``.onnx`` file of standard operators, and prove that it is equal before it takes its name.

The steps: fold (``folding.py``) → export, clean and convert to float16 (``exporter.py``) → write a temporary file →
check it and compare it with the network (``verification.py``) → rename it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pathconvert.conversion.modules import computed_tensors
from pathconvert.conversion.record import unwrapped
from pathconvert.errors import EquivalenceError, PathconvertError, first_line
from pathconvert.export.card import ModelCard, write_card
from pathconvert.export.graph import verification
from pathconvert.export.graph.balancing import balanced
from pathconvert.export.graph.exporter import assert_as_asked, to_half, to_onnx
from pathconvert.export.graph.folding import fold, unfolded
from pathconvert.export.graph.verification import Differs, Proof
from pathconvert.export.graph.wrapping import Exported, Outputs, Wrapper, outputs_of
from pathconvert.files.writing import prepare_output, write_atomically
from pathconvert.networks.preprocessing import Preprocessing

OPSETS = range(18, 25)
PRECISIONS = ("fp32", "fp16")
SUFFIXES = (".onnx",)
#: protobuf's limit on one message, and therefore on a file that holds its weights.
LARGEST_FILE = 2**31 - 1
#: Batch sizes to compare at, if the batch is dynamic.
BATCHES = (1, 2, 5)
_SIZES = {2: "height", 1: "width"}  # by distance from the last dimension


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        opset, precision: as they were checked in the file.
        nodes: number of nodes of the graph.
        batch_norms_left: number of BatchNormalization nodes among them.
        file_bytes: size of the file.
        weight_bytes: size of the tensors of the network that was exported.
        seconds: step → its duration.
        max_error, noise_ratio, checked_shapes: the proof (``verification.py``); fp16 has no noise ratio.
        operators: operator → number of its nodes.
        notes: remarks for people.
    """

    path: Path
    opset: int
    precision: str
    nodes: int
    batch_norms_left: int
    file_bytes: int
    weight_bytes: int
    seconds: dict[str, float]
    max_error: float
    noise_ratio: float | None
    checked_shapes: tuple[tuple[int, ...], ...]
    operators: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class ExportOptions:
    """The options of :func:`export_onnx` that several steps need; they are described there."""

    opset: int
    precision: str
    dynamic_batch: bool
    dynamic_size: bool
    preprocessing: Preprocessing | None
    softmax: bool
    card: ModelCard | None
    images: Tensor | None
    io_dtype: str
    auxiliary: bool
    gauge: str


class _Watch:
    """Measures seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor,
    opset: int = 20,
    precision: str = "fp32",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    with_preprocessing: Preprocessing | None = None,
    with_softmax: bool = False,
    card: ModelCard | None = None,
    images: Tensor | None = None,
    force: bool = False,
    io_dtype: str = "fp32",
    *,
    auxiliary: bool = False,
    gauge: str = "keep",
    source: Path | None = None,
) -> ExportReport:
    """Fold ``model``, write it to ``path``, and prove the file equal to ``model`` in float64 before it appears there.

    Args:
        model: a network in any form; not changed. It is exported in evaluation mode.
        path: the file to write, which will contain the weights.
        example_input: a normalised input, [N, …]; N is the file's batch size unless ``dynamic_batch``.
        opset: 18 to 24; the file is checked to have it.
        precision: ``fp32`` or ``fp16``.
        dynamic_batch: make the batch a dynamic axis named ``batch``.
        dynamic_size: make height and width dynamic axes of these names.
        with_preprocessing: put this normalisation into the graph: uint8 [N, 3, H, W] → float.
        with_softmax: output probabilities instead of logits.
        card: the model card; ``precision``, ``softmax`` and ``preprocessing_in_graph`` are filled in.
        images: normalised images, [M, 3, H, W], to compare on beside random inputs.
        force: replace an existing file.
        io_dtype: type of inputs and outputs: ``fp32`` or, with precision fp16, ``fp16``.
        auxiliary: include the output of a segmentation network's auxiliary head, named ``aux`` beside ``out``.
        gauge: ``keep``, or ``balanced`` to even out the channels' ranges by powers of two (``balancing.py``).
        source: the file that the network came from, which is never overwritten.

    Raises:
        PathconvertError: an option is not offered, or the network or its input cannot be exported.
        OutputError: the path cannot be written; no file is left.
        EquivalenceError: the graph is invalid or does not compute what ``model`` computes; no file is left, and the
            message names the first layer that differs.
    """
    check_options(opset, precision, io_dtype, gauge)
    options = ExportOptions(
        opset=opset,
        precision=precision,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        preprocessing=with_preprocessing,
        softmax=with_softmax,
        card=card,
        images=images,
        io_dtype=io_dtype,
        auxiliary=auxiliary,
        gauge=gauge,
    )
    if isinstance(example_input, tuple) and len(example_input) == 1:
        (example_input,) = example_input
    model = unwrapped(model)
    _check_inputs(example_input, options)
    path = prepare_output(path, force=force, source=source, suffixes=SUFFIXES)
    watch = _Watch()
    with watch.step("fold"):
        networks = _fold(model, example_input, options)
    with watch.step("export"):
        graph = _to_graph(networks, example_input, options)
    with watch.step("verify and write"):
        inputs = _inputs(networks, example_input, options)
        proof = _write_proven(
            graph.proto, path, lambda file: _prove(file, graph, networks, inputs, options), force=force
        )
    operators = Counter(node.op_type for node in graph.proto.graph.node)
    left = networks.batch_norms if operators["BatchNormalization"] else ()
    return ExportReport(
        path=path,
        opset=opset,
        precision=precision,
        nodes=len(graph.proto.graph.node),
        batch_norms_left=operators["BatchNormalization"],
        file_bytes=path.stat().st_size,
        weight_bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        seconds=watch.seconds,
        max_error=proof.max_error,
        noise_ratio=proof.noise_ratio if precision == "fp32" else None,
        checked_shapes=proof.checked_shapes,
        operators=dict(operators.most_common()),
        notes=_notes(left, networks.outputs, auxiliary=auxiliary, images=images),
    )


def _notes(left: tuple[str, ...], outputs: Outputs, *, auxiliary: bool, images: Tensor | None) -> tuple[str, ...]:
    notes = []
    if outputs.idle:
        parts = ", ".join(outputs.idle)
        notes.append(f"the file does not contain the weights of {parts}, which do not run in evaluation mode")
    if left:
        those = "BatchNorm could not be folded and is" if len(left) == 1 else "BatchNorms could not be folded and are"
        names = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        notes.append(f"{len(left)} {those} left: {names}")
    if auxiliary and len(outputs.keys) < 2:
        notes.append("the file has no auxiliary output, because the network has none in evaluation mode")
    elif outputs.keys == ("out",):
        notes.append("the file has the main output only; --auxiliary adds that of an auxiliary head if there is one")
    if images is not None:
        notes.append(f"the file was also compared on {len(images)} images")
    return tuple(notes)


# ---- options and inputs ----------------------------------------------------------------------------------------


def check_options(opset: int, precision: str, io_dtype: str = "fp32", gauge: str = "keep") -> None:
    """Refuse options that are not offered, before any work.

    Raises:
        PathconvertError: the opset, the precision, the type of inputs and outputs, or the gauge is not offered.
    """
    if opset not in OPSETS:
        raise PathconvertError(
            f"opset {opset} is not offered: pathconvert writes {OPSETS[0]} to {OPSETS[-1]}",
            "Use the default, --opset 20; the exporter cannot write opsets below 18.",
        )
    if precision not in PRECISIONS:
        name = "bf16" if "bf" in precision else repr(precision)
        reason = ": the exporter writes invalid files for it" if "bf" in precision else ""
        raise PathconvertError(f"precision {name} is not offered{reason}", f"Choose one of {', '.join(PRECISIONS)}.")
    if io_dtype not in PRECISIONS or (io_dtype == "fp16" and precision != "fp16"):
        raise PathconvertError(
            f"inputs and outputs in {io_dtype!r} are not offered with precision {precision}", "Use --io-dtype fp32."
        )
    if gauge not in ("keep", "balanced"):
        raise PathconvertError(f"gauge {gauge!r} is not offered for an export", "Choose one of keep, balanced.")


def _check_inputs(example_input: Any, options: ExportOptions) -> None:
    """Check that the input can be preprocessed, and that the images fit it.

    Raises:
        PathconvertError: preprocessing was asked for, but the input is not a batch of images; or there are no images,
            or they have another size than the input.
    """
    if options.preprocessing is not None and isinstance(example_input, Tensor) and example_input.dim() != 4:
        size = "×".join(map(str, example_input.shape))
        raise PathconvertError(
            f"an input of size {size} is not a batch of images, so it cannot be preprocessed",
            "Leave --with-preprocessing out.",
        )
    images = options.images
    if images is None:
        return
    if not len(images) or (images.shape[1:] != example_input.shape[1:] and not options.dynamic_size):
        given, wanted = ("×".join(map(str, t.shape)) for t in (images, example_input))
        raise PathconvertError(
            f"images of size {given} do not fit an input of size {wanted}",
            "Give at least one image, and images of the input's size.",
        )


def _axes(example_input: Tensor, options: ExportOptions) -> dict[int, str]:
    """Dimension → the name of its dynamic axis.

    Raises:
        PathconvertError: height and width are to be dynamic, but the input does not have them.
    """
    axes = {0: "batch"} if options.dynamic_batch else {}
    if options.dynamic_size:
        if example_input.dim() < 4:
            raise PathconvertError("the input has no height and width to make dynamic", "Leave --dynamic-size out.")
        axes |= {example_input.dim() - distance: name for distance, name in _SIZES.items()}
    return axes


def _other_size(x: Tensor) -> Tensor:
    """A random input, [N, …], that is 32 higher and 64 wider than ``x``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn([*x.shape[:-2], x.shape[-2] + 32, x.shape[-1] + 64], generator=generator)


# ---- folding and export ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Networks:
    """The network before and after folding.

    Attributes:
        original: as it was given.
        exported: folded (and balanced), in float32.
        wrap: what surrounds both of them in the graph.
        outputs: what they return.
        batch_norms: names of the BatchNorms that could not be folded, in parts that run.
        axes: dimension of the input → the name of its dynamic axis.
    """

    original: Exported
    exported: nn.Module
    wrap: Wrapper
    outputs: Outputs
    batch_norms: tuple[str, ...]
    axes: dict[int, str]


@dataclass(frozen=True)
class _Graph:
    """The graph, and for the results of its nodes the path of the module that each one came from."""

    proto: onnx.ModelProto
    layers: Mapping[str, str]


def _fold(model: nn.Module, example_input: Tensor, options: ExportOptions) -> _Networks:
    """Fold a copy of the network, and check that it fits into a file and takes the sizes that are asked for.

    Raises:
        PathconvertError: the network is too large, or does not take this input, its kind or other sizes.
        TraceError, EquivalenceError: the network cannot be folded.
    """
    outputs = outputs_of(model, example_input, auxiliary=options.auxiliary, softmax=options.softmax)
    wrap = Wrapper(outputs.keys, options.preprocessing, options.softmax)
    original = wrap(copy.deepcopy(model, computed_tensors(model)).eval())
    folded = fold(copy.deepcopy(model, computed_tensors(model)).double(), example_input)
    idle = tuple(f"{part}." for part in outputs.idle)
    batch_norms = tuple(name for name in unfolded(folded) if not f"{name}.".startswith(idle))
    if options.gauge == "balanced":
        folded = balanced(folded.float(), example_input, options.images)
    exported = wrap(folded).float()
    _check_size(exported)
    axes = _axes(example_input, options)
    if options.dynamic_size:
        _check_other_size(original, wrap.raw(_other_size(example_input)))
    return _Networks(original, exported, wrap, outputs, batch_norms, axes)


def _check_size(exported: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in exported.state_dict().values())
    if size >= LARGEST_FILE:
        raise PathconvertError(
            f"the weights take {size / 1e9:.1f} GB, but one .onnx file holds less than 2 GB",
            "Export the network in parts.",
        )


@torch.no_grad()
def _check_other_size(original: nn.Module, x: Tensor) -> None:
    try:
        copy.deepcopy(original).float()(x)
    except RuntimeError as error:
        raise PathconvertError(
            "the network only takes inputs of the example's size: with an input of size "
            f"{'×'.join(map(str, x.shape))} it fails: {first_line(error)}",
            "Leave --dynamic-size out.",
        ) from error


def _to_graph(networks: _Networks, example_input: Tensor, options: ExportOptions) -> _Graph:
    """Export the folded network with its model card.

    Raises:
        PathconvertError: the exporter fails, or does something else than it was asked to.
    """
    names = ("out", "aux") if options.auxiliary and len(networks.outputs.keys) > 1 else ("logits",)
    x = networks.wrap.raw(example_input)
    proto, layers = to_onnx(networks.exported, x, networks.axes, options.opset, names)
    if options.precision == "fp16":
        proto = to_half(proto, options.io_dtype)
    card = options.card or ModelCard(preprocessing=options.preprocessing)
    card = dataclasses.replace(
        card,
        precision=options.precision,
        softmax=options.softmax,
        preprocessing_in_graph=options.preprocessing is not None,
    )
    write_card(proto, card)
    assert_as_asked(proto, options.opset, networks.axes)
    return _Graph(proto, layers)


# ---- the proof, and the file -----------------------------------------------------------------------------------


def _inputs(networks: _Networks, example: Tensor, options: ExportOptions) -> list[Tensor]:
    """Inputs to compare on: random ones at several batch sizes (and another size), then the images."""
    axes, images = networks.axes, options.images
    generator = torch.Generator().manual_seed(0)
    batches = BATCHES if 0 in axes else (len(example),)
    inputs = [torch.randn(batch, *example.shape[1:], generator=generator) for batch in batches]
    if len(axes) > (0 in axes):  # an axis besides the batch is dynamic
        inputs.append(_other_size(inputs[min(1, len(batches) - 1)]))
    if images is not None:
        count = max(batches)
        for chunk in images.split(count):
            # a fixed batch is filled up with the chunk's images again
            whole = chunk if 0 in axes else chunk[torch.arange(count) % len(chunk)]
            inputs.append(whole)
    return [networks.wrap.raw(x) for x in inputs]


def _prove(file: Path, graph: _Graph, networks: _Networks, inputs: list[Tensor], options: ExportOptions) -> Proof:
    """Check everything that has to hold for a file before it takes its name.

    Raises:
        EquivalenceError: the graph is invalid, or does not compute what the network computes.
    """
    precision = options.precision
    half_tip = (
        "Use --precision fp32." if options.gauge == "balanced" else "Try --gauge balanced, or use --precision fp32."
    )
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # onnx raises two classes of its own
        raise EquivalenceError(f"the exported graph is invalid: {first_line(error)}", "Try another --opset.") from error
    try:
        proof = verification.prove(verification.runner(file), networks.original, inputs, precision)
        if precision == "fp16":
            half = verification.half_runner(networks.exported, half_tip)
            verification.prove(half, networks.original, inputs, precision)
    except Differs as difference:
        where = verification.first_difference(graph.proto, graph.layers, networks.exported, difference.x, precision)
        raise EquivalenceError(
            f"the exported graph does not compute what the network computes: {difference}; {where}",
            half_tip if precision == "fp16" else "No file was written. Please report this network.",
        ) from difference
    return proof


def _write_proven(proto: onnx.ModelProto, path: Path, check: Callable[[Path], Proof], *, force: bool) -> Proof:
    """Write a file that appears under its name only if ``check`` passes."""
    data = proto.SerializeToString()
    size = {"file": torch.empty(len(data), dtype=torch.uint8, device="meta")}
    return write_atomically(path, size, lambda file: file.write_bytes(data), check, force=force)
