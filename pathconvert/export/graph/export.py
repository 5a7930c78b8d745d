"""Export a network to one ``.onnx`` file of standard operators, which is proven to be equal.

The steps: check the options (``options.py``) → fold (``preparation.py``) → export, clean and
convert to float16 (``exporter.py``) → write a temporary file → check it and compare it with the
network (``verification.py``) → rename it.
"""

from __future__ import annotations

import contextlib
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

from pathconvert.conversion.modules import unwrapped
from pathconvert.errors import EquivalenceError, first_line
from pathconvert.export.card import ModelCard, write_card
from pathconvert.export.graph import verification
from pathconvert.export.graph.exporter import assert_as_asked, to_half, to_onnx
from pathconvert.export.graph.options import ExportOptions, check_inputs
from pathconvert.export.graph.preparation import Networks, other_size, prepare
from pathconvert.export.graph.verification import Differs, Proof
from pathconvert.export.graph.wrapping import Outputs
from pathconvert.files.writing import prepare_output, write_atomically
from pathconvert.networks.preprocessing import Preprocessing

SUFFIXES = (".onnx",)
#: Batch sizes to compare at, if the batch is dynamic.
BATCHES = (1, 2, 5)


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
        max_error, noise_ratio, checked_shapes: the proof (``verification.py``); fp16 has no noise
            ratio.
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
    """Fold ``model``, write it to ``path``, and prove the file equal before it appears there.

    The proof compares the file with ``model`` in float64.

    Args:
        model: a network in any form; not changed. It is exported in evaluation mode.
        path: the file to write, which will contain the weights.
        example_input: a normalised input, [N, …]; N is the file's batch size unless
            ``dynamic_batch``.
        opset: 18 to 24; the file is checked to have it.
        precision: ``fp32`` or ``fp16``.
        dynamic_batch: make the batch a dynamic axis named ``batch``.
        dynamic_size: make height and width dynamic axes of these names.
        with_preprocessing: put this normalisation into the graph: uint8 [N, 3, H, W] → float.
        with_softmax: output probabilities instead of logits.
        card: the model card; ``precision``, ``softmax`` and ``preprocessing_in_graph`` are filled
            in.
        images: normalised images, [M, 3, H, W], to compare on beside random inputs.
        force: replace an existing file.
        io_dtype: type of inputs and outputs: ``fp32`` or, with precision fp16, ``fp16``.
        auxiliary: include the output of a segmentation network's auxiliary head, named ``aux``
            beside ``out``.
        gauge: ``keep``, or ``balanced`` to even out the channels' ranges by powers of two
            (``balancing.py``).
        source: the file that the network came from, which is never overwritten.

    Raises:
        PathconvertError: an option is not offered, or the network or its input cannot be
            exported.
        OutputError: the path cannot be written; no file is left.
        EquivalenceError: the graph is invalid or does not compute what ``model`` computes; no file
            is left, and the message names the first layer that differs.
    """
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
    return export_with(model, path, example_input, options, force=force, source=source)


def export_with(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor,
    options: ExportOptions,
    *,
    force: bool,
    source: Path | None,
) -> ExportReport:
    """Do what :func:`export_onnx` does, with options that were put together before."""
    if isinstance(example_input, tuple) and len(example_input) == 1:
        (example_input,) = example_input
    model = unwrapped(model)
    check_inputs(example_input, options)
    path = prepare_output(path, force=force, source=source, suffixes=SUFFIXES)
    watch = _Watch()
    with watch.step("fold"):
        networks = prepare(model, example_input, options)
    with watch.step("export"):
        graph = _to_graph(networks, example_input, options)
    with watch.step("verify and write"):
        inputs = _inputs(networks, example_input, options)

        def check(file: Path) -> Proof:
            return _prove(file, graph, networks, inputs, options)

        proof = _write_proven(graph.proto, path, check, force=force)
    operators = Counter(node.op_type for node in graph.proto.graph.node)
    left = networks.batch_norms if operators["BatchNormalization"] else ()
    return ExportReport(
        path=path,
        opset=options.opset,
        precision=options.precision,
        nodes=len(graph.proto.graph.node),
        batch_norms_left=operators["BatchNormalization"],
        file_bytes=path.stat().st_size,
        weight_bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        seconds=watch.seconds,
        max_error=proof.max_error,
        noise_ratio=proof.noise_ratio if options.precision == "fp32" else None,
        checked_shapes=proof.checked_shapes,
        operators=dict(operators.most_common()),
        notes=_notes(left, networks.outputs, auxiliary=options.auxiliary, images=options.images),
    )


