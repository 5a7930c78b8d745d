"""How a file holds a network's tensors: its container, and the names and keys in it.

A training script saves ``{"state_dict": {"module.conv1.weight": …}}``, torchvision's old DenseNet
files have names of their own, and some frameworks count batches in a tensor of one element. A
:class:`Layout` says all of this about a file that was read, so that the tensors can be written back
the way they lay there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

#: The containers that are written, of the many that can be read (``containers.Container``):
#: ``torch`` is torch.save, ``torch-legacy`` torch.save before 1.6.
WrittenContainer = Literal["torch", "torch-legacy", "safetensors"]


@dataclass(frozen=True)
class Layout:
    """How a file holds the tensors of a network.

    Attributes:
        container: the kind of file.
        key: the keys under which the state dict lies, from the outside to the inside; none if the
            file is the state dict itself.
        prefix: the text before every name in the file.
        names: name of a tensor in the network → its name in the file, where that is not the
            network's behind the prefix.
        counters: name of a counter in the file → its dtype and shape there, where they differ from
            the network's (int64, a scalar).
        lost: what a file that is written in this layout lacks of the one that was read, one phrase
            each.
    """

    container: WrittenContainer = "safetensors"
    key: tuple[str, ...] = ()
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a network under the names, and in the forms, that the file has."""
        named = {
            self.names.get(name, self.prefix + name): tensor for name, tensor in tensors.items()
        }
        for name, (dtype, shape) in self.counters.items():
            if name in named:
                named[name] = named[name].to(getattr(torch, dtype)).reshape(shape)
        return named

    def read_back(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`named`."""
        own = {there: name for name, there in self.names.items()}
        return {
            own.get(name, name.removeprefix(self.prefix)): (
                tensor.reshape(()).to(torch.int64) if name in self.counters else tensor
            )
            for name, tensor in state.items()
        }

    def wrapped(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict under the keys of the file."""
        for key in reversed(self.key):
            state = OrderedDict({key: state})
        return state

    def to_json(self) -> dict[str, Any]:
        """The layout as a JSON object."""
        return {
            "container": self.container,
            "key": list(self.key),
            "prefix": self.prefix,
            "names": dict(self.names),
            "counters": {
                name: [dtype, list(shape)] for name, (dtype, shape) in self.counters.items()
            },
            "lost": list(self.lost),
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Layout:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: ``stored`` is not a layout.
        """
        if stored["container"] not in get_args(WrittenContainer):
            raise ValueError(f"there is no container {stored['container']!r}")
        counters = {
            str(name): (_dtype_name(dtype), tuple(int(side) for side in shape))
            for name, (dtype, shape) in stored["counters"].items()
        }
        return Layout(
            container=stored["container"],
            key=tuple(str(key) for key in stored["key"]),
            prefix=str(stored["prefix"]),
            names={str(name): str(other) for name, other in stored["names"].items()},
            counters=counters,
            lost=tuple(str(phrase) for phrase in stored["lost"]),
        )


def _dtype_name(name: Any) -> str:
    """The name of a dtype of torch; raises ValueError for anything else."""
    if not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise ValueError(f"there is no dtype {name!r}")
    return str(name)
