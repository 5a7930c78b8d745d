"""A network → one ``.onnx`` file of standard operators, proven equal before it takes its name.

fold (folding.py) → export, strip, float16 (graph.py) → write beside → check and compare (verification.py) → rename
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from pathconvert.conversion.record import unwrapped
from pathconvert.conversion.trace import computed_tensors
from pathconvert.errors import EquivalenceError, PathconvertError, first_line
from pathconvert.export.card import ModelCard, write_card
from pathconvert.export.graph import verification
from pathconvert.export.graph.exporter import assert_as_asked, to_half, to_onnx
from pathconvert.export.graph.folding import fold, unfolded
from pathconvert.export.graph.verification import Differs, Proof
from pathconvert.files.writing import prepare_output, write_atomically
from pathconvert.networks.preprocessing import Preprocessing

OPSETS = range(18, 25)
PRECISIONS = ("fp32", "fp16")
SUFFIXES = (".onnx",)
#: protobuf's limit on one message, and so on a file that holds its weights.
LARGEST_FILE = 2**31 - 1
BATCHES = (1, 2, 5)
_SIZES = {2: "height", 1: "width"}  # by distance from the last dimension


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        opset, precision: as asserted in the file.
        nodes: of the graph.
        batch_norms_left: BatchNormalization nodes among them.
        file_bytes: the file's size.
        weight_bytes: of the source's tensors.
        seconds: by step.
        max_error, noise_ratio, checked_shapes: of the proof (``verification.py``); fp16 has no noise ratio.
        operators: nodes by operator.
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
        """JSON-serialisable."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


class _Watch:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


