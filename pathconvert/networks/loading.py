"""Load a checkpoint of any form as a module, with what is known about it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.choices import Form
from pathconvert.conversion.modules import unwrapped
from pathconvert.conversion.record import Record, attach_record
from pathconvert.errors import ArchitectureError, CheckpointError
from pathconvert.files.checkpoint import Checkpoint, read_checkpoint
from pathconvert.files.weights import check_weights
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.metadata import (
    check_version,
    known_labels,
    known_preprocessing,
    own_labels,
    own_preprocessing,
)
from pathconvert.networks.names import View
from pathconvert.networks.names_given import find_named, find_stored
from pathconvert.networks.names_identity import (
    check_config,
    check_module,
    differences_to_module,
    own_architecture,
    with_suggestion,
)
from pathconvert.networks.names_libraries import refuse_other_functions
from pathconvert.networks.names_modules import class_of, settings_of
from pathconvert.networks.names_notes import notes_on
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.networks.pretrained import TRANSFORMING, as_pretrained, pretrained
from pathconvert.networks.recognition import Found, find
from pathconvert.path_bn.form import has_path_bn, insert_path_bn, leave_path_bn


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and where it comes from.

    Attributes:
        model: the network in evaluation mode, with parameters in the checkpoint's dtype.
        architecture: how to build it again.
        checkpoint: the file; None if torchvision provided the weights.
        tensor_names: the names of the source's tensors in its order (old checkpoints lack
            ``num_batches_tracked``); if the source is in Path-BN form, those of the stock network.
        view: how the names and tensors of the file became these; None without a file, and for a
            pickled module that was itself taken.
        notes: what was taken from the file and what was left out, one sentence each.
    """

    model: nn.Module
    architecture: Architecture
    checkpoint: Checkpoint | None
    tensor_names: tuple[str, ...]
    view: View | None = None
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, Any] | None:
        """This package's metadata; None for a plain checkpoint."""
        return self.checkpoint.metadata if self.checkpoint else None

    @functools.cached_property
    def record(self) -> Record | None:
        """The conversion record; None for a plain checkpoint.

        Raises:
            RecordError: the record has another format version, or is damaged.
        """
        return _recorded_in(self.checkpoint)

    @property
    def training(self) -> dict[str, Any] | None:
        """Settings and results of the fine-tuning run that wrote the file.

        None for any other file.
        """
        return (self.metadata or {}).get("training")

    @property
    def form(self) -> Form:
        """``plain``, ``path`` or ``path-bn``."""
        return self.record.form if self.record else "plain"

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing for the architecture's size.

        It is what the file records, else what torchvision's weights expect. None if neither is
        known.
        """
        return known_preprocessing(self.checkpoint, self.architecture)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes that the file records, else those of torchvision's weights.

        None without either.
        """
        return known_labels(self.checkpoint, self.architecture)

    @property
    def doubt(self) -> str | None:
        """What neither the weights nor the file reveal about the network's function.

        None if nothing is missing.
        """
        name = self.architecture.name
        if name not in TRANSFORMING or "transform_input" in self.architecture.arguments:
            return None
        if self.metadata is not None or self.checkpoint is None:
            return None
        return (
            f"the file does not reveal whether this {name} transforms its input, as networks"
            " trained from torchvision's weights do. It is loaded as one that does not; if it"
            f" does, pass --arch '{name}(transform_input=True)'"
        )

    @property
    def was_trained_here(self) -> bool:
        """Whether the network was fine-tuned by this package.

        In that case the file records its preprocessing.
        """
        return own_preprocessing(self.checkpoint) is not None

    def tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The source's tensors in another network of this architecture, in that network's order."""
        there = set(self.tensor_names)
        return {name: tensor for name, tensor in model.state_dict().items() if name in there}


def open_network(
    source: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, ...] | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
    prefix: str | None = None,
) -> LoadedNetwork:
    """Load a network from a file, or a torchvision network with its default weights by name.

    Args:
        source: a file (.pt, .pth, .safetensors), a folder with a checkpoint in it, the folder of a
            fine-tuning run, of which the best network is loaded, or a torchvision name such as
            ``resnet50`` if there is no file of that name.
        arch: the network, if its tensors do not identify it: a torchvision name,
            ``package.module:builder`` or ``timm/NAME``.
        num_classes: the number of classes; overrides the number that the tensors show.
        input_size: overrides the architecture's input size; without the batch dimension.
        key: the dotted key of the state dict to take, such as ``model_ema``; None for the order of
            ``files/states.py``.
        trust_pickle: also load pickled modules, which runs their code; a module that is loaded so
            is taken itself, and not built anew.
        prefix: take only the tensors with this prefix (``encoder_q.``).

    Raises:
        CheckpointError: there is no such file, or it cannot be read as a checkpoint.
        ArchitectureError: the network cannot be recognised or built, or does not have these
            tensors.
    """
    if Path(source).is_dir() and _trained_files(Path(source), "best"):
        source = trained_file(Path(source))
    if not Path(source).exists() and arch is None and architectures.is_known(str(source)):
        architecture, model = pretrained(str(source))
        return LoadedNetwork(
            model, _sized(architecture, input_size), None, tuple(model.state_dict())
        )
    if not Path(source).exists() and re.fullmatch(r"\w+", str(source)):
        raise _no_such_source(str(source))
    checkpoint = read_checkpoint(source, key=key, trust_pickle=trust_pickle)
    own_preprocessing(checkpoint)  # damaged metadata is refused here, before the network is built
    own_labels(checkpoint)
    if checkpoint.trusted is not None and arch is None and checkpoint.metadata is None:
        return _module_itself(checkpoint, checkpoint.trusted, input_size)
    found = _find(checkpoint, arch, num_classes, input_size, prefix)
    tensors = found.view.tensors
    check_weights(checkpoint.path, tensors)
    model = build_form(found.architecture, tensors, checkpoint)
    names = tuple(leave_path_bn(model).state_dict()) if has_path_bn(model) else tuple(tensors)
    notes = notes_on(found, checkpoint, key)
    if arch is None and checkpoint.metadata is None:
        notes += _check_identity(checkpoint, found)
    elif checkpoint.metadata is None:
        notes += differences_to_module(model, settings_of(checkpoint))
    architecture = _sized(found.architecture, input_size)
    return LoadedNetwork(model, architecture, checkpoint, names, found.view, tuple(notes))


def build_form(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    template: nn.Module | None = None,
) -> nn.Module:
    """Build the network in the form that the file is in: plain, path or Path-BN.

    Args:
        architecture: the network.
        tensors: its tensors, in the form that the file is in.
        checkpoint: the file.
        template: a network in the stock form, of which a copy is made if the architecture is that
            of a pickled module, which cannot be built.

    Raises:
        ArchitectureError: the network cannot be built, or the tensors are not its.
        RecordError: the file's record has another format version, or is damaged.
    """
    record = _recorded_in(checkpoint)
    if record is not None and record.path_bn is not None:
        return architectures.load_tensors(
            architecture, tensors, lambda stock: insert_path_bn(stock, record), template
        )
    model = architectures.load_tensors(architecture, tensors, template=template)
    if record is not None:
        attach_record(model, record)
    return model


def _module_itself(
    checkpoint: Checkpoint, trusted: nn.Module, input_size: tuple[int, ...] | None
) -> LoadedNetwork:
    """A pickled module that the user trusts."""
    model = unwrapped(trusted).eval()
    tensors = model.state_dict()
    check_weights(
        checkpoint.path,
        {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)},
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    known = own_architecture(model)
    note = f"taking the pickled module itself, of the class {class_of(model)}"
    architecture = _sized(known or Architecture(architectures.PICKLED_MODULE), input_size)
    return LoadedNetwork(model, architecture, checkpoint, tuple(tensors), None, (note,))


def _recorded_in(checkpoint: Checkpoint | None) -> Record | None:
    """The conversion record in a file; None for a plain checkpoint, and without a file.

    Raises:
        RecordError: the record has another format version, or is damaged.
    """
    stored = (checkpoint.metadata or {}).get("record") if checkpoint else None
    return Record.from_json(stored) if stored else None


def _no_such_source(name: str) -> CheckpointError:
    close = difflib.get_close_matches(name, architectures.index(), 3)
    message = f"{name} is neither a file here nor a torchvision network that pathconvert knows."
    tip = f"Did you mean {', '.join(close)}?" if close else "Check the path for misspellings."
    return CheckpointError(message, tip)


def _sized(architecture: Architecture, input_size: tuple[int, ...] | None) -> Architecture:
    """``architecture`` for inputs of another size.

    Raises:
        ArchitectureError: the torchvision network takes inputs with another number of dimensions or
            channels.
    """
    if input_size is None:
        return architecture
    if architectures.is_known(architecture.name):
        stock = tuple(architectures.index()[architecture.name]["input_size"])
        usual = architecture.input_size or stock
        if (len(input_size), input_size[0]) != (len(usual), usual[0]):
            given, expected = ("x".join(map(str, size)) for size in (input_size, usual))
            raise ArchitectureError(
                f"{architecture.name} does not take inputs of size {given}",
                f"Give a size such as --input-size {expected}",
            )
    return dataclasses.replace(architecture, input_size=input_size)


def _find(
    checkpoint: Checkpoint,
    arch: str | None,
    num_classes: int | None,
    input_size: tuple[int, ...] | None,
    prefix: str | None,
) -> Found:
    """The network in a file.

    Raises:
        ArchitectureError: it is not recognised, or is not the one that was named.
        CheckpointError: the weights are quantized, which is why it is not recognised.
    """
    where = _where(checkpoint)
    tensors = checkpoint.tensors
    if checkpoint.metadata is not None:
        if arch is None:
            known = _stored_architecture(checkpoint)
        else:
            known = architectures.resolve(
                arch, tensors, num_classes=num_classes, input_size=input_size
            )
        return find_stored(known, tensors, where, _form_of(checkpoint))
    try:
        if arch is not None:
            found = find_named(
                arch, tensors, where, num_classes=num_classes, input_size=input_size, prefix=prefix
            )
        else:
            refuse_other_functions(tensors, where)
            found = find(tensors, where, num_classes=num_classes, prefix=prefix)
    except ArchitectureError as error:
        _refuse_integers(checkpoint)
        raise (with_suggestion(error, checkpoint.config) if arch is None else error) from None
    architecture = as_pretrained(found.architecture, checkpoint.sha256)
    return dataclasses.replace(found, architecture=architecture)


def _where(checkpoint: Checkpoint) -> str:
    """The file and what was taken from it so far, for messages."""
    taken = [f"the weights under {checkpoint.key!r}"] if checkpoint.key else []
    taken += [f"prefix {checkpoint.prefix!r} removed"] if checkpoint.prefix else []
    return f"{checkpoint.path} ({', '.join(taken)})" if taken else str(checkpoint.path)


def _form_of(checkpoint: Checkpoint) -> Callable[[nn.Module], nn.Module]:
    """What turns a stock network into the form that a file of ours is in."""
    record = _recorded_in(checkpoint)
    if record is None or record.path_bn is None:
        return lambda stock: stock
    return lambda stock: insert_path_bn(stock, record)


def _refuse_integers(checkpoint: Checkpoint) -> None:
    """Refuse a file with 8-bit weights as such, and not because it is unknown."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 1:
            check_weights(checkpoint.path, {name: tensor})