def _notes(
    left: tuple[str, ...], outputs: Outputs, *, auxiliary: bool, images: Tensor | None
) -> tuple[str, ...]:
    """Remarks for people, each a sentence without its full stop.

    Args:
        left: names of the BatchNorms that are left in the graph.
        outputs: what the network returns.
        auxiliary: whether the auxiliary output was asked for.
        images: the images that the file was compared on, [M, 3, H, W]; None if there were none.
    """
    notes = []
    if outputs.idle:
        parts = ", ".join(outputs.idle)
        notes.append(
            f"the file does not contain the weights of {parts}, which do not run in evaluation mode"
        )
    if left:
        those = "BatchNorm could" if len(left) == 1 else "BatchNorms could"
        verb = "is" if len(left) == 1 else "are"
        names = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        notes.append(f"{len(left)} {those} not be folded and {verb} left: {names}")
    if auxiliary and len(outputs.keys) < 2:
        notes.append(
            "the file has no auxiliary output, because the network has none in evaluation mode"
        )
    elif outputs.keys == ("out",):
        notes.append(
            "the file has the main output only; "
            "--auxiliary adds that of an auxiliary head if there is one"
        )
    if images is not None:
        notes.append(f"the file was also compared on {len(images)} images")
    return tuple(notes)


# ---- the graph -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """The graph; and result of a node → path of the module that it came from."""

    proto: onnx.ModelProto
    layers: Mapping[str, str]


def _to_graph(networks: Networks, example_input: Tensor, options: ExportOptions) -> _Graph:
    """Export the folded network with its model card.

    Raises:
        PathconvertError: the exporter fails, or does something else than it was asked to.
        EquivalenceError: the float16 converter makes an invalid graph.
    """
    names = ("out", "aux") if options.auxiliary and len(networks.outputs.keys) > 1 else ("logits",)
    x = networks.wrap.raw(example_input)
    proto, layers = to_onnx(networks.exported, x, networks.axes, options.opset, names)
    if options.precision == "fp16":
        proto = to_half(proto, options.io_dtype)
    write_card(proto, options.filled_card())
    assert_as_asked(proto, options.opset, networks.axes)
    return _Graph(proto, layers)


# ---- the proof, and the file ---------------------------------------------------------------------


def _inputs(networks: Networks, example: Tensor, options: ExportOptions) -> list[Tensor]:
    """Inputs to compare on: random ones at several batch sizes, or another size; then images."""
    axes, images = networks.axes, options.images
    generator = torch.Generator().manual_seed(0)
    batches = BATCHES if 0 in axes else (len(example),)
    inputs = [torch.randn(batch, *example.shape[1:], generator=generator) for batch in batches]
    if len(axes) > (0 in axes):  # an axis besides the batch is dynamic
        inputs.append(other_size(inputs[min(1, len(batches) - 1)]))
    if images is not None:
        count = max(batches)
        for chunk in images.split(count):
            # a fixed batch is filled up with the chunk's images again
            whole = chunk if 0 in axes else chunk[torch.arange(count) % len(chunk)]
            inputs.append(whole)
    return [networks.wrap.raw(x) for x in inputs]


def _prove(
    file: Path, graph: _Graph, networks: Networks, inputs: list[Tensor], options: ExportOptions
) -> Proof:
    """Check everything that has to hold for a file before it takes its name.

    Raises:
        EquivalenceError: the graph is invalid, or does not compute what the network computes.
    """
    precision = options.precision
    half_tip = (
        "Use --precision fp32."
        if options.gauge == "balanced"
        else "Try --gauge balanced, or use --precision fp32."
    )
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # onnx raises two classes of its own
        raise EquivalenceError(
            f"the exported graph is invalid: {first_line(error)}", "Try another --opset."
        ) from error
    try:
        proof = verification.prove(verification.runner(file), networks.original, inputs, precision)
        if precision == "fp16":
            half = verification.half_runner(networks.exported, half_tip)
            verification.prove(half, networks.original, inputs, precision)
    except Differs as difference:
        where = verification.first_difference(
            graph.proto, graph.layers, networks.exported, difference.x, precision
        )
        raise EquivalenceError(
            f"the exported graph does not compute what the network computes: {difference}; {where}",
            half_tip if precision == "fp16" else "No file was written. Please report this network.",
        ) from difference
    return proof


def _write_proven(
    proto: onnx.ModelProto, path: Path, check: Callable[[Path], Proof], *, force: bool
) -> Proof:
    """Write a file that appears under its name only if ``check`` passes."""
    data = proto.SerializeToString()
    size = {"file": torch.empty(len(data), dtype=torch.uint8, device="meta")}
    return write_atomically(path, size, lambda file: file.write_bytes(data), check, force=force)
