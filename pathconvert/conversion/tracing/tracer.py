"""Model + example → a :class:`~pathconvert.conversion.tracing.trace.Trace`, in one forward.

The forward runs on the *meta* device, which has shapes but no numbers, under a
:class:`torch.overrides.TorchFunctionMode`. The ids of an activation have the same rank as it has; a
dimension along which they are constant has size 1, so a feature map [N, C, H, W] usually has ids
[1, C, 1, 1].

A trace stops with a :class:`~pathconvert.errors.TraceError` when it meets something that it cannot
follow: control flow that depends on numbers (the meta device has none), and tensors that scripted
or custom C++ code makes. Control flow that depends on shapes is followed for the shape of the
example.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pathconvert.conversion.calls import Observed, function_name, running_modules
from pathconvert.conversion.frozen import frozen_batch_norms_as_calls
from pathconvert.conversion.modules import (
    mode_of,
    output_tensors,
    tensors_in,
    with_tensors,
)
from pathconvert.conversion.tracing.function_call import (
    NUMBERLESS,
    Call,
    Rule,
    changes_its_input,
    pinned_like,
)
from pathconvert.conversion.tracing.ties import first_names
from pathconvert.conversion.tracing.trace import PINNED, ZERO, IdVector, Slot, Step, Trace
from pathconvert.errors import PathconvertError, TraceError, first_line

#: Functions whose result holds zeros, or nothing yet.
MAKES_ZEROS = (torch.zeros, torch.zeros_like, torch.empty, torch.empty_like)


class Tracer(TorchFunctionMode):
    """Runs every torch function on the meta device and lets a rule follow its ids (``rules.py``).

    Args:
        model: not changed; each call gets meta tensors in place of its parameters and buffers.
        trace: the trace to extend.
        rule_of: maps a torch function to its name and its rule.
        observed: what a run showed of the call that is traced, if it is that of a part of the
            network. Tensors that escape from it are pinned; a trace that runs other functions is
            refused.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        rule_of: Callable[[Any], tuple[str, Rule]],
        observed: Observed | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.trace = trace
        self.rule_of = rule_of
        self.observed = observed
        self._count = 0
        first = first_names(model)
        tensors = (*model.named_buffers(), *model.named_parameters())
        self.names = {id(tensor): first[name] for name, tensor in tensors}
        self.saved = set(model.state_dict(keep_vars=True))
        self.modules = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.seen: set[str] = set()
        #: Name of a running statistic that a BatchNorm normalises with → its ids.
        self.statistics: dict[str, IdVector] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._uses: Counter[int] = Counter()
        self._written: set[int] = set()
        self._constants: dict[int, Tensor] = {}
        self._anonymous: Counter[str] = Counter()
        self._steps: list[tuple[str, int, int]] = []

    @property
    def path(self) -> str:
        """The path of the innermost module of the model that is running."""
        return next(
            (self.modules[module] for module in reversed(self.stack) if module in self.modules), ""
        )

    def name_of(self, tensor: Tensor | None) -> str | None:
        """The name of a parameter, or of a buffer that is part of the state dict.

        None for every other tensor.
        """
        name = self.names.get(id(tensor)) if tensor is not None else None
        return name if name in self.saved else None

    def is_live(self, tensor: Tensor) -> bool:
        """Whether rules follow this tensor: an activation, a parameter, or a buffer like one.

        A floating-point buffer of the state dict can be rescaled, so it is followed as a parameter
        is. Everything else is a constant.
        """
        if id(tensor) in self._values or self._is_written(tensor):
            return True
        name = self.names.get(id(tensor))
        is_weight = name in self.saved and tensor.is_floating_point()
        return name is not None and (isinstance(tensor, nn.Parameter) or is_weight)

    def set(self, tensor: Tensor, ids: Tensor) -> None:
        """Remember the ids of a tensor."""
        known = self._values.get(id(tensor))
        self._values[id(tensor)] = (tensor, ids)
        if id(tensor) not in self.names and tensor.device.type != "meta":
            self._mark_written(tensor)
        if known is not None and known[1] is not ids and bool((known[1] == ZERO).any()):
            self._overwritten(tensor)

    def _mark_written(self, tensor: Tensor) -> None:
        """Treat a constant and its views as activations: their numbers are not known any more."""
        if tensor.layout is torch.strided:
            self._written.add(tensor.untyped_storage()._cdata)

    def _is_written(self, tensor: Tensor) -> bool:
        """Whether a constant, or one that it is a view of, was overwritten with other numbers."""
        if not self._written or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self._written

    def _overwritten(self, tensor: Tensor) -> None:
        """Pin the zeros in other views of a tensor that was changed in place.

        They may not be zeros any more.
        """
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
            name = self.names.get(id(tensor))
            if name is None or self._is_written(tensor):
                return pinned_like(tensor)
            vector = self.trace.fresh(tensor.numel())
            self.trace.slots.append(Slot(name, vector))
            self.set(tensor, torch.from_numpy(vector).view(tensor.shape))
            return self.ids(tensor)
        if tensor.device.type == "meta" and id(tensor) not in self.names:
            raise TraceError(
                f"a tensor inside {self.path or 'the network'} comes from code that cannot be"
                " followed"
            )
        return pinned_like(tensor)

    def anonymous(self, name: str, size: int) -> str:
        """A name of its own for a call without parameters: ``name#2 of 16``."""
        self._anonymous[name] += 1
        return f"{name}#{self._anonymous[name]} of {size}"

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

        self.trace.steps += [
            Step(name, alone(read, made_by), alone(made, read_by))
            for name, read, made in self._steps
        ]

    def pin_tensor(self, tensor: Tensor, reason: str) -> None:
        """Pin a tensor.

        A parameter that has no ids yet gets ``PINNED`` throughout: attention has millions of
        elements, and pinning new ids one by one would be slow.
        """
        if id(tensor) not in self._values:
            self.trace.slots.append(Slot(self.names[id(tensor)], np.full(tensor.numel(), PINNED)))
            self.set(tensor, pinned_like(tensor))
        self.trace.pin(self.ids(tensor).flatten().numpy(), reason)

    def to_meta(self, tree: Any, kept: frozenset[int] = frozenset()) -> Any:
        """``tree`` with its tensors replaced by meta tensors of the same shape and dtype.

        Args:
            tree: any nesting of tuples, lists and dictionaries.
            kept: ids of the tensors that stay as they are.
        """

        def meta(tensor: Tensor) -> Tensor:
            if tensor.device.type == "meta" or id(tensor) in kept:
                return tensor
            return torch.empty_like(tensor, device="meta")

        return with_tensors(meta, tree)

    def has_ids(self, tensor: Tensor) -> bool:
        """Whether the tensor has ids already: it was made, or used element by element."""
        return id(tensor) in self._values

    def has_other_views(self, tensor: Tensor) -> bool:
        """Whether other tensors with ids share the tensor's memory, or it cannot be told."""
        if id(tensor) in self.names or id(tensor) not in self._values:
            return True
        storage = tensor.untyped_storage()._cdata
        return any(
            other is not tensor and other.untyped_storage()._cdata == storage
            for other, _ in self._values.values()
        )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        number = self._count
        self._count += 1
        self._compare(number, func)
        result = self._followed(func, args, kwargs or {})
        if self.observed is None:
            return result
        for place, leaf in enumerate(tree_leaves(result)):
            if (number, place) in self.observed.escapes:
                reason = f"leaves {self.path or 'its part'} otherwise than as its result"
                self.trace.pin(self.ids(leaf).flatten().numpy(), reason)
        return result

    def _compare(self, number: int, func: Any) -> None:
        """Refuse a part that runs other functions on shapes alone than in the whole network.

        Raises:
            TraceError: the function is not the one that ran at this place.
        """
        if self.observed is None:
            return
        expected = self.observed.functions[number : number + 1]
        if expected != (function_name(func),):
            raise TraceError(
                f"{self.path or 'a part'} does something else by itself than in the network: it"
                f" calls {function_name(func)} where {', '.join(expected) or 'nothing'} ran"
            )

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function, with ids."""
        name, rule = self.rule_of(func)
        call = Call(self, name, func, args, kwargs)
        tensors = call.tensors()
        self.seen.update(self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names)
        if rule not in NUMBERLESS:
            self._note_reads(func, args, tensors)
        if any(self.is_live(tensor) for tensor in tensors):
            if kwargs.get("out") is not None:
                raise TraceError(f"{call.where} writes into out=, which cannot be followed")
            return rule(call)
        writes = changes_its_input(func) or kwargs.get("out") is not None
        # the update of num_batches_tracked
        on_a_copy = writes and any(id(tensor) in self.names for tensor in tensors)
        result = call.run() if on_a_copy else func(*args, **kwargs)
        if writes and (on_a_copy or is_random(name)):
            self._mark_written(args[0])
        elif is_random(name):
            return with_tensors(self._without_numbers, result)
        if func in MAKES_ZEROS and result.is_floating_point() and result.dim() > 1:
            zeros = torch.empty_like(result, device="meta")  # activations may be written into it
            self.set(zeros, pinned_like(zeros) * ZERO)
            return zeros
        for leaf in tensors_in(result):
            if leaf.device.type == "meta" and id(leaf) not in self.names:
                self.set(leaf, pinned_like(leaf))
        return result

    def _note_reads(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Count the reads of activations, and keep the constants of the network that are read."""
        changed = args[0] if args and changes_its_input(func) else None
        for tensor in tensors:
            if self.is_live(tensor):
                self._uses[id(tensor)] += 1
            elif tensor is not changed and id(tensor) in self.names:
                self._constants[id(tensor)] = tensor

    def keeps_tensors(self, module: nn.Module) -> bool:
        """Whether the forward of ``module`` kept something that its next forward may read.

        That is a tensor that it made and that is an attribute of a module now, or another number in
        a constant that it read.
        """
        kept = (tensor for one in module.modules() for tensor in tensors_in(vars(one)))
        return any(map(self.is_live, self._constants.values())) or any(
            id(tensor) not in self.names and self.is_live(tensor) for tensor in kept
        )

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        """A meta tensor with factor 1, as the next run draws other numbers."""
        drawn = torch.empty_like(tensor, device="meta")
        self.set(drawn, pinned_like(drawn))
        return drawn


