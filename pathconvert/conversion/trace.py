"""Model + example input → :class:`Trace`: which channels share a factor, and which layers produce and consume them.

The forward runs once on the *meta* device, which has shapes but no numbers, under a
:class:`torch.overrides.TorchFunctionMode`. Every activation is accompanied by an integer tensor, its **ids**: one id
for every scalar that may have a factor of its own. The ids have the same rank as the activation; a dimension along
which they are constant has size 1, so a feature map [N, C, H, W] usually has ids [1, C, 1, 1].

====================  =====================================================================================
``ZERO``              the value is 0, whatever its factor is (zero padding)
``PINNED``            the factor is 1: network inputs, constants, results of operations that are not homogeneous
``2, 3, …``           an element that a row of a parameter produces
====================  =====================================================================================

Nothing is merged here: a :class:`Trace` collects *ties* (two ids share a factor), *pins* (an id has factor 1, for a
stated reason) and *slots* (how each parameter is indexed by ids). ``groups.py`` solves them.

A trace stops with a :class:`~pathconvert.errors.TraceError` when it meets something that it cannot follow: control
flow that depends on numbers (the meta device has none), and tensors that scripted or custom C++ code makes. Control
flow that depends on shapes is followed for the shape of the example.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pathconvert.conversion.modules import mode_of, output_tensors, running_modules
from pathconvert.errors import PathconvertError, TraceError, first_line

ZERO, PINNED = 0, 1

IdVector = NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """How a parameter is indexed by ids: ``parameter[row, column]`` scales by ``factor[row] / factor[column]``.

    Attributes:
        parameter: its name in ``model.named_parameters()`` (or buffers, for a frozen BatchNorm).
        rows: ids of the elements that it produces, [rows].
        columns: ids of the elements that it reads, [columns]; None for biases, γ and β.
        groups: number of groups of a convolution; row block g reads only column block g.
        transposed: whether it is stored as [in, out / groups, …], as transposed convolutions are.
    """

    parameter: str
    rows: IdVector
    columns: IdVector | None = None
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class BatchNormCall:
    """One call of the BatchNorm ``name``.

    Attributes:
        name: the module's path.
        rows: ids that it produces, [C].
        columns: ids that it reads, [C].
        weight, var: names of γ and of the running variance; None where there is none.
        eps: as in the module.
    """

    name: str
    rows: IdVector
    columns: IdVector
    weight: str | None
    var: str | None
    eps: float


@dataclass(frozen=True)
class Step:
    """One call of a layer or of a BatchNorm, with its neighbours.

    Attributes:
        name: the name of a layer's weight, or a BatchNorm's :attr:`BatchNormCall.name`.
        source: the step whose result this step reads, if nothing else reads that result; None otherwise.
        sink: the step that reads this step's result, if nothing else reads it; None otherwise.
    """

    name: str
    source: str | None
    sink: str | None


@dataclass
class Trace:
    """What one or several runs of a network say about its ids (see the module's docstring).

    Attributes:
        slots: how each parameter is indexed by ids.
        batch_norms: all calls of BatchNorms.
        ties: pairs of vectors; ``a[i]`` and ``b[i]`` share a factor.
        pins: ids that have factor 1, and the reason.
        residual: ids that an ``add`` of two activations ties.
        offenders: path and type of every activation that is not homogeneous.
        steps: all calls of layers and BatchNorms.
        id_count: number of ids in use, ``ZERO`` and ``PINNED`` included.
    """

    slots: list[Slot] = field(default_factory=list)
    batch_norms: list[BatchNormCall] = field(default_factory=list)
    ties: list[tuple[IdVector, IdVector]] = field(default_factory=list)
    pins: list[tuple[IdVector, str]] = field(default_factory=list)
    residual: list[IdVector] = field(default_factory=list)
    offenders: list[tuple[str, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    id_count: int = 2

    def copy(self) -> Trace:
        """A copy that can be extended without changing this trace."""
        return Trace(
            list(self.slots),
            list(self.batch_norms),
            list(self.ties),
            list(self.pins),
            list(self.residual),
            list(self.offenders),
            list(self.steps),
            self.id_count,
        )

    def followers(self) -> dict[str, str]:
        """Step → the one step that reads its result in every call, provided that this one reads nothing else."""
        sources: dict[str, set[str | None]] = {}
        sinks: dict[str, set[str | None]] = {}
        for step in self.steps:
            sources.setdefault(step.name, set()).add(step.source)
            sinks.setdefault(step.name, set()).add(step.sink)
        return {
            name: sink
            for name, (sink, *others) in ((name, tuple(reached)) for name, reached in sinks.items())
            if sink is not None and not others and sources[sink] == {name}
        }

    def fresh(self, count: int) -> IdVector:
        """``count`` new ids, [count]."""
        self.id_count += count
        return np.arange(self.id_count - count, self.id_count)

    def pin(self, ids: IdVector, reason: str) -> None:
        """Record that these ids have factor 1, for ``reason``."""
        ids = np.unique(ids[ids > PINNED])
        if ids.size:
            self.pins.append((ids, reason))

    def tie(self, a: IdVector, b: IdVector, where: str) -> None:
        """Record that ``a[i]`` and ``b[i]`` share a factor; if one of them is pinned, so is the other."""
        free = (a > PINNED) & (b > PINNED) & (a != b)
        if free.any():
            self.ties.append((a[free], b[free]))
        reason = f"meets a tensor that is not rescaled in {where}"
        self.pin(a[b == PINNED], reason)
        self.pin(b[a == PINNED], reason)


def compact(ids: Tensor) -> Tensor:
    """``ids`` with size 1 in every dimension along which they are constant."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


Rule = Callable[["Call"], Any]


@dataclass
class Call:
    """One call of a torch function inside a traced forward: what a rule is given."""

    tracer: Tracer
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def trace(self) -> Trace:
        """The trace that the tracer extends."""
        return self.tracer.trace

    @property
    def where(self) -> str:
        """The place of the call, for messages: ``layer1.0 (add)``."""
        return f"{self.tracer.path or 'the network'} ({self.name})"

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, whether it was given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, including those in nested lists."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def ids(self, tensor: Tensor) -> Tensor:
        """The tensor's ids (:meth:`Tracer.ids`)."""
        return self.tracer.ids(tensor)

    def run(self) -> Any:
        """The function's result on the meta device."""
        return self.func(*self.tracer.to_meta(self.args), **self.tracer.to_meta(self.kwargs))

    def run_on_ids(self) -> Any:
        """The function's result on the ids of its tensors, each expanded to the full size of its tensor."""

        def ids(tensor: Tensor) -> Tensor:
            followed = self.tracer.is_live(tensor) or tensor.is_floating_point()
            return self.ids(tensor).expand(tensor.shape) if followed else tensor  # an index is passed on as it is

        return self.func(*tree_map_only(Tensor, ids, self.args), **tree_map_only(Tensor, ids, self.kwargs))

    def with_ids(self, result: Any, ids: Tensor) -> Any:
        """Give ``ids`` to ``result`` and return it; of several results, the first gets them and the rest are pinned."""
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for position, tensor in enumerate(tensors):
            self.tracer.set(tensor, ids if position == 0 else pinned_like(tensor))
        return result

    def channel_ids(self, ids: Tensor, dim: int, size: int) -> IdVector:
        """The ids along ``dim``, [size]; ids at the same index of ``dim`` are tied to each other."""
        return self.tied(ids, [d for d in range(ids.dim()) if d != dim % ids.dim()]).flatten().expand(size).numpy()

    def tied(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """``ids`` with size 1 in ``dims``, after tying the ids that differ along them."""
        dims = [d for d in dims if ids.shape[d] > 1]
        if not dims:
            return ids
        kept = ids.amax(dims, keepdim=True)
        self.trace.tie(ids.flatten().numpy(), kept.expand_as(ids).flatten().numpy(), self.where)
        return kept


def metadata(call: Call) -> Any:
    """Rule for shapes, dtypes and devices, which do not depend on the numbers."""
    return call.func(*call.args, **call.kwargs)


def pinned_like(tensor: Tensor) -> Tensor:
    """Ids for a tensor whose factor is 1 everywhere; they broadcast to its shape."""
    return torch.full((1,) * tensor.dim(), PINNED)


class Tracer(TorchFunctionMode):
    """Runs every torch function on the meta device and lets a rule follow its ids (``rules.py``).

    Args:
        model: not changed; each call gets meta tensors in place of its parameters and buffers.
        trace: the trace to extend.
        rule_of: maps a torch function to its name and its rule.
    """

    def __init__(self, model: nn.Module, trace: Trace, rule_of: Callable[[Any], tuple[str, Rule]]) -> None:
        super().__init__()
        self.trace = trace
        self.rule_of = rule_of
        self.names = {id(tensor): name for name, tensor in model.named_buffers()}
        self.names |= {id(tensor): name for name, tensor in model.named_parameters()}
        self.saved = set(model.state_dict(keep_vars=True))
        self.modules = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.seen: set[str] = set()
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._uses: Counter[int] = Counter()
        self._steps: list[tuple[str, int, int]] = []

    @property
    def path(self) -> str:
        """The path of the innermost module of the model that is running."""
        return next((self.modules[module] for module in reversed(self.stack) if module in self.modules), "")

    def name_of(self, tensor: Tensor | None) -> str | None:
        """The name of a parameter, or of a buffer that is part of the state dict; None for every other tensor."""
        name = self.names.get(id(tensor)) if tensor is not None else None
        return name if name in self.saved else None

    def is_live(self, tensor: Tensor) -> bool:
        """Whether rules follow this tensor: it is an activation or a parameter, not a constant."""
        return id(tensor) in self._values or (isinstance(tensor, nn.Parameter) and id(tensor) in self.names)

    def set(self, tensor: Tensor, ids: Tensor) -> None:
        """Remember the ids of a tensor."""
        known = self._values.get(id(tensor))
        self._values[id(tensor)] = (tensor, ids)
        if known is not None and known[1] is not ids and bool((known[1] == ZERO).any()):
            self._overwritten(tensor)

    def _overwritten(self, tensor: Tensor) -> None:
        """Pin the zeros in other views of a tensor that was changed in place: they may not be zeros any more."""
        storage = tensor.untyped_storage()._cdata
        for other, ids in list(self._values.values()):
            if other is not tensor and other.untyped_storage()._cdata == storage:
                self._values[id(other)] = (other, torch.where(ids == ZERO, PINNED, ids))

    def ids(self, tensor: Tensor) -> Tensor:
        """A tensor's ids. A parameter that has none yet gets a slot with one new id per element."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        if self.is_live(tensor):
            name = self.names[id(tensor)]
            vector = self.trace.fresh(tensor.numel())
            self.trace.slots.append(Slot(name, vector))
            self.set(tensor, torch.from_numpy(vector).view(tensor.shape))
            return self.ids(tensor)
        if tensor.device.type == "meta" and id(tensor) not in self.names:
            raise TraceError(f"a tensor inside {self.path or 'the network'} comes from code that cannot be followed")
        return pinned_like(tensor)

    def step(self, name: str, read: Tensor, made: Tensor) -> None:
        """Record a call of a layer or a BatchNorm (:class:`Step`)."""
        self._steps.append((name, id(read), id(made)))

    def finish(self, outputs: Sequence[Tensor]) -> None:
        """Record which step reads which, after the forward has returned ``outputs``."""
        self._uses.update(map(id, outputs))
        made_by = {made: name for name, _, made in self._steps}
        read_by = {read: name for name, read, _ in self._steps}

        def alone(tensor: int, names: dict[int, str]) -> str | None:
            return names.get(tensor) if self._uses[tensor] == 1 else None

        self.trace.steps += [Step(name, alone(read, made_by), alone(made, read_by)) for name, read, made in self._steps]

    def pin_tensor(self, tensor: Tensor, reason: str) -> None:
        """Pin a tensor.

        A parameter that has no ids yet gets ``PINNED`` throughout: attention has millions of elements, and pinning new
        ids one by one would be slow.
        """
        if id(tensor) not in self._values:
            self.trace.slots.append(Slot(self.names[id(tensor)], np.full(tensor.numel(), PINNED)))
            self.set(tensor, pinned_like(tensor))
        self.trace.pin(self.ids(tensor).flatten().numpy(), reason)

    def to_meta(self, tree: Any) -> Any:
        """``tree`` with every tensor replaced by a meta tensor of the same shape and dtype."""

        def meta(tensor: Tensor) -> Tensor:
            return tensor if tensor.device.type == "meta" else torch.empty_like(tensor, device="meta")

        return tree_map_only(Tensor, meta, tree)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, rule = self.rule_of(func)
        call = Call(self, name, func, args, kwargs)
        tensors = call.tensors()
        self.seen.update(self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names)
        if rule is not metadata:
            self._uses.update(id(tensor) for tensor in tensors if self.is_live(tensor))
        if any(self.is_live(tensor) for tensor in tensors):
            if kwargs.get("out") is not None:
                raise TraceError(f"{call.where} writes into out=, which cannot be followed")
            return rule(call)
        writes = changes_its_input(func) or kwargs.get("out") is not None
        on_a_copy = writes and any(id(tensor) in self.names for tensor in tensors)  # the update of num_batches_tracked
        result = call.run() if on_a_copy else func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta" and id(leaf) not in self.names:
                self.set(leaf, pinned_like(leaf) * (ZERO if func is torch.zeros else 1))
        return result


def changes_its_input(func: Any) -> bool:
    """Whether a torch function works in place, according to torch's naming convention."""
    name = str(getattr(func, "__name__", ""))
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )


def _frozen_batch_norm(module: Any, x: Tensor) -> Tensor:
    """The forward of FrozenBatchNorm2d, as a single call of torch."""
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps)


