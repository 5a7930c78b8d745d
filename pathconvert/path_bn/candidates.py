"""Which layers take Path-BN form, and why each of the others does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pathconvert.conversion.calls import Arguments, Stack, observe, watched
from pathconvert.conversion.equivalence import forward_outputs, run_dtype
from pathconvert.conversion.frozen import is_frozen
from pathconvert.conversion.groups import Layer
from pathconvert.conversion.modules import as_arguments, copied, refuse_unreadable
from pathconvert.conversion.path_bn_record import RecordedLayer, RecordedReader
from pathconvert.conversion.reparameterize import Conversion
from pathconvert.conversion.tracing.trace import IdVector
from pathconvert.path_bn.form import index_tensor
from pathconvert.path_bn.layer import BATCH_NORM_OF, kind_of
from pathconvert.path_bn.normalizations import can_be_split

LAST = "is the last layer: no normalization comes before an output"
#: Number of dimensions of what a layer reads and makes.
RANKS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
NO_PIVOT = "holds no pivot: it begins a chain, or what it reads has its pivots elsewhere"


@dataclass(frozen=True)
class Candidate:
    """A layer that takes Path-BN form.

    Attributes:
        layer: how its weight is indexed by units.
        name: the module's path.
        bn: path of the BatchNorm that is the only reader of the layer; None if there is none.
        units, rows, columns: places of its pivots, [pivots] each.
    """

    layer: Layer
    name: str
    bn: str | None
    units: IdVector
    rows: IdVector
    columns: IdVector

    def recorded(self) -> RecordedLayer:
        """The layer's entry in the record."""
        readers = self.layer.readers if self.bn is None else ()
        return RecordedLayer(
            self.name, self.bn, len(self.units), tuple(RecordedReader(*one) for one in readers)
        )


def choose_candidates(
    conversion: Conversion, example_input: Any
) -> tuple[list[Candidate], dict[str, str]]:
    """Choose the layers that take Path-BN form.

    Returns:
        These layers; and for each other layer, by name, why it does not take the form.

    Raises:
        TraceError: the network has TorchScript modules.
    """
    refuse_unreadable(conversion.model, scripted=True)
    model, units, pivots = conversion.model, conversion.units, conversion.pivots
    usable = (pivots.layer >= 0) & ~conversion.held_back() & ~conversion.circular()
    chosen, left = [], {}
    observed = observe(model, as_arguments(example_input), run_dtype(model))
    calls = {name: [call.arguments for call in made] for name, made in observed.calls.items()}
    uses = observed.uses
    last = _last_layers(conversion, calls)
    for index, layer in enumerate(units.layers):
        mine = np.flatnonzero(usable & (pivots.layer == index))
        name, _, leaf = layer.parameter.rpartition(".")
        obstacle = (
            _obstacle(model, layer, name, leaf, calls.get(name, []), uses)
            if mine.size
            else _without_pivot(conversion, index)
        )
        why = LAST if index in last else obstacle
        if why:
            left[name or layer.parameter] = why
        else:
            chosen.append(
                Candidate(layer, name, layer.follower, mine, pivots.row[mine], pivots.column[mine])
            )
    without_bias = [c for c in chosen if c.bn is None and model.get_submodule(c.name).bias is None]
    lost = _no_way_for_a_bias(model, without_bias, example_input)
    return [c for c in chosen if c.name not in lost], left | lost


def _without_pivot(conversion: Conversion, index: int) -> str:
    """Why a layer holds no pivot."""
    pivots, units = conversion.pivots, conversion.units
    mine = pivots.layer == index
    if (mine & conversion.held_back()).any():
        return (
            "its pivots are held back: their factors leave the range of"
            f" {_dtype_name(conversion.model)}"
        )
    if (mine & conversion.circular()).any():
        return "its pivots would run in a circle"
    columns = units.layers[index].columns
    pinned = np.repeat(
        [group.pinned_by or "" for group in conversion.groups], [g.size for g in conversion.groups]
    )
    reasons = set(np.append(pinned, "")[columns].tolist())
    if len(reasons) == 1 and "" not in reasons:
        return f"holds no pivot, as what it reads {reasons.pop()}"
    return NO_PIVOT


