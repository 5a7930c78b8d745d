"""The notation for a head: the layers that stand in place of a network's classifier.

A head is written as the kinds of its layers, in their order, joined by ``-``:

=============================  =================================================================
``linear10``                   a linear layer with 10 outputs
``linear10nobias``             the same without a bias
``linear512x10``               the same with 512 inputs, where they are not those that come in
``linear``                     a linear layer whose size is taken from the weights
``batchnorm``                  a BatchNorm over the features
``relu``, ``dropout``, …       a layer without weights (``PLAIN`` has all of them)
``identity``                   no classifier: the outputs are the features
=============================  =================================================================

A single layer takes the classifier's own place. Several form an ``nn.Sequential``, whose layers are
numbered from 0. A layer with another name in it has the name in front: ``fc1:linear256``. So
``dropout-linear10`` has the tensors ``fc.1.weight`` and ``fc.1.bias``, ``0:linear10`` those of a
``Sequential`` with one layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from pathconvert.errors import ArchitectureError
from pathconvert.networks.names_index import Shapes

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": functools.partial(nn.Softmax, dim=1),
    "logsoftmax": functools.partial(nn.LogSoftmax, dim=1),
    "dropout": nn.Dropout,
    "flatten": nn.Flatten,
    "identity": nn.Identity,
}
_WEIGHTED = ("linear", "batchnorm")
_LINEAR = re.compile(r"linear(?:(?:(\d+)x)?(\d+)(nobias)?)?")
_BATCH_NORM = {"weight", "bias", "running_mean", "running_var"}


@dataclass(frozen=True)
class Layer:
    """A layer of a head.

    Attributes:
        kind: ``linear``, ``batchnorm``, or a key of ``PLAIN``.
        name: in the ``nn.Sequential``; empty for its position there.
        inputs: the number of inputs of a linear layer; None for the features that come in.
        outputs: the number of outputs of a linear layer; None if the weights are to say.
        bias: whether a linear layer has one.
    """

    kind: str
    name: str = ""
    inputs: int | None = None
    outputs: int | None = None
    bias: bool = True

    def __str__(self) -> str:
        text = f"{self.name}:{self.kind}" if self.name else self.kind
        if self.outputs is None:
            return text
        inputs = "" if self.inputs is None else f"{self.inputs}x"
        return f"{text}{inputs}{self.outputs}" + ("" if self.bias else "nobias")


Head = tuple[Layer, ...]


def text_of(head: Sequence[Layer]) -> str:
    """A head in the notation of this module."""
    return "-".join(map(str, head))


def parse(text: object) -> Head:
    """Read a head in the notation of this module.

    Raises:
        ArchitectureError: it is not written in that notation.
    """
    layers = []
    for word in str(text).split("-"):
        name, _, kind = word.rpartition(":")
        linear = _LINEAR.fullmatch(kind)
        if linear:
            inputs, outputs = (int(n) if n else None for n in linear.group(1, 2))
            layers.append(Layer("linear", name, inputs, outputs, not linear[3]))
        elif kind == "batchnorm" or kind in PLAIN:
            layers.append(Layer(kind, name))
        else:
            raise ArchitectureError(
                f"the head {str(text)!r} cannot be read: there is no layer {kind!r}",
                "Write the kinds of the layers in their order, for example"
                f" head=linear-relu-linear; the kinds are {', '.join((*_WEIGHTED, *PLAIN))}.",
            )
    return tuple(layers)


def names_of(head: Head) -> tuple[str, ...]:
    """The name of every layer in the head's module; one empty name if it is a single layer."""
    if len(head) == 1 and not head[0].name:
        return ("",)
    return tuple(layer.name or str(i) for i, layer in enumerate(head))


def outputs_of(head: Head) -> int | None:
    """The number of outputs of the last linear layer; None without one, or if it has no size."""
    return next((layer.outputs for layer in reversed(head) if layer.kind == "linear"), None)


def with_outputs(head: Head, outputs: int) -> Head:
    """The head with another number of outputs of its last linear layer, if it has one."""
    last = max((i for i, layer in enumerate(head) if layer.kind == "linear"), default=None)
    if last is None:
        return head
    return (*head[:last], dataclasses.replace(head[last], outputs=outputs), *head[last + 1 :])


def build(head: Head, features: int) -> nn.Module:
    """The module of a head.

    Args:
        head: the layers, with the sizes of the linear ones.
        features: the number of features that come in.

    Raises:
        ArchitectureError: a linear layer does not say how many outputs it has.
    """
    modules: list[nn.Module] = []
    for layer in head:
        if layer.kind == "linear":
            if not layer.outputs:
                raise ArchitectureError(
                    f"the head {text_of(head)!r} does not say how many outputs every linear layer"
                    " has",
                    "Without a file, write the sizes too, for example head=linear256-relu-linear10",
                )
            features = layer.inputs or features
            if not features:
                raise ArchitectureError(
                    "the network's own classifier has no linear layer that could be replaced",
                    "Leave out head=, or write the number of inputs too: head=linear512x10",
                )
            modules.append(nn.Linear(features, layer.outputs, bias=layer.bias))
            features = layer.outputs
        elif layer.kind == "batchnorm":
            modules.append(nn.BatchNorm1d(features))
        else:
            modules.append(PLAIN[layer.kind]())
    names = names_of(head)
    return (
        modules[0]
        if names == ("",)
        else nn.Sequential(OrderedDict(zip(names, modules, strict=True)))
    )