@contextlib.contextmanager
def _frozen_batch_norms_as_calls() -> Iterator[None]:
    """Let torchvision's FrozenBatchNorm2d call ``F.batch_norm``, so that the rule for BatchNorm follows it."""
    kind: Any = torchvision.ops.misc.FrozenBatchNorm2d
    original = kind.forward
    kind.forward = _frozen_batch_norm
    try:
        yield
    finally:
        kind.forward = original


def run(tracer: Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> None:
    """Trace one forward of ``module``; its inputs and all its outputs are pinned to factor 1.

    Raises:
        TraceError: the forward cannot be followed on the meta device.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            tracer.set(leaf, pinned_like(leaf))
    with (
        mode_of(module, training=training),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        _frozen_batch_norms_as_calls(),
        running_modules(tracer.stack),
    ):
        try:
            with tracer:
                output = module(*args, **kwargs)
        except PathconvertError:
            raise
        except Exception as error:
            place = tracer.path or tracer.modules.get(module, "") or "the network"
            why = first_line(error)
            raise TraceError(f"the forward of {place} cannot be followed on shapes alone: {why}") from error
    outputs = output_tensors(output)
    tracer.finish(outputs)
    for tensor in outputs:
        tracer.trace.pin(tracer.ids(tensor).flatten().numpy(), _output_reason(tracer, module))


def _output_reason(tracer: Tracer, module: nn.Module) -> str:
    """Why the outputs of a module are pinned; ``path_bn/candidates.py`` recognises these reasons."""
    name = tracer.modules.get(module, "")
    return f"is an output of {name}, which is converted by itself" if name else "is a network output"