def _dtype_name(model: nn.Module) -> str:
    """The dtype for messages: ``float16``."""
    return str(run_dtype(model)).removeprefix("torch.")


def _last_layers(conversion: Conversion, calls: Mapping[str, Any]) -> set[int]:
    """The indices of the layers that make the network's outputs.

    These are the layers whose rows are outputs, and the layer that runs last if no other layer
    reads it: an activation such as softmax may come after it.
    """
    units = conversion.units
    reasons = np.append(
        np.repeat(
            [g.pinned_by or "" for g in conversion.groups], [g.size for g in conversion.groups]
        ),
        "",
    )
    is_output = np.array(
        [why.startswith(("is a network output", "is an output of")) for why in reasons], dtype=bool
    )
    found = {index for index, layer in enumerate(units.layers) if is_output[layer.rows].any()}
    running = [
        i for i, layer in enumerate(units.layers) if layer.parameter.rpartition(".")[0] in calls
    ]
    if running:
        rows = units.layers[running[-1]].next_units
        read = np.concatenate([layer.columns for layer in units.layers])
        if (rows >= 0).all() and not np.isin(rows, read).any():
            found.add(running[-1])
    return found


def _obstacle(
    model: nn.Module,
    layer: Layer,
    name: str,
    leaf: str,
    calls: list[Arguments],
    uses: Mapping[str, set[Stack]],
) -> str | None:
    """Why a layer cannot take Path-BN form; None if it can.

    ``calls`` and ``uses`` are results of ``observe``.
    """
    module = model.get_submodule(name)
    kind = kind_of(module)
    if layer.transposed:
        return "is a transposed convolution, whose skip would be spread over the output"
    if kind is None or leaf != "weight":
        return (
            f"is computed by {type(module).__name__}, not by a convolution or linear layer of torch"
        )
    if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return "has hooks or parametrizations"
    if (
        sum(
            parameter is module.weight
            for owner in model.modules()
            for parameter in owner._parameters.values()
        )
        > 1
    ):
        return "shares its weight with another layer"
    stacks = uses.get(layer.parameter, set())
    if any(not stack or stack[-1] != name for stack in stacks):
        return "has a weight that other code reads too"
    if not calls:
        return "runs only in training mode (an auxiliary head)"
    rank = RANKS[kind]
    ranks = {(args[0] if args else kwargs["input"]).dim() for args, kwargs in calls}
    if ranks != {rank}:
        return f"reads inputs of {min(ranks)} dimensions, but its BatchNorm needs {rank}"
    return _batch_norm_obstacle(model, layer, kind)


def _batch_norm_obstacle(model: nn.Module, layer: Layer, kind: type[nn.Module]) -> str | None:
    """Why the BatchNorm that follows a layer cannot be used.

    None if it can, or if there is none.
    """
    read_by = [layer.follower] if layer.follower is not None else [bn for bn, *_ in layer.readers]
    for name in read_by:
        if not _is_batch_norm(model, name):
            return (
                f"is followed by a batch_norm that {_caller(model, name)} calls itself: make it a"
                f" module of the network, nn.{BATCH_NORM_OF[kind].__name__}"
            )
    if layer.follower is None:
        return None
    bn: Any = model.get_submodule(layer.follower)
    sizes = nn.BatchNorm2d if is_frozen(bn) else type(bn)
    if not issubclass(sizes, BATCH_NORM_OF[kind] | nn.SyncBatchNorm):
        return (
            f"is followed by {layer.follower} ({type(bn).__name__}), which is made for other"
            " dimensions"
        )
    if bn.weight is None or bn.running_mean is None or bn._forward_hooks or bn._forward_pre_hooks:
        return f"is followed by {layer.follower}, which has no γ, no running statistics, or hooks"
    if not can_be_split(bn, (4, len(bn.running_mean), *(3,) * (RANKS[kind] - 2))):
        return (
            f"is followed by {layer.follower} ({type(bn).__name__}), which is not a BatchNorm of"
            " torch with something after it"
        )
    return None


