"""What surrounds a network in the graph: preprocessing, the choice of outputs, a softmax.

Parts of the network that never run are handled here, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pathconvert.conversion.calls import watched
from pathconvert.conversion.modules import copied
from pathconvert.conversion.precision import is_mixed
from pathconvert.errors import PathconvertError, first_line
from pathconvert.networks.preprocessing import Preprocessing


class Exported(nn.Module):
    """A network together with what goes into the graph around it.

    Args:
        network: the network.
        keys: keys of the dictionary that the network returns, in the order of the graph's outputs;
            empty if it returns a tensor.
        preprocessing: the normalisation to put into the graph, uint8 [N, 3, H, W] → float; None for
            none.
        softmax: whether to add a softmax over the classes, dimension 1.
        changes_input: whether the network changes its input in place. It is then given a copy;
            otherwise the exporter would write the changed input as a further output of the graph.
    """

    def __init__(
        self,
        network: nn.Module,
        keys: tuple[str, ...],
        preprocessing: Preprocessing | None,
        *,
        softmax: bool,
        changes_input: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.keys, self.softmax = network, keys, softmax
        self.changes_input = changes_input
        self.normalises = preprocessing is not None
        if preprocessing is not None:
            # (pixel / 255 − mean) / std = pixel · scale + shift
            mean, std = (
                torch.tensor(v, dtype=torch.float64)
                for v in (preprocessing.mean, preprocessing.std)
            )
            self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1))
            self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1))

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, …] → the output, or a tuple of outputs."""
        x = input
        if self.normalises:
            scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
            x = x.to(scale.dtype) * scale + shift
        elif self.changes_input:
            x = x.clone()
        result = self.network(x)
        chosen = [result[key] for key in self.keys] if self.keys else [result]
        if self.softmax:
            chosen = [t.softmax(1) for t in chosen]
        return chosen[0] if len(chosen) == 1 else tuple(chosen)


@dataclass(frozen=True)
class Wrapper:
    """Wraps networks in :class:`Exported`, and turns normalised inputs into inputs of the graph."""

    keys: tuple[str, ...]
    preprocessing: Preprocessing | None
    softmax: bool
    changes_input: bool = False

    def __call__(self, network: nn.Module) -> Exported:
        return Exported(
            network,
            self.keys,
            self.preprocessing,
            softmax=self.softmax,
            changes_input=self.changes_input,
        ).eval()

    def raw(self, x: Tensor) -> Tensor:
        """Normalised [N, …] → the input of the graph, in memory of its own.

        These are the same values in float32, or uint8 pixels.
        """
        if self.preprocessing is None:
            # for channels-last inputs the exporter adds nodes
            return _own_float(x).contiguous()
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1)
            for v in (self.preprocessing.mean, self.preprocessing.std)
        )
        return ((x.detach().float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _own_float(x: Tensor) -> Tensor:
    """A copy of ``x`` in float32, as a forward may change its input in place."""
    return x.detach().to(torch.float32, copy=True)


# ---- the outputs of a network --------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What a network returns in evaluation mode.

    Attributes:
        keys: keys of the dictionary that it returns, only those that are wanted; empty if it
            returns a tensor.
        idle: the parts that do not run in evaluation mode, such as auxiliary heads. Their weights
            are not exported.
        changes_input: whether it changes its input in place.
    """

    keys: tuple[str, ...]
    idle: tuple[str, ...]
    changes_input: bool


@torch.no_grad()
def outputs_of(model: nn.Module, example_input: Any, *, auxiliary: bool, softmax: bool) -> Outputs:
    """Run a network once, and find its outputs and the parts that do not run.

    Args:
        model: not changed.
        example_input: a normalised input, [N, …]; not changed.
        auxiliary: whether the output of an auxiliary head is wanted, too.
        softmax: whether a softmax will follow.

    Raises:
        PathconvertError: the network takes or returns something else than tensors (detectors do),
            cannot run on this input, or has no classes for a softmax.
    """
    name = type(model).__name__
    if not isinstance(example_input, Tensor):
        raise PathconvertError(
            f"{name} takes a {type(example_input).__name__}, not one tensor: detectors are not"
            " exported, because the number of boxes depends on the image, which a graph of"
            " standard operators cannot follow",
            "Export only the backbone: export_onnx(model.backbone, …).",
        )
    runner = copied(model).float().eval()
    given, called = example_input[:1], set[str]()
    x = _own_float(given)
    untouched = x._version
    try:
        with watched(dict(runner.named_modules()), before=lambda name, _: called.add(name)):
            result = runner(x)
    except (RuntimeError, ValueError) as error:
        raise _cannot_run(model, example_input, error) from error
    # every change in place counts up the version of a tensor, except one through ``x.data``
    changes_input = x._version != untouched or not torch.equal(x, given.float())
    keys: tuple[str, ...] = ()
    if isinstance(result, Mapping) and isinstance(result.get("out"), Tensor):
        keys = ("out", "aux") if auxiliary and "aux" in result else ("out",)
    elif not isinstance(result, Tensor):
        raise PathconvertError(
            f"{name} returns a {type(result).__name__}, not one tensor or a dictionary with the key"
            " 'out'",
            "Export a module that returns the wanted tensor.",
        )

    def scores_of(result: Any) -> Tensor:
        return cast(Tensor, result[keys[0]] if keys else result)

    scores = scores_of(result).clone()
    if softmax and scores.dim() < 2:
        raise PathconvertError(
            f"{name} gives an output of size {list(scores.shape)}, which has no classes for a"
            " softmax",
            "Leave --with-softmax out.",
        )

    def unchanged() -> bool:
        return torch.equal(scores_of(runner(_own_float(given))), scores)

    return Outputs(keys, _idle_parts(runner, called, unchanged), changes_input)


def _cannot_run(model: nn.Module, x: Tensor, error: Exception) -> PathconvertError:
    """The refusal of a network that fails with ``error`` in float32 on ``x``, [N, …]."""
    name = type(model).__name__
    if is_mixed(model):
        return PathconvertError(
            f"{name} has tensors of several dtypes and cannot run in float32, as its file would: "
            f"{first_line(error)}",
            "Let its forward cast to the dtype of its weights, x.to(self.conv.weight.dtype).",
        )
    size = "×".join(map(str, x.shape[1:]))
    return PathconvertError(
        f"{name} cannot run on inputs of size {size}: {first_line(error)}",
        "Give another size: --input-size.",
    )


def _idle_parts(
    runner: nn.Module, called: set[str], unchanged: Callable[[], bool]
) -> tuple[str, ...]:
    """The largest parts with weights that were not called.

    Code may read the weights of a module without calling it. The weights of all these parts are
    therefore set to NaN, and if that changes the output, as ``unchanged`` tells, no part counts as
    idle.

    Args:
        runner: the network; it is changed.
        called: names of the modules that were called.
        unchanged: whether ``runner`` still gives the same output.
    """
    # a module is busy if it was called, or if one inside it was: "a.b.c" makes "a", "a.b" and
    # "a.b.c" busy
    busy = {""} | {
        name[:end]
        for name in called
        for end in (*(m.start() for m in re.finditer(r"\.", name)), None)
    }
    idle = [
        name
        for name, module in runner.named_modules()
        if name not in busy
        and name.rpartition(".")[0] in busy
        and next(module.parameters(), None) is not None
    ]
    for name in idle:
        for parameter in runner.get_submodule(name).parameters():
            parameter.fill_(math.nan)
    return tuple(idle) if idle and unchanged() else ()