def features_of(classifier: nn.Module) -> int:
    """The number of features that a classifier takes; 0 if it has no linear layer."""
    linear = (module for module in classifier.modules() if isinstance(module, nn.Linear))
    first = next(linear, None)
    return first.in_features if first else 0


# ---- reading -------------------------------------------------------------------------------------


def read(shapes: Shapes, features: int) -> Head | None:
    """The layers with weights that tensors show, with their names and sizes.

    Args:
        shapes: the tensors of the head by name, without the head's own name in front of it.
        features: the number of features that the stock network's classifier takes.

    Returns:
        The layers; none for a network without a classifier. None if the tensors are not those of
        linear layers and BatchNorms.
    """
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        groups.setdefault(path, {})[leaf] = shape
    if any("." in name for name in groups) or ("" in groups and len(groups) > 1):
        return None
    layers = []
    for name, group in groups.items():
        layer = _layer_of(name, group)
        if layer is None:
            return None
        if layer.inputs == features:
            layer = dataclasses.replace(layer, inputs=None)
        layers.append(layer)
        features = layer.outputs or features
    return tuple(layers)


def _layer_of(name: str, group: Shapes) -> Layer | None:
    weight = group.get("weight", ())
    if len(weight) == 2 and group.keys() <= {"weight", "bias"}:
        return Layer("linear", name, weight[1], weight[0], "bias" in group)
    if len(weight) == 1 and group.keys() == _BATCH_NORM:
        return Layer("batchnorm", name)
    return None


def complete(found: Head) -> Head | None:
    """The head of layers that tensors show, where nothing else can stand between them.

    A single parameterless layer in front of the first one is a Dropout: it is one of those that
    leave the features of an evaluated network as they are.

    Returns:
        The whole head, or None where the tensors cannot tell: a missing number between two layers
        is an activation that is not known, and a ``Sequential`` whose only layer is a linear one
        ends in something without weights.
    """
    if not found:
        return (Layer("identity"),)
    if found[0].name == "":
        return found
    if not all(layer.name.isdecimal() for layer in found):
        return None
    numbers = [int(layer.name) for layer in found]
    if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    if numbers == [0]:
        return None
    front = (Layer("dropout"),) * numbers[0]
    return front + tuple(dataclasses.replace(layer, name="") for layer in found)


def may_stand_side_by_side(found: Head, features: int) -> bool:
    """Whether two linear layers could read the same features, in place of one after the other.

    Args:
        found: the layers that tensors show.
        features: the number of features that the first one reads.
    """
    for layer, following in itertools.pairwise(found):
        inputs = features if layer.inputs is None else layer.inputs
        if layer.kind == following.kind == "linear" and layer.outputs == inputs:
            return True
        features = layer.outputs or features
    return False


def suggestion(found: Head, pooled: bool = False) -> Head:
    """The commonest head that has the layers that tensors show: what a command can propose.

    Args:
        found: the layers with weights.
        pooled: whether the first two layers are fastai's pooling, of which the network takes care.
    """
    layers: list[Layer] = []
    for layer in found:
        if layer.name.isdecimal():
            gap = int(layer.name) - len(layers)
        else:
            gap = int(layer.kind == "linear" and any(x.kind == "linear" for x in layers))
        layers += _usual([x.kind for x in layers], gap, pooled)
        layers.append(Layer(layer.kind))
    return tuple(layers)


def _usual(before: list[str], gap: int, pooled: bool) -> list[Layer]:
    """What commonly fills ``gap`` places behind layers of these kinds."""
    fill: tuple[str, ...] = ("relu", "dropout")
    if not before:
        fill = ("identity", "flatten") if pooled else ("flatten", "dropout")[max(0, 2 - gap) :]
    elif before[-1] == "batchnorm" and before[-2:-1] != ["linear"]:
        fill = ("dropout",)  # an activation stands before the BatchNorm
    return [Layer(fill[i] if i < len(fill) else "identity") for i in range(gap)]


def filled(given: Head, found: Head) -> Head | None:
    """A head that somebody named, with the names and sizes of the layers that tensors show.

    Args:
        given: every layer of the head; sizes may be missing.
        found: the layers with weights.

    Returns:
        None if the two do not have the same layers with weights, in the same places.
    """
    weighted = [layer for layer in given if layer.kind in _WEIGHTED]
    if [layer.kind for layer in weighted] != [layer.kind for layer in found]:
        return None
    if any(g.outputs not in (None, f.outputs) for g, f in zip(weighted, found, strict=True)):
        return None
    if found and found[0].name == "":
        return found if len(given) == 1 else None
    rest = iter(found)
    layers = []
    for i, layer in enumerate(given):
        whole = next(rest) if layer.kind in _WEIGHTED else layer
        if whole.name.isdecimal() and int(whole.name) != i:
            return None
        alone = len(given) == 1
        keep = alone or not whole.name.isdecimal()
        layers.append(whole if keep else dataclasses.replace(whole, name=""))
    return tuple(layers)
