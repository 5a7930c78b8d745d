"""The state of a search for the changes that a file shows, and what it has to ask.

``adjusting.py`` and ``adjusting_heads.py`` hold the steps of the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pathconvert.errors import ArchitectureError
from pathconvert.networks.architectures import Architecture, Shapes, shapes_of
from pathconvert.networks.heads import parse


@dataclass(frozen=True)
class Question:
    """Something that the tensors do not show.

    Attributes:
        text: what it is.
        answers: the arguments of the commonest answer.
        hint: what else can be written.
    """

    text: str
    answers: dict[str, Any]
    hint: str


@dataclass
class Search:
    """The changes that a file shows, found one after another and applied to ``model``.

    Attributes:
        stock: the stock network.
        shapes: of the file's tensors.
        given: the arguments that the user named.
        arguments: those of the stock network; every change is added.
        model: the stock network on the meta device; changed.
        notes: one sentence for every change.
        questions: what has to be asked; its commonest answer is among the arguments.
    """

    stock: Architecture
    shapes: Shapes
    given: dict[str, Any]
    arguments: dict[str, Any]
    model: nn.Module
    notes: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stock network's name."""
        return self.stock.name

    def input_size(self) -> tuple[int, ...] | None:
        """The size of an input of the network."""
        size = self.stock.input_size
        if size is None:
            return None
        sides = (32, 32) if self.arguments.get("stem") == "cifar" else size[1:]
        return (self.arguments.get("in_channels", size[0]), *sides)

    def has_other_sizes(self) -> bool:
        """Whether layers may not fit together, which only running the network shows."""
        head = parse(self.arguments.get("head", "identity"))
        return (
            bool(self.arguments.keys() & {"avgpool", "widths"})
            or any(layer.inputs is not None for layer in head)
            or ("in_channels" in self.arguments and bool(self.arguments.get("transform_input")))
        )

    def computes(self, model: nn.Module) -> bool:
        """Whether the network takes an input: whether its widths fit together.

        Detectors are not run; only their numbers of classes and keypoints may differ.
        """
        size = self.input_size()
        if self.stock.task == "detection" or size is None:
            return True
        try:
            with torch.no_grad():
                model(torch.empty(1, *size, device="meta"))
        except (RuntimeError, IndexError):  # shapes that do not fit; a transform of three channels
            return False
        return True

    def refusal(self) -> ArchitectureError:
        """What has to be asked, with the command that answers it."""
        answers: dict[str, Any] = {}
        for question in self.questions:
            answers |= question.answers
        texts = "; ".join(question.text for question in self.questions)
        hints = ". ".join(question.hint for question in self.questions)
        return ArchitectureError(
            f"these are the tensors of a changed {self.name}: {texts}",
            f"Say what it has, for example --arch '{self.call(answers)}'. {hints}.",
        )

    def check_given(self) -> None:
        """Refuse what the user named, but the tensors show otherwise.

        Raises:
            ArchitectureError: an argument is not what the tensors show.
        """
        for key in ("in_channels", "batch_norm", "batch_norm_kept", "biases", "widths"):
            shown = self.arguments.get(key)
            if key not in self.given or self.given[key] == shown:
                continue
            found = "there is no such change" if shown is None else f"it is {shown}"
            raise ArchitectureError(
                f"{self.name}: {key}={self.given[key]} was given, but in the file {found}",
                f"Leave {key} out: it is read from the tensors.",
            )

    def call(self, answers: Mapping[str, Any]) -> str:
        """The network as ``--arch`` takes it, with the user's arguments and other ones."""
        both = self.given | dict(answers)
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in both.items())})"


def below(place: str, shapes: Shapes) -> Shapes:
    """The tensors of a module, by their names in it."""
    prefix = f"{place}."
    return {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}


def shapes_in(model: nn.Module) -> Shapes:
    """The shape of every tensor of a network."""
    return shapes_of(model.state_dict())


def counted(number: int, noun: str) -> str:
    """``1 output``, ``2 outputs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