class Exported(nn.Module):
    """A network with what goes into the graph beside it.

    Args:
        network: what it is.
        outputs: keys of a dictionary that it returns, in the order wanted; empty where it returns a tensor.
        preprocessing: uint8 [N, 3, H, W] → normalised float, in the graph.
        softmax: over the classes, dimension 1.
    """

    def __init__(
        self, network: nn.Module, outputs: tuple[str, ...], preprocessing: Preprocessing | None, softmax: bool
    ) -> None:
        super().__init__()
        self.network, self.outputs, self.softmax = network, outputs, softmax
        self.normalises = preprocessing is not None
        if preprocessing is not None:
            mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std))
            self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1))
            self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1))

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, …] → the output, or a tuple of them."""
        x = input
        if self.normalises:
            scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
            x = x.to(scale.dtype) * scale + shift
        result = self.network(x)
        chosen = [result[key] for key in self.outputs] if self.outputs else [result]
        if self.softmax:
            chosen = [t.softmax(1) for t in chosen]
        return chosen[0] if len(chosen) == 1 else tuple(chosen)


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
        model: any form; not changed. Evaluation mode is exported.
        path: one file, its weights inside.
        example_input: a normalised input, [N, …]; N is the file's batch size without ``dynamic_batch``.
        opset: 18 to 24, asserted.
        precision: ``fp32`` or ``fp16``.
        dynamic_batch: the batch is an axis named ``batch``.
        dynamic_size: height and width are axes of these names.
        with_preprocessing: put uint8 [N, 3, H, W] → normalised float into the graph.
        with_softmax: probabilities in place of logits.
        card: what the file says about itself; ``precision``, ``softmax``, ``preprocessing_in_graph`` are filled in.
        images: normalised images, [M, 3, H, W], to compare on beside random inputs.
        force: replace an existing file.
        io_dtype: ``fp32`` or, with precision fp16, ``fp16``.
        auxiliary: of a segmentation network, the auxiliary head's output too, named ``aux`` beside ``out``.
        gauge: ``balanced`` evens the channels' ranges out by powers of two (``gauge.py``).
        source: the file that the network came from, which is never overwritten.

    Raises:
        PathconvertError: an option or a network that is not offered, by name.
        OutputError: the path may not be written; nothing is left.
        EquivalenceError: the graph does not compute what ``model`` computes; no file, the first differing layer named.
    """
    check_options(opset, precision, io_dtype, gauge)
    if isinstance(example_input, tuple) and len(example_input) == 1:
        (example_input,) = example_input
    model = unwrapped(model)
    if with_preprocessing is not None and isinstance(example_input, Tensor) and example_input.dim() != 4:
        size = "×".join(map(str, example_input.shape))
        raise PathconvertError(f"an input of {size} is no batch of images", "Leave the preprocessing out.")
    if images is not None and (not len(images) or (images.shape[1:] != example_input.shape[1:] and not dynamic_size)):
        given, wanted = ("×".join(map(str, t.shape)) for t in (images, example_input))
        raise PathconvertError(f"images of {given} do not go with an input of {wanted}", "Give them at its size.")
    path = prepare_output(path, force=force, source=source, suffixes=SUFFIXES)
    watch = _Watch()
    with watch.step("fold"):
        outputs, idle = _outputs_of(model, example_input, auxiliary, with_softmax)
        wrap = _Wrapper(outputs, with_preprocessing, with_softmax)
        original = wrap(copy.deepcopy(model, computed_tensors(model)).eval())
        folded = fold(copy.deepcopy(model, computed_tensors(model)).double(), example_input)
        left = tuple(name for name in unfolded(folded) if not f"{name}.".startswith(tuple(f"{p}." for p in idle)))
        if gauge == "balanced":
            from pathconvert.export.graph.balancing import balanced

            folded = balanced(folded.float(), example_input, images)
        exported = wrap(folded).float()
        _check_size(exported)
        axes = _axes(example_input, dynamic_batch, dynamic_size)
        if dynamic_size:
            _check_other_size(original, wrap.raw(_other_size(example_input)))
    with watch.step("export"):
        proto, layers = to_onnx(exported, wrap.raw(example_input), axes, opset, auxiliary and len(outputs) > 1)
        if precision == "fp16":
            proto = to_half(proto, io_dtype)
        write_card(proto, _filled(card, precision, with_softmax, with_preprocessing))
        assert_as_asked(proto, opset, axes)
    with watch.step("verify and write"):
        inputs = _inputs(wrap, example_input, axes, images)
        proof = _write_proven(
            proto, path, force, lambda file: _prove(file, proto, layers, original, exported, inputs, precision, gauge)
        )
    operators = Counter(node.op_type for node in proto.graph.node)
    return ExportReport(
        path, opset, precision, len(proto.graph.node), operators["BatchNormalization"], path.stat().st_size,
        sum(t.numel() * t.element_size() for t in model.state_dict().values()), watch.seconds,
        proof.max_error, proof.noise_ratio if precision == "fp32" else None, proof.checked_shapes,
        dict(operators.most_common()),
        _notes(left if operators["BatchNormalization"] else (), outputs, idle, auxiliary, images),
    )  # fmt: skip


def _notes(
    left: tuple[str, ...], outputs: tuple[str, ...], idle: tuple[str, ...], auxiliary: bool, images: Tensor | None
) -> tuple[str, ...]:
    notes = []
    if idle:
        notes.append(f"without the weights of {', '.join(idle)}, which do not run in evaluation mode")
    if left:
        those = "BatchNorm could not be folded and is" if len(left) == 1 else "BatchNorms could not be folded and are"
        names = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        notes.append(f"{len(left)} {those} left: {names}")
    if auxiliary and len(outputs) < 2:
        notes.append("no auxiliary output: the network has none in evaluation mode")
    elif outputs == ("out",):
        notes.append("the main output alone; auxiliary adds the auxiliary head's where there is one")
    if images is not None:
        notes.append(f"compared on {len(images)} images too")
    return tuple(notes)


# ---- what is asked for -----------------------------------------------------------------------------------------


