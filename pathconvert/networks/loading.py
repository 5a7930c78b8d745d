"""Load a checkpoint of any form as a module, with what is known about it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pathconvert.choices import Form
from pathconvert.conversion.record import Record, attach_record
from pathconvert.errors import ArchitectureError, CheckpointError
from pathconvert.files.checkpoint import Checkpoint, read_checkpoint
from pathconvert.files.weights import check_weights
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.metadata import check_version, own_labels, own_preprocessing
from pathconvert.networks.preprocessing import Preprocessing, labels_for
from pathconvert.networks.pretrained import TRANSFORMING, is_pretrained_file, pretrained
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
    """

    model: nn.Module
    architecture: Architecture
    checkpoint: Checkpoint | None
    tensor_names: tuple[str, ...]

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
        return recorded_in(self.checkpoint)

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

        It is what the network was fine-tuned with, else what torchvision's weights expect. None if
        neither is known.
        """
        own = own_preprocessing(self.checkpoint)
        if own is None:
            return Preprocessing.for_architecture(self.architecture)
        size = self.architecture.input_size
        return own.at((size[1], size[2])) if size and len(size) == 3 else own

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes that the network was fine-tuned on, else those of torchvision's weights.

        None without either.
        """
        own = own_labels(self.checkpoint)
        return labels_for(self.architecture) if own is None else own

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
        """The tensors of another network of this architecture, under the source's names."""
        state = model.state_dict()
        return {name: state[name] for name in self.tensor_names}


def open_network(
    source: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, ...] | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
) -> LoadedNetwork:
    """Load a network from a file, or a torchvision network with its default weights by name.

    Args:
        source: a file (.pt, .pth, .safetensors), the folder of a fine-tuning run, of which the best
            network is loaded, or a torchvision name such as ``resnet50`` if there is no file of
            that name.
        arch: the network, if its tensors do not identify it: a torchvision name,
            ``package.module:builder`` or ``timm/NAME``.
        num_classes: the number of classes; overrides the number that the tensors show.
        input_size: overrides the architecture's input size; without the batch dimension.
        key: the wrapper key to take from the dictionary of a training script.
        trust_pickle: also load pickled modules, which runs their code.

    Raises:
        CheckpointError: there is no such file, or it cannot be read as a checkpoint.
        ArchitectureError: the network cannot be recognised or built, or does not have these
            tensors.
    """
    if Path(source).is_dir():
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
    tensors = architectures.modern_names(checkpoint.tensors)
    check_weights(checkpoint.path, tensors)
    architecture = _architecture_of(checkpoint, tensors, arch, num_classes, input_size)
    model = build_form(architecture, tensors, checkpoint)
    names = tuple(leave_path_bn(model).state_dict()) if has_path_bn(model) else tuple(tensors)
    return LoadedNetwork(model, _sized(architecture, input_size), checkpoint, names)


def build_form(
    architecture: Architecture, tensors: Mapping[str, Tensor], checkpoint: Checkpoint
) -> nn.Module:
    """Build the network in the form that the file is in: plain, path or Path-BN."""
    record = recorded_in(checkpoint)
    if record is not None and record.path_bn is not None:
        return architectures.load_tensors(
            architecture, tensors, lambda stock: insert_path_bn(stock, record)
        )
    model = architectures.load_tensors(architecture, tensors)
    if record is not None:
        attach_record(model, record)
    return model


def recorded_in(checkpoint: Checkpoint | None) -> Record | None:
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
        usual = tuple(architectures.index()[architecture.name]["input_size"])
        if (len(input_size), input_size[0]) != (len(usual), usual[0]):
            given, expected = ("x".join(map(str, size)) for size in (input_size, usual))
            raise ArchitectureError(
                f"{architecture.name} does not take inputs of size {given}",
                f"Give a size such as --input-size {expected}",
            )
    return dataclasses.replace(architecture, input_size=input_size)


def _architecture_of(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    arch: str | None,
    num_classes: int | None,
    input_size: tuple[int, ...] | None,
) -> Architecture:
    if arch is not None:
        named = architectures.resolve(arch, tensors, num_classes=num_classes, input_size=input_size)
        return _as_pretrained(named, checkpoint)
    if checkpoint.metadata is None:
        return _as_pretrained(architectures.recognise(tensors, num_classes=num_classes), checkpoint)
    check_version(checkpoint)
    stored = checkpoint.metadata.get("architecture")
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


def _as_pretrained(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The architecture, with ``transform_input=True`` if the file needs it.

    Some of torchvision's own weights do.
    """
    if (
        architecture.name in TRANSFORMING
        and "transform_input" not in architecture.arguments
        and is_pretrained_file(architecture.name, checkpoint.sha256)
    ):
        return dataclasses.replace(
            architecture, arguments=architecture.arguments | {"transform_input": True}
        )
    return architecture


def load(path: str | Path, **options: Any) -> tuple[nn.Module, dict[str, Any] | None]:
    """Load a network from a converted file or a plain checkpoint.

    Args:
        path: the file.
        **options: as in :func:`open_network`.

    Returns:
        The network in evaluation mode, and its conversion record (None for a plain checkpoint).
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
    for path in (folder / f"{name}.path.safetensors", folder / f"{name}.safetensors"):
        if path.is_file():
            return path
    raise CheckpointError(
        f"{folder} is a folder without {name}.path.safetensors",
        "Give a file, or the folder of a finetune run.",
    )