def _check_identity(checkpoint: Checkpoint, found: Found) -> list[str]:
    """Compare the recognised network with what the file says of it beside the tensors."""
    where, architecture = _where(checkpoint), found.architecture
    notes = check_config(checkpoint.config, architecture, where)
    if found.view.naming and found.view.naming.assumed and not checkpoint.config:
        notes.append(found.view.naming.assumed)
    return notes + check_module(checkpoint.module, architecture, settings_of(checkpoint), where)


def _stored_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture that a file of ours records.

    Raises:
        ArchitectureError: it records none.
    """
    check_version(checkpoint)
    stored = (checkpoint.metadata or {}).get("architecture")
    if stored is None:
        raise ArchitectureError(
            f"{checkpoint.path} does not say how to build its network",
            "Name it: --arch package.module:builder, or pathconvert.load(...,"
            " arch='package.module:builder').",
        )
    size = stored.get("input_size")
    return Architecture(
        stored["name"], stored["arguments"], tuple(size) if size else None, stored["task"]
    )


def load(path: str | Path, **options: Any) -> tuple[nn.Module, dict[str, Any] | None]:
    """Load a network from a converted file or a plain checkpoint.

    Args:
        path: the file.
        **options: as in :func:`open_network`.

    Returns:
        The network in evaluation mode, and its conversion record (None for a plain checkpoint).

    Raises:
        CheckpointError, ArchitectureError: as :func:`open_network`.
    """
    network = open_network(path, **options)
    return network.model, (network.metadata or {}).get("record")


def trained_file(folder: Path, name: str = "best") -> Path:
    """The file of the network that a run of ``finetune`` left in its folder.

    Args:
        folder: of the run.
        name: ``best`` or ``initial``.

    Raises:
        CheckpointError: the folder contains no such file.
    """
    for path in _trained_files(folder, name):
        return path
    raise CheckpointError(
        f"{folder} is a folder without {name}.path.safetensors",
        "Give a file, or the folder of a finetune run.",
    )


def _trained_files(folder: Path, name: str) -> list[Path]:
    paths = (folder / f"{name}.path.safetensors", folder / f"{name}.safetensors")
    return [path for path in paths if path.is_file()]