def check_options(opset: int, precision: str, io_dtype: str = "fp32", gauge: str = "keep") -> None:
    """Refuse what is not offered, before any work.

    Raises:
        PathconvertError: as its message says.
    """
    if opset not in OPSETS:
        raise PathconvertError(
            f"opset {opset} is not offered: pathconvert writes {OPSETS[0]} to {OPSETS[-1]}",
            "20 is the default; the exporter itself writes 18 at least.",
        )
    if precision not in PRECISIONS:
        reason = "bf16: the exporter writes invalid files for it" if "bf" in precision else repr(precision)
        raise PathconvertError(f"no precision {reason}", f"Choose one of {', '.join(PRECISIONS)}.")
    if io_dtype not in PRECISIONS or (io_dtype == "fp16" and precision != "fp16"):
        raise PathconvertError(f"no inputs and outputs in {io_dtype!r} with precision {precision}", "Use fp32.")
    if gauge not in ("keep", "balanced"):
        raise PathconvertError(f"no gauge {gauge!r} in an export", "Choose one of keep, balanced.")


@torch.no_grad()
def _outputs_of(
    model: nn.Module, example_input: Any, auxiliary: bool, softmax: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of the dictionary that the network returns, those wanted (empty where it returns a tensor), and the parts
    that do not run in evaluation mode: auxiliary heads, whose weights the graph will not hold.

    Raises:
        PathconvertError: it takes or returns something else (detectors), or has no classes for a softmax.
    """
    name = type(model).__name__
    if not isinstance(example_input, Tensor):
        raise PathconvertError(
            f"{name} takes a {type(example_input).__name__}, not one tensor: detectors are not exported, their boxes "
            "depend on numbers that a graph of fixed operators does not know",
            "Export the backbone alone: export_onnx(model.backbone, …).",
        )
    runner = copy.deepcopy(model, computed_tensors(model)).float().eval()
    x = example_input[:1].float()
    try:
        with _calls(runner) as called:
            result = runner(x)
    except (RuntimeError, ValueError) as error:
        size = "×".join(map(str, example_input.shape[1:]))
        raise PathconvertError(
            f"{name} cannot run on an input of {size}: {first_line(error)}", "Give another size: --input-size."
        ) from error
    outputs: tuple[str, ...] = ()
    if isinstance(result, Mapping) and isinstance(result.get("out"), Tensor):
        outputs = ("out", "aux") if auxiliary and "aux" in result else ("out",)
    elif not isinstance(result, Tensor):
        raise PathconvertError(
            f"{name} returns a {type(result).__name__}, not one tensor or a dictionary with out",
            "Export a module that returns the tensor that is wanted.",
        )

    def scores_of(result: Any) -> Tensor:
        return cast(Tensor, result[outputs[0]] if outputs else result)

    scores = scores_of(result).clone()
    if softmax and scores.dim() < 2:
        raise PathconvertError(
            f"{name} gives an output of {list(scores.shape)}, which has no classes for a softmax",
            "Leave --with-softmax out.",
        )
    return outputs, _idle_parts(runner, called, lambda: torch.equal(scores_of(runner(x)), scores))


@contextlib.contextmanager
def _calls(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules that are called meanwhile."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _, __, ___, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _idle_parts(runner: nn.Module, called: set[str], unchanged: Callable[[], bool]) -> tuple[str, ...]:
    """The largest parts with weights that were not called, if ``unchanged`` holds without these weights: code may
    read them without calling their module. ``runner`` is changed."""
    busy = {""} | {name[:end] for name in called for end in (*(m.start() for m in re.finditer(r"\.", name)), None)}
    idle = [
        name
        for name, module in runner.named_modules()
        if name not in busy and name.rpartition(".")[0] in busy and next(module.parameters(), None) is not None
    ]
    for name in idle:
        for parameter in runner.get_submodule(name).parameters():
            parameter.fill_(math.nan)
    return tuple(idle) if idle and unchanged() else ()


def _check_size(exported: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in exported.state_dict().values())
    if size >= LARGEST_FILE:
        raise PathconvertError(
            f"the weights are {size / 1e9:.1f} GB; one .onnx file holds less than 2 GB", "Export parts of the network."
        )


def _axes(example_input: Tensor, dynamic_batch: bool, dynamic_size: bool) -> dict[int, str]:
    """Dimension → the name of its axis."""
    axes = {0: "batch"} if dynamic_batch else {}
    if dynamic_size:
        if example_input.dim() < 4:
            raise PathconvertError("the input has no height and width to make dynamic", "Leave --dynamic-size out.")
        axes |= {example_input.dim() - distance: name for distance, name in _SIZES.items()}
    return axes


def _other_size(x: Tensor) -> Tensor:
    """Random, [N, …], 32 higher and 64 wider than ``x``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn([*x.shape[:-2], x.shape[-2] + 32, x.shape[-1] + 64], generator=generator)


@torch.no_grad()
def _check_other_size(original: nn.Module, x: Tensor) -> None:
    try:
        copy.deepcopy(original).float()(x)
    except RuntimeError as error:
        raise PathconvertError(
            f"the network takes no other size than the example's: at {'×'.join(map(str, x.shape))} {first_line(error)}",
            "Leave --dynamic-size out.",
        ) from error


def _filled(card: ModelCard | None, precision: str, softmax: bool, preprocessing: Preprocessing | None) -> ModelCard:
    card = card or ModelCard(preprocessing=preprocessing)
    return dataclasses.replace(
        card, precision=precision, softmax=softmax, preprocessing_in_graph=preprocessing is not None
    )


@dataclass(frozen=True)
class _Wrapper:
    """Makes :class:`Exported` of a network, and its inputs of normalised ones."""

    outputs: tuple[str, ...]
    preprocessing: Preprocessing | None
    softmax: bool

    def __call__(self, network: nn.Module) -> Exported:
        return Exported(network, self.outputs, self.preprocessing, self.softmax).eval()

    def raw(self, x: Tensor) -> Tensor:
        """Normalised [N, …] → what the graph takes: the same in float32, or uint8 pixels."""
        if self.preprocessing is None:
            return x.detach().float().contiguous()  # of channels-last inputs the exporter makes more nodes
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.preprocessing.mean, self.preprocessing.std))
        return ((x.detach().float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---- the proof, and the file -----------------------------------------------------------------------------------


def _inputs(wrap: _Wrapper, example: Tensor, axes: dict[int, str], images: Tensor | None) -> list[Tensor]:
    """Random inputs at several batch sizes (and another size), then the images."""
    generator = torch.Generator().manual_seed(0)
    batches = BATCHES if 0 in axes else (len(example),)
    inputs = [torch.randn(batch, *example.shape[1:], generator=generator) for batch in batches]
    if len(axes) > (0 in axes):
        inputs.append(_other_size(inputs[min(1, len(batches) - 1)]))
    if images is not None:
        count = max(batches)
        for chunk in images.split(count):
            whole = chunk if 0 in axes else chunk[torch.arange(count) % len(chunk)]
            inputs.append(whole)
    return [wrap.raw(x) for x in inputs]


def _prove(
    file: Path,
    proto: onnx.ModelProto,
    layers: Mapping[str, str],
    original: nn.Module,
    exported: nn.Module,
    inputs: Sequence[Tensor],
    precision: str,
    gauge: str,
) -> Proof:
    """Everything that has to hold for a file that was written, before it takes its name."""
    half_tip = "Keep fp32." if gauge == "balanced" else "Try --gauge balanced, or keep fp32."
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # two of onnx's own classes
        raise EquivalenceError(f"the exported graph is invalid: {first_line(error)}", "Try another --opset.") from error
    try:
        proof = verification.prove(verification.runner(file), original, inputs, precision)
        if precision == "fp16":
            verification.prove(verification.half_runner(exported, half_tip), original, inputs, precision)
    except Differs as difference:
        where = verification.first_difference(proto, layers, exported, difference.x, precision)
        raise EquivalenceError(
            f"the exported graph is not the network: {difference}; {where}",
            half_tip if precision == "fp16" else "Report it; no file was written.",
        ) from difference
    return proof


def _write_proven(proto: onnx.ModelProto, path: Path, force: bool, check: Callable[[Path], Proof]) -> Proof:
    data = proto.SerializeToString()
    size = {"file": torch.empty(len(data), dtype=torch.uint8, device="meta")}
    return write_atomically(path, size, lambda file: file.write_bytes(data), check, force=force)
