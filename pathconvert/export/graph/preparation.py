"""Prepare a network for the exporter: fold it, balance it and wrap it as the graph will be.

What the exporter would only fail on later is refused here: too many weights, and sizes of the input
that the network does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathconvert.conversion.modules import copied, refuse_unreadable
from pathconvert.errors import PathconvertError, first_line
from pathconvert.export.graph.balancing import balanced
from pathconvert.export.graph.folding import fold, unfolded
from pathconvert.export.graph.options import ExportOptions
from pathconvert.export.graph.wrapping import Exported, Outputs, Wrapper, outputs_of

#: protobuf's limit on one message, and therefore on a file that holds its weights.
LARGEST_FILE = 2**31 - 1
_SIZES = {2: "height", 1: "width"}  # by distance from the last dimension


@dataclass(frozen=True)
class Networks:
    """The network before and after folding.

    Attributes:
        original: as it was given, in evaluation mode.
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


def prepare(model: nn.Module, example_input: Tensor, options: ExportOptions) -> Networks:
    """Fold a copy of the network, and check that it fits into a file and takes the sizes asked for.

    Args:
        model: a network in any form; not changed.
        example_input: a normalised input, [N, …].
        options: of the export.

    Raises:
        PathconvertError: the network is too large, or does not take this input, its kind or other
            sizes.
        TraceError, EquivalenceError: the network cannot be folded.
    """
    refuse_unreadable(model, scripted=True)
    outputs = outputs_of(model, example_input, auxiliary=options.auxiliary, softmax=options.softmax)
    wrap = Wrapper(outputs.keys, options.preprocessing, options.softmax, outputs.changes_input)
    original = wrap(copied(model).eval())
    folded = fold(copied(model).double(), example_input)
    idle = tuple(f"{part}." for part in outputs.idle)
    batch_norms = tuple(name for name in unfolded(folded) if not f"{name}.".startswith(idle))
    if options.gauge == "balanced":
        folded = balanced(folded.float(), example_input, options.images)
    exported = wrap(folded).float()
    _check_size(exported)
    axes = _dynamic_axes(example_input, options)
    if options.dynamic_size:
        _check_other_size(original, wrap.raw(other_size(example_input)))
    return Networks(original, exported, wrap, outputs, batch_norms, axes)


def other_size(x: Tensor) -> Tensor:
    """A random input, [N, …], that is 32 higher and 64 wider than ``x``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn([*x.shape[:-2], x.shape[-2] + 32, x.shape[-1] + 64], generator=generator)


def _dynamic_axes(example_input: Tensor, options: ExportOptions) -> dict[int, str]:
    """Dimension → the name of its dynamic axis.

    Raises:
        PathconvertError: height and width are to be dynamic, but the input does not have them.
    """
    axes = {0: "batch"} if options.dynamic_batch else {}
    if options.dynamic_size:
        if example_input.dim() < 4:
            raise PathconvertError(
                "the input has no height and width to make dynamic", "Leave --dynamic-size out."
            )
        axes |= {example_input.dim() - distance: name for distance, name in _SIZES.items()}
    return axes


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
        copied(original).float()(x)
    except RuntimeError as error:
        raise PathconvertError(
            "the network only takes inputs of the example's size: with an input of size "
            f"{'×'.join(map(str, x.shape))} it fails: {first_line(error)}",
            "Leave --dynamic-size out.",
        ) from error