@functools.cache
def is_random(name: str) -> bool:
    """Whether an operation of torch draws random numbers, as its operator is tagged."""
    operator = getattr(torch.ops.aten, name.strip("_"), None)
    overloads = [] if operator is None else operator.overloads()
    tag = torch.Tag.nondeterministic_seeded
    return any(tag in getattr(operator, overload).tags for overload in overloads)


def run(
    tracer: Tracer,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> None:
    """Trace one forward of ``module``; its inputs and all its outputs are pinned to factor 1.

    A network that keeps tensors in its attributes may read them in its next forward, so it is run
    twice.

    Raises:
        TraceError: the forward cannot be followed on the meta device.
    """
    with (
        mode_of(tracer.model, training=training),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        frozen_batch_norms_as_calls(tracer.model),
        running_modules(tracer.stack),
    ):
        try:
            outputs = _run_once(tracer, module, args, kwargs)
            if tracer.observed is None and tracer.keeps_tensors(module):
                outputs += _run_once(tracer, module, args, kwargs)
        except PathconvertError:
            raise
        except Exception as error:
            place = tracer.path or tracer.modules.get(module, "") or "the network"
            why = first_line(error)
            raise TraceError(
                f"the forward of {place} cannot be followed on shapes alone: {why}"
            ) from error
    tracer.finish(outputs)
    for tensor in outputs:
        tracer.trace.pin(tracer.ids(tensor).flatten().numpy(), _output_reason(tracer, module))


def _run_once(
    tracer: Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The outputs of one forward whose inputs have factor 1."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            tracer.set(leaf, pinned_like(leaf))
    with tracer:
        output = module(*args, **kwargs)
    return output_tensors(output)


def _output_reason(tracer: Tracer, module: nn.Module) -> str:
    """Why the outputs of a module are pinned.

    ``path_bn/candidates.py`` recognises these reasons.
    """
    name = tracer.modules.get(module, "")
    return (
        f"is an output of {name}, which is converted by itself" if name else "is a network output"
    )
