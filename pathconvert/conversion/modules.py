"""What several steps need of an ``nn.Module``, and of the trees of tensors around it.

These trees go into it and come out of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models.feature_extraction import DualGraphModule

from pathconvert.errors import TraceError


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of ``torch.compile`` and data parallel training, if any."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, detached and on the CPU."""
    pairs = (*model.named_buffers(), *model.named_parameters())
    return {name: tensor.detach().cpu() for name, tensor in pairs}


@contextlib.contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules into training or evaluation mode; afterwards, restore the attributes of each.

    All attributes are restored, because a forward may cache what it computes (a detector caches its
    anchors), and after a trace the cache would hold meta tensors.
    """
    # these have one forward for each mode, and only their own train() changes it
    dual = [
        (module, module.training)
        for module in model.modules()
        if isinstance(module, DualGraphModule) and module.training != training
    ]
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        attributes = vars(module)
        before.append((attributes, dict(attributes)))
        before += [
            (value, value.copy() if value else ())  # most are empty, and there are many
            for value in attributes.values()
            if isinstance(value, dict | list | set)
        ]
    try:
        for module, _ in dual:
            module.train(training)
        for module in model.modules():
            module.training = training
        yield
    finally:
        for module, was_training in dual:
            module.train(was_training)
        for live, was in before:
            live.clear()
            (live.extend if isinstance(live, list) else live.update)(was)


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of the tensors that hooks compute and keep as attributes.

    Hooks of pruning and weight_norm do so. ``copy.deepcopy`` refuses these tensors; given this
    dictionary as its memo, it takes the copies instead.
    """
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return {
        id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf
    }


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a network with everything that ``copy.deepcopy`` loses or refuses.

    It refuses computed tensors (:func:`computed_tensors`). Of a ``torch.fx.GraphModule`` it loses
    the modes, the forward hooks and all attributes that are not a part of the graph, such as
    ``path_record``.

    Args:
        model: not changed.
        memo: id of an object → what takes its place in the copy.
    """
    known: dict[int, Any] = computed_tensors(model) | dict(memo or {})
    result = copy.deepcopy(model, known)
    modules = [(module, known[id(module)]) for module in model.modules() if id(module) in known]
    for old, new in modules:
        if not isinstance(old, fx.GraphModule):
            continue
        new.train(old.training)
        for name, value in vars(old).items():
            if name not in vars(new) or name in ("_forward_hooks", "_forward_pre_hooks"):
                vars(new)[name] = copy.deepcopy(value, known)
    for old, new in modules:
        new.training = old.training
    return result


def refuse_unreadable(model: nn.Module, *, scripted: bool = False) -> None:
    """Refuse a network with modules that cannot be read.

    Args:
        model: not changed.
        scripted: whether modules of TorchScript are read. Their forward is compiled: it cannot be
            watched, and nothing tells which of their tensors it uses.

    Raises:
        TraceError: a parameter or buffer of a lazy module has no shape yet; or a module is
            TorchScript's, and ``scripted`` is True.
    """
    for path, module in model.named_modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        lazy = [name for name, tensor in tensors if is_lazy(tensor)]
        where = path or "the network"
        if lazy:
            raise TraceError(
                f"{where} ({type(module).__name__}) is a lazy module that has not run yet, so that"
                f" its {lazy[0]} has no shape",
                "Run the network once on an input before you convert or export it.",
            )
        if scripted and isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{where} is a TorchScript module, whose compiled forward cannot be watched",
                "Build the network without torch.jit.script and torch.jit.trace.",
            )


#: Types of arguments that contain no tensor.
PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors among ``tree_leaves(tree)``, several times as fast for the usual arguments."""
    kind = type(tree)
    if kind in PLAIN:
        return
    if isinstance(tree, Tensor):
        yield tree
    elif kind in (tuple, list, dict, OrderedDict):
        for branch in tree if kind in (tuple, list) else tree.values():
            if type(branch) not in PLAIN:
                yield from tensors_in(branch)
    elif not isinstance(tree, nn.Module | set):
        yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def with_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree_map_only(Tensor, change, tree)``, several times as fast for the usual arguments."""
    kind = type(tree)
    if kind in PLAIN:
        return tree
    if isinstance(tree, Tensor):
        return change(tree)
    if kind in (tuple, list):
        return kind([with_tensors(change, branch) for branch in tree])
    if kind is dict:
        return {key: with_tensors(change, branch) for key, branch in tree.items()}
    return tree_map_only(Tensor, change, tree)


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """The forward's positional arguments: a tuple as it is.

    Anything else becomes the only argument.
    """
    return example_input if isinstance(example_input, tuple) else (example_input,)


def own_inputs(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of ``tree`` for one run, as a forward may change its inputs in place.

    Args:
        tree: any nesting of tuples, lists and dictionaries.
        dtype: of the floating-point tensors; None keeps their own.
    """

    def copied(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(kind, copy=True)

    return tree_map_only(Tensor, copied, tree)


def meta_inputs(tree: Any, dtype: torch.dtype | None) -> Any:
    """``tree`` with its tensors on the meta device.

    Floating-point tensors have ``dtype`` (None: their own).
    """

    def convert(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device="meta")

    return tree_map_only(Tensor, convert, tree)


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in a forward's output.

    This includes those in nested containers and in the attributes of objects.

    Raises:
        TraceError: the output contains an object whose tensors cannot be reached.
    """
    tensors = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping | Sequence | Set) and not isinstance(
            leaf, str | bytes | torch.Size
        ):
            tensors += output_tensors(
                [dict(getattr(leaf, "__dict__", {})), *getattr(leaf, "values", leaf.__iter__)()]
            )
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            tensors += output_tensors(dict(vars(leaf)))
        elif not isinstance(
            leaf,
            str | bytes | int | float | complex | torch.Size | torch.dtype | torch.device | None,
        ):
            kind = type(leaf).__name__
            raise TraceError(
                f"the forward returns an object of type {kind}, whose tensors cannot be found"
            )
    return tensors