def _is_batch_norm(model: nn.Module, name: str) -> bool:
    """Whether the BatchNorm that a trace calls ``name`` is a module of the network."""
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    return module is not None and (isinstance(module, _BatchNorm) or is_frozen(module))


def _caller(model: nn.Module, name: str) -> str:
    """The module whose forward calls the batch_norm that a trace calls ``name``, for messages."""
    modules = dict(model.named_modules())
    while name not in modules:  # it is called after a tensor, or by its number in its module
        name = name.rpartition(".")[0]
    kind = type(modules[name]).__name__
    return f"the forward of {name} ({kind})" if name else f"the forward of {kind}"


def _no_way_for_a_bias(
    model: nn.Module, candidates: list[Candidate], example_input: Any
) -> dict[str, str]:
    """The candidates that could not leave Path-BN form again, with the reason.

    All candidates have neither BatchNorm nor bias. Leaving Path-BN form produces a bias, and
    without a bias parameter it has to move into the means of the BatchNorms that read the layer.
    Whether it can is tried in float64: each candidate gets a large bias, of either sign, which its
    readers' means take up, and the results of all these BatchNorms have to stay the same.
    """
    none = (
        "has neither BatchNorm nor bias, and no BatchNorm after it takes up the bias that Path-BN"
        " leaves"
    )
    lost = {c.name: none for c in candidates if _rows_read(c) < len(c.layer.rows)}
    remaining = [c for c in candidates if c.name not in lost]
    if not remaining:
        return lost
    readers = sorted({bn for c in remaining for bn, _, _ in c.layer.readers})
    plain = copied(model).double()
    for name in readers:
        bn: Any = plain.get_submodule(name)
        nn.init.ones_(bn.weight)
    before = _results(plain, [*readers, *(c.name for c in remaining)], example_input)
    if not _biases_move(plain, remaining, before, readers, example_input):
        lost |= {
            c.name: none
            for c in remaining
            if not _biases_move(plain, [c], before, readers, example_input)
        }
    return lost


def _biases_move(
    plain: nn.Module,
    candidates: list[Candidate],
    before: dict[str, list[Tensor]],
    readers: list[str],
    example: Any,
) -> bool:
    """Whether the readers' results stay the same if the candidates get a bias.

    The readers' means take the bias up.
    """
    biased = copied(plain)
    generator = torch.Generator().manual_seed(0)
    for c in candidates:
        layer: Any = biased.get_submodule(c.name)
        size = 4 * max(float(result.abs().max()) for result in before[c.name])
        signs = torch.randint(2, (len(c.layer.rows),), generator=generator).double() * 2 - 1
        layer.bias = nn.Parameter((size * signs).to(layer.weight))
        for bn, rows, channels in c.layer.readers:
            mean = cast(Tensor, biased.get_submodule(bn).running_mean)
            mean[index_tensor(channels).to(mean.device)] += (size * signs[index_tensor(rows)]).to(
                mean
            )
    after = _results(biased, readers, example)
    pairs = [
        pair
        for name in readers
        for pair in zip(before.get(name, []), after.get(name, []), strict=True)
    ]
    return all(float((a - b).abs().max()) <= 1e-9 * float(a.abs().max()) for a, b in pairs)


def _results(model: nn.Module, names: list[str], example_input: Any) -> dict[str, list[Tensor]]:
    """The results of the named modules on the example, for every call."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, result: Tensor) -> None:
        found.setdefault(name, []).append(result.clone())

    with watched({name: model.get_submodule(name) for name in names}, after=note):
        forward_outputs(model, example_input)
    return found


def _rows_read(candidate: Candidate) -> int:
    """The number of the layer's rows that BatchNorms read."""
    return len(
        np.unique(
            np.concatenate(
                [np.zeros(0, dtype=np.int64), *(rows for _, rows, _ in candidate.layer.readers)]
            )
        )
    )
