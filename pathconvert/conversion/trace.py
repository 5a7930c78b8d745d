"""Model + example input → :class:`Trace`: which channels share a factor, who produces and who consumes them.

The forward runs once on the *meta* device (shapes, no numbers) under a :class:`torch.overrides.TorchFunctionMode`.
Beside every activation goes an integer tensor, its **ids**: one id for every scalar that may have a factor of its
own. Ids have the activation's rank; a dimension along which they are constant has size 1, so a feature map
[N, C, H, W] usually carries ids [1, C, 1, 1].

====================  =====================================================================================
``ZERO``              the value is 0 whatever the factor (zero padding)
``PINNED``            the factor is 1: network inputs, constants, results of operations that are not homogeneous
``2, 3, …``           an element that some parameter row produces
====================  =====================================================================================

Nothing is merged here: a :class:`Trace` collects *ties* (two ids share a factor) and *pins* (an id has factor 1, and
why), and the *slots* that say how every parameter is indexed by ids. ``groups.py`` solves them.

What a trace cannot see makes it stop with a :class:`~pathconvert.errors.TraceError`: control flow that depends on
numbers (the meta device has none) and tensors made behind its back (scripted or custom C++ code). Control flow that
depends on shapes is followed for the shape of the example.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pathconvert.errors import PathconvertError, TraceError, first_line

ZERO, PINNED = 0, 1

IdVector = NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """How a parameter is indexed by ids: ``parameter[row, column]`` scales by ``factor[row] / factor[column]``.

    Attributes:
        parameter: its name in ``model.named_parameters()`` (or buffers, for a frozen BatchNorm).
        rows: ids of what it produces, [rows].
        columns: ids of what it reads, [columns]; None for biases, γ, β.
        groups: of a convolution; row block g reads column block g alone.
        transposed: a transposed convolution stores [in, out / groups, …].
    """

    parameter: str
    rows: IdVector
    columns: IdVector | None = None
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class BatchNormCall:
    """One call of a BatchNorm ``name``: ids produced [C], ids read [C], the names of γ and of the running variance."""

    name: str
    rows: IdVector
    columns: IdVector
    weight: str | None
    var: str | None
    eps: float


@dataclass(frozen=True)
class Step:
    """One call of a layer or of a BatchNorm, and its neighbours.

    Attributes:
        name: a layer's weight, or a BatchNorm's :attr:`BatchNormCall.name`.
        source: the step whose result is read, if nothing else reads it; None otherwise.
        sink: the step that reads the result, if nothing else does; None otherwise.
    """

    name: str
    source: str | None
    sink: str | None


@dataclass
class Trace:
    """What one or several runs of a network say about its ids (see the module's docstring)."""

    slots: list[Slot] = field(default_factory=list)
    batch_norms: list[BatchNormCall] = field(default_factory=list)
    ties: list[tuple[IdVector, IdVector]] = field(default_factory=list)
    pins: list[tuple[IdVector, str]] = field(default_factory=list)
    residual: list[IdVector] = field(default_factory=list)
    offenders: list[tuple[str, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    id_count: int = 2

    def copy(self) -> Trace:
        """Another trace that goes on from here."""
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
        """Step → the step that alone reads what it makes, in every call, and that reads nothing else."""
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
        """``count`` new ids."""
        self.id_count += count
        return np.arange(self.id_count - count, self.id_count)

    def pin(self, ids: IdVector, reason: str) -> None:
        """These ids have factor 1, for ``reason``."""
        ids = np.unique(ids[ids > PINNED])
        if ids.size:
            self.pins.append((ids, reason))

    def tie(self, a: IdVector, b: IdVector, where: str) -> None:
        """``a[i]`` and ``b[i]`` have one factor; next to a pinned one the other is pinned too."""
        free = (a > PINNED) & (b > PINNED) & (a != b)
        if free.any():
            self.ties.append((a[free], b[free]))
        reason = f"meets a tensor that is not rescaled in {where}"
        self.pin(a[b == PINNED], reason)
        self.pin(b[a == PINNED], reason)


def compact(ids: Tensor) -> Tensor:
    """``ids`` with every dimension along which they are constant cut to size 1."""
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
    """One call of a torch function inside a traced forward, as a rule sees it."""

    tracer: Tracer
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def trace(self) -> Trace:
        return self.tracer.trace

    @property
    def where(self) -> str:
        """The place, for a reader: ``layer1.0 (add)``."""
        return f"{self.tracer.path or 'the network'} ({self.name})"

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested lists included."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def ids(self, tensor: Tensor) -> Tensor:
        return self.tracer.ids(tensor)

    def run(self) -> Any:
        """The function's result on the meta device."""
        return self.func(*self.tracer.lift(self.args), **self.tracer.lift(self.kwargs))

    def run_on_ids(self) -> Any:
        """The function's result on ids in place of every tensor that has some, at full size."""

        def ids(tensor: Tensor) -> Tensor:
            followed = self.tracer.is_live(tensor) or tensor.is_floating_point()
            return self.ids(tensor).expand(tensor.shape) if followed else tensor  # an index stays what it is

        return self.func(*tree_map_only(Tensor, ids, self.args), **tree_map_only(Tensor, ids, self.kwargs))

    def give(self, result: Any, ids: Tensor) -> Any:
        """``result`` with ``ids``; of several results, the first has them and the rest is pinned."""
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for position, tensor in enumerate(tensors):
            self.tracer.set(tensor, ids if position == 0 else pinned_like(tensor))
        return result

    def vector(self, ids: Tensor, dim: int, size: int) -> IdVector:
        """The ids along ``dim`` [size]; those that share an index along it are tied."""
        return self.tied(ids, [d for d in range(ids.dim()) if d != dim % ids.dim()]).flatten().expand(size).numpy()

    def tied(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """``ids`` with ``dims`` cut to size 1, after tying what differs along them."""
        dims = [d for d in dims if ids.shape[d] > 1]
        if not dims:
            return ids
        kept = ids.amax(dims, keepdim=True)
        self.trace.tie(ids.flatten().numpy(), kept.expand_as(ids).flatten().numpy(), self.where)
        return kept


def metadata(call: Call) -> Any:
    """Shapes, dtypes, devices: no use of the numbers."""
    return call.func(*call.args, **call.kwargs)


def pinned_like(tensor: Tensor) -> Tensor:
    """Ids of a tensor whose factor is 1 everywhere."""
    return torch.full((1,) * tensor.dim(), PINNED)


class Tracer(TorchFunctionMode):
    """Runs functions on the meta device and has a rule follow the ids of each (``rules.py``).

    Args:
        model: looked at, never changed: parameters and buffers are replaced by meta tensors call by call.
        trace: receives what is found.
        rule_of: function → (its name, the rule for it).
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
        """The innermost module that is running, as a path in the model."""
        return next((self.modules[module] for module in reversed(self.stack) if module in self.modules), "")

    def name_of(self, tensor: Tensor | None) -> str | None:
        """The name of a parameter, or of a buffer that checkpoints hold; None for every other tensor."""
        name = self.names.get(id(tensor)) if tensor is not None else None
        return name if name in self.saved else None

    def is_live(self, tensor: Tensor) -> bool:
        """Whether rules follow this tensor: an activation or a parameter (not a constant)."""
        return id(tensor) in self._values or (isinstance(tensor, nn.Parameter) and id(tensor) in self.names)

    def set(self, tensor: Tensor, ids: Tensor) -> None:
        known = self._values.get(id(tensor))
        self._values[id(tensor)] = (tensor, ids)
        if known is not None and known[1] is not ids and bool((known[1] == ZERO).any()):
            self._overwritten(tensor)

    def _overwritten(self, tensor: Tensor) -> None:
        """Zeros were changed in place: views of them are no zeros any more."""
        storage = tensor.untyped_storage()._cdata
        for other, ids in list(self._values.values()):
            if other is not tensor and other.untyped_storage()._cdata == storage:
                self._values[id(other)] = (other, torch.where(ids == ZERO, PINNED, ids))

    def ids(self, tensor: Tensor) -> Tensor:
        """A tensor's ids. A parameter outside the slots that rules know gets one id an element."""
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
        """Note a call of a layer or a BatchNorm (:class:`Step`)."""
        self._steps.append((name, id(read), id(made)))

    def finish(self, outputs: Sequence[Tensor]) -> None:
        """Note who reads whom, once the forward has returned ``outputs``."""
        self._uses.update(map(id, outputs))
        made_by = {made: name for name, _, made in self._steps}
        read_by = {read: name for name, read, _ in self._steps}

        def alone(tensor: int, names: dict[int, str]) -> str | None:
            return names.get(tensor) if self._uses[tensor] == 1 else None

        self.trace.steps += [Step(name, alone(read, made_by), alone(made, read_by)) for name, read, made in self._steps]

    def leave_alone(self, tensor: Tensor, reason: str) -> None:
        """Pin a tensor. A parameter without ids gets none: attention has millions of elements to pin one by one."""
        if id(tensor) not in self._values:
            self.trace.slots.append(Slot(self.names[id(tensor)], np.full(tensor.numel(), PINNED)))
            self.set(tensor, pinned_like(tensor))
        self.trace.pin(self.ids(tensor).flatten().numpy(), reason)

    def lift(self, tree: Any) -> Any:
        """``tree`` with every tensor replaced by a meta tensor of its shape and dtype."""

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
        on_a_copy = writes and any(id(tensor) in self.names for tensor in tensors)  # as num_batches_tracked's update
        result = call.run() if on_a_copy else func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta" and id(leaf) not in self.names:
                self.set(leaf, pinned_like(leaf) * (ZERO if func is torch.zeros else 1))
        return result


def changes_its_input(func: Any) -> bool:
    """Whether a torch function works in place, by torch's naming convention."""
    name = str(getattr(func, "__name__", ""))
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )


def _frozen_batch_norm(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps)


@contextlib.contextmanager
def _module_stack(stack: list[nn.Module]) -> Iterator[None]:
    """Keeps the modules that are running in ``stack``, outermost first."""
    hooks = nn.modules.module

    def pop(*_: Any) -> None:
        stack.pop()

    enter = hooks.register_module_forward_pre_hook(lambda module, _: stack.append(module))
    leave = hooks.register_module_forward_hook(pop)
    try:
        yield
    finally:
        enter.remove()
        leave.remove()
        stack.clear()


@contextlib.contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or evaluation mode; afterwards each has the attributes that it had.

    A forward may keep what it computes (a detector its anchors), which after a trace would be meta tensors.
    """
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        attributes = vars(module)
        before.append((attributes, dict(attributes)))
        before += [(value, value.copy()) for value in attributes.values() if isinstance(value, dict | list | set)]
    try:
        for module in model.modules():
            module.training = training
        yield
    finally:
        for live, was in before:
            live.clear()
            (live.extend if isinstance(live, list) else live.update)(was)


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of what hooks computed and keep as attributes (pruning, weight_norm): deepcopy refuses these."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """A tuple is a forward's positional arguments, anything else its only one."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def meta_inputs(tree: Any, dtype: torch.dtype | None) -> Any:
    """``tree`` on the meta device, floating tensors in ``dtype``."""

    def convert(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device="meta")

    return tree_map_only(Tensor, convert, tree)


def run(tracer: Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
    """Trace one forward of ``module``: its inputs and every output have factor 1.

    Raises:
        TraceError: the forward cannot be followed on the meta device.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            tracer.set(leaf, pinned_like(leaf))
    frozen = mock.patch.object(torchvision.ops.misc.FrozenBatchNorm2d, "forward", _frozen_batch_norm)
    with (
        mode_of(module, training),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        frozen,
        _module_stack(tracer.stack),
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


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in a forward's output: nested containers, and objects by their attributes.

    Raises:
        TraceError: an object that hides what it holds.
    """
    tensors = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping | Sequence | Set) and not isinstance(leaf, str | bytes | torch.Size):
            tensors += output_tensors([dict(getattr(leaf, "__dict__", {})), *getattr(leaf, "values", leaf.__iter__)()])
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            tensors += output_tensors(dict(vars(leaf)))
        elif not isinstance(leaf, str | bytes | int | float | complex | torch.Size | torch.dtype | torch.device | None):
            raise TraceError(f"the forward returns an object of type {type(leaf).__name__}, whose tensors are hidden")
    return tensors


def _output_reason(tracer: Tracer, module: nn.Module) -> str:
    name = tracer.modules.get(module, "")
    return f"is an output of {name}, which is converted by itself" if name else "is a network output"
