"""The tools that ``convert.py`` measures side by side, and the channels that each rescales."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from pathconvert.conversion.reparameterize import Conversion, convert_traced
from pathconvert.conversion.tracing.parts import trace_network

Channel = tuple[str, int]
"""A module that produces a channel (its BatchNorm where one follows), and the channel's row."""

# ---- the three tools: each returns seconds, channels and the network that it made ----------------


class Result:
    """One turn of one tool: CPU seconds by step, the network, the channels that it rescaled."""

    def __init__(
        self,
        seconds: dict[str, float],
        model: nn.Module | None = None,
        ties: list[list[Channel]] | None = None,
        **more: Any,
    ) -> None:
        self.seconds = seconds
        self.model = model
        self.ties = ties or []
        self.more = more

    @property
    def channels(self) -> set[Channel]:
        return {channel for tie in self.ties for channel in tie}


class Steps:
    """Seconds of the steps of one turn."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds[name] = time.process_time() - begun


def ours(pivot: str, scope: str = "block") -> Callable[[nn.Module, Any], Result]:
    def turn(model: nn.Module, example: Any) -> Result:
        steps = Steps()
        with steps.step("trace"):
            traced = trace_network(model, example)
        with steps.step("convert"):
            conversion = convert_traced(model, traced, scope, pivot, "unit")  # type: ignore[arg-type]
        return Result(steps.seconds, conversion.model, conversion=conversion)

    return turn


def brevitas(model: nn.Module, example: Any) -> Result:
    """``value_trace`` and ``EqualizeGraph(iterations=1)``.

    The copy that it changes is made off the clock.
    """
    from brevitas.fx import value_trace
    from brevitas.graph.equalize import EqualizeGraph
    from brevitas.graph.standardize import TorchFunctionalToModule

    model, steps = copy.deepcopy(model), Steps()
    first = next(iter(inspect.signature(model.forward).parameters))
    with torch.no_grad(), steps.step("trace"):
        graph = value_trace(model, {first: example})
    # off the clock: without it F.relu ends every region
    graph = TorchFunctionalToModule().apply(graph)
    with steps.step("equalize"):
        graph, regions = EqualizeGraph(iterations=1, return_regions=True).apply(graph)
    done = [
        r
        for r in regions
        if all(m.weight_axis is not None for m in (*r.srcs.values(), *r.sinks.values()))
    ]
    ties: dict[tuple[int, int], list[Channel]] = {}
    for number, region in enumerate(done):
        for name, source in region.srcs.items():
            where = source.equalization_indexes
            for row in range(where.start, where.end):
                ties.setdefault((number, where.offset + row), []).append((name.split("$")[0], row))
    return Result(
        steps.seconds, graph, list(ties.values()), sets=len(done), sets_found=len(regions)
    )


def aimet(model: nn.Module, example: Any) -> Result:
    """``fold_all_batch_norms`` and ``CrossLayerScaling.scale_model``, on a copy made off the
    clock.
    """
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    model, steps = copy.deepcopy(model), Steps()
    names = {id(module): name for name, module in model.named_modules()}
    kept = list(model.modules())  # ids stay theirs
    with steps.step("fold"):
        folded = fold_all_batch_norms(model, None, dummy_input=example)
    with steps.step("scale"):
        sets = CrossLayerScaling.scale_model(model, dummy_input=example)
    del kept
    norm_of = {id(conv): norm for conv, norm in folded}
    ties = []
    for pair in (pair for one in sets for pair in one.cls_pair_info_list):
        name = names[id(norm_of.get(id(pair.layer1), pair.layer1))]
        ties += [[(name, row)] for row in range(len(pair.scale_factor))]
    return Result(steps.seconds, model, ties, sets=len(sets))


def installed() -> dict[str, str | None]:
    """Which of the others can be imported: version, or why not."""
    modules = {
        "brevitas": "brevitas.graph.equalize",
        "aimet": "aimet_torch.cross_layer_equalization",
    }
    found: dict[str, str | None] = {}
    for tool, module in modules.items():
        try:
            __import__(module)
        except (
            Exception
        ) as error:  # an optional tool that does not import is a result, not a failure
            missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
            found[tool] = None if missing else f"does not import: {type(error).__name__}: {error}"
        else:
            from importlib.metadata import version

            found[tool] = version({"brevitas": "brevitas", "aimet": "aimet-torch"}[tool])
    logging.disable(logging.WARNING)
    return found


# ---- channels ------------------------------------------------------------------------------------


def our_channels(conversion: Conversion) -> tuple[set[Channel], dict[Channel, str]]:
    """Channels with a factor of their own, and of all others why not."""
    unit_reason: list[str] = []
    for group, public in zip(conversion.units.groups, conversion.groups, strict=True):
        for i in range(group.size):
            unit = group.start + i
            if public.pinned_by:
                unit_reason.append(public.pinned_by)
            elif conversion.pivots.layer[unit] < 0:
                unit_reason.append("dead: no live outgoing weight")
            elif public.held_back[i]:
                unit_reason.append("held back")
            else:
                circular = conversion.pivots.circular
                unit_reason.append("circular" if circular is not None and circular[unit] else "")
    rescaled: set[Channel] = set()
    left: dict[Channel, str] = {}
    for slot in conversion.units.slots:
        module = slot.parameter.rpartition(".")[0]
        for row, unit in enumerate(slot.rows.tolist()):
            if unit < 0:
                left.setdefault((module, row), "absorbed: a BatchNorm normalises the factor away")
            elif unit_reason[unit]:
                left.setdefault((module, row), unit_reason[unit])
            else:
                rescaled.add((module, row))
    return rescaled, left


def tied_count(ties: list[list[Channel]]) -> int:
    """How many independent factors: channels that share one (in one region, or through another)
    count once.
    """
    numbers: dict[Channel, int] = {}
    for tie in ties:
        for channel in tie:
            numbers.setdefault(channel, len(numbers))
    left = [numbers[tie[0]] for tie in ties for _ in tie]
    right = [numbers[channel] for tie in ties for channel in tie]
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(len(numbers),) * 2)
    return int(connected_components(graph, directed=False)[0]) if numbers else 0


def exceptions(
    theirs: set[Channel], rescaled: set[Channel], left: dict[Channel, str]
) -> dict[str, dict[str, int]]:
    """Channels that the other tool rescales and we don't: reason → module → how many."""
    found: dict[str, dict[str, int]] = {}
    for module, row in sorted(theirs - rescaled):
        why = left.get((module, row), "unknown to us")
        by_module = found.setdefault(why, {})
        by_module[module] = by_module.get(module, 0) + 1
    return found
