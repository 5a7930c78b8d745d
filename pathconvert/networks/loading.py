"""Networks in files: load a checkpoint of any form as a module, save a conversion with its provenance.

The metadata beside the tensors is a versioned format of its own::

    format_version, tool, torch, torchvision
    architecture     name, arguments, input_size, task; null where the class is not one that can be built by name
    source           file name and SHA-256 of the checkpoint that was converted, and the digest of its tensors
    record           the conversion record (record.py): scope, pivot, gauge, scales, pivots; for a network in Path-BN
                     form also ``path_bn``: its layers, λ, and where their statistics come from (entering.py); null
                     for a network that was trained without a conversion
    training         of a fine-tuned network, optional: its settings and what was measured
    preprocessing    of a network that was fine-tuned: how its images were prepared (preprocessing.py); else left out
    labels           of a network that was fine-tuned: its classes in the order of the logits; else left out
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from pathconvert.conversion.record import attach_record, form_of, record_of, unwrapped
from pathconvert.conversion.reparameterize import Conversion
from pathconvert.errors import ArchitectureError, CheckpointError
from pathconvert.files.checkpoint import Checkpoint, read_checkpoint, tensors_digest
from pathconvert.files.filetypes import AGAIN
from pathconvert.files.writing import write_checkpoint
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.preprocessing import Preprocessing, labels_for
from pathconvert.path_bn.form import has_path_bn, insert_path_bn, leave_path_bn
from pathconvert.version import __version__

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and where it comes from.

    Attributes:
        model: in evaluation mode, parameters in the checkpoint's dtype.
        architecture: how to build it again; None only for a class that cannot be built by name.
        checkpoint: the file; None where torchvision provided the weights.
        tensor_names: the tensors of the source, in its order (old checkpoints lack ``num_batches_tracked``); those of
            the stock network where the source is in Path-BN form.
    """

    model: nn.Module
    architecture: Architecture
    checkpoint: Checkpoint | None
    tensor_names: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, Any] | None:
        """This tool's metadata; None for a plain checkpoint."""
        return self.checkpoint.metadata if self.checkpoint else None

    @property
    def record(self) -> dict[str, Any] | None:
        """The conversion record; None for a plain checkpoint."""
        return self.metadata.get("record") if self.metadata else None

    @property
    def training(self) -> dict[str, Any] | None:
        """Settings and results of the run that trained it here; None where it was not."""
        return (self.metadata or {}).get("training")

    @property
    def form(self) -> str:
        """``plain``, ``path`` or ``path-bn``."""
        return str(self.record["form"]) if self.record else "plain"

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the network was fine-tuned with, at the architecture's size; else as torchvision's weights expect.

        None where nothing tells.
        """
        own = _own_preprocessing(self.checkpoint)
        if own is None:
            return Preprocessing.for_architecture(self.architecture)
        size = self.architecture.input_size
        return own.at((size[1], size[2])) if size and len(size) == 3 else own

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes that the network was fine-tuned to; else those of torchvision's weights; None without either."""
        own = _own_labels(self.checkpoint)
        return labels_for(self.architecture) if own is None else own

    @property
    def doubt(self) -> str | None:
        """What neither the tensors nor the file tell of the function; None where all is known."""
        name = self.architecture.name
        if name not in architectures.TRANSFORMING or "transform_input" in self.architecture.arguments:
            return None
        if self.metadata is not None or self.checkpoint is None:
            return None
        return (
            f"nothing in the file tells whether this {name} transforms its input, as one trained from torchvision's "
            f"weights does; taken for one that does not. Otherwise: --arch '{name}(transform_input=True)'"
        )

    @property
    def was_trained_here(self) -> bool:
        """Whether the file records what its network was fine-tuned with."""
        return _own_preprocessing(self.checkpoint) is not None

    def tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of another network of this architecture under the names that the source has."""
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
    """Load a network from a file, its architecture recognised, or by a torchvision name with its default weights.

    Args:
        source: a file (.pt, .pth, .safetensors), the folder of a fine-tuning run (its best network), or a torchvision
            name such as ``resnet50`` if no such file exists.
        arch: where tensors do not tell: a torchvision name, ``package.module:builder`` or ``timm/NAME``.
        num_classes: overrides what the tensors say.
        input_size: overrides the architecture's, without the batch dimension.
        key: the wrapper key to take from a training script's dictionary.
        trust_pickle: load a pickled module, which runs its code.

    Raises:
        CheckpointError, ArchitectureError: as their messages say.
    """
    if Path(source).is_dir():
        source = trained_file(Path(source))
    if not Path(source).exists() and arch is None and architectures.is_known(str(source)):
        architecture, model = architectures.pretrained(str(source))
        return LoadedNetwork(model, _sized(architecture, input_size), None, tuple(model.state_dict()))
    if not Path(source).exists() and re.fullmatch(r"\w+", str(source)):
        raise _no_such_source(str(source))
    checkpoint = read_checkpoint(source, key=key, trust_pickle=trust_pickle)
    _own_preprocessing(checkpoint)  # refused here where it is damaged
    _own_labels(checkpoint)
    tensors = architectures.modern_names(checkpoint.tensors)
    architecture = _architecture_of(checkpoint, tensors, arch, num_classes, input_size)
    model = _build(architecture, tensors, checkpoint)
    names = tuple(leave_path_bn(model).state_dict()) if has_path_bn(model) else tuple(tensors)
    return LoadedNetwork(model, _sized(architecture, input_size), checkpoint, names)


def _build(architecture: Architecture, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> nn.Module:
    """The network in the form that the file is in."""
    record = (checkpoint.metadata or {}).get("record") or {}
    if "path_bn" not in record:
        model = architectures.load_tensors(architecture, tensors)
        if record:
            attach_record(model, record)
        return model
    return architectures.load_tensors(architecture, tensors, lambda stock: insert_path_bn(stock, record))


def _own_preprocessing(checkpoint: Checkpoint | None) -> Preprocessing | None:
    """As the file records it.

    Raises:
        CheckpointError: it is damaged.
    """
    stored = _recorded(checkpoint, "preprocessing")
    if stored is None:
        return None
    try:
        return Preprocessing.from_json(stored)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(checkpoint, f"preprocessing: {type(error).__name__}: {error}") from error


def _own_labels(checkpoint: Checkpoint | None) -> tuple[str, ...] | None:
    """As the file records them.

    Raises:
        CheckpointError: they are damaged.
    """
    stored = _recorded(checkpoint, "labels")
    if stored is None:
        return None
    if not isinstance(stored, list) or not all(isinstance(label, str) for label in stored):
        raise _damaged(checkpoint, "labels are no list of names")
    return tuple(stored)


def _recorded(checkpoint: Checkpoint | None, what: str) -> Any:
    return (checkpoint.metadata or {}).get(what) if checkpoint else None


def _damaged(checkpoint: Checkpoint | None, what: str) -> CheckpointError:
    path = checkpoint.path if checkpoint else "the network"
    return CheckpointError(f"{path} has damaged pathconvert metadata: {what}", AGAIN)


def _no_such_source(name: str) -> CheckpointError:
    close = difflib.get_close_matches(name, architectures.index(), 3)
    message = f"{name} is neither a file here nor a torchvision network that pathconvert knows."
    tip = f"Did you mean {', '.join(close)}?" if close else "Check the path for misspellings."
    return CheckpointError(message, tip)


def _sized(architecture: Architecture, input_size: tuple[int, ...] | None) -> Architecture:
    """``architecture`` for inputs of another size.

    Raises:
        ArchitectureError: torchvision's network takes inputs of another number of dimensions or channels.
    """
    if input_size is None:
        return architecture
    if architectures.is_known(architecture.name):
        usual = tuple(architectures.index()[architecture.name]["input_size"])
        if (len(input_size), input_size[0]) != (len(usual), usual[0]):
            given, expected = ("x".join(map(str, size)) for size in (input_size, usual))
            raise ArchitectureError(
                f"{architecture.name} takes no input of size {given}", f"Such as --input-size {expected}"
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
    version = checkpoint.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint.path} has metadata of format version {version}; this is pathconvert {__version__}, which "
            f"reads version {FORMAT_VERSION}",
            f"Read it with the version that wrote it: {checkpoint.metadata.get('tool', 'unknown')}.",
        )
    stored = checkpoint.metadata.get("architecture")
    if stored is None:
        raise ArchitectureError(
            f"{checkpoint.path} does not say how to build its network",
            "Name it: --arch package.module:builder, or pathconvert.load(..., arch='package.module:builder').",
        )
    size = stored.get("input_size")
    return Architecture(stored["name"], stored["arguments"], tuple(size) if size else None, stored["task"])


def _as_pretrained(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """With ``transform_input`` where the file is torchvision's own."""
    if (
        architecture.name in architectures.TRANSFORMING
        and "transform_input" not in architecture.arguments
        and architectures.is_pretrained_file(architecture.name, checkpoint.sha256)
    ):
        return dataclasses.replace(architecture, arguments=architecture.arguments | {"transform_input": True})
    return architecture


def load(path: str | Path, **options: Any) -> tuple[nn.Module, dict[str, Any] | None]:
    """Load a network from a converted file or a plain checkpoint.

    Args:
        path: the file.
        **options: ``arch``, ``num_classes``, ``key``, ``trust_pickle`` as in :func:`open_network`.

    Returns:
        The network in evaluation mode, and its conversion record (None for a plain checkpoint).
    """
    network = open_network(path, **options)
    return network.model, network.record


def save(converted: Conversion | nn.Module, path: str | Path, *, force: bool = False) -> Path:
    """Save a conversion, or a network in Path-BN form, made through the Python API.

    The architecture is stored where the network is one of torchvision's, in every module's settings; any other is
    loaded again with ``load(path, arch="package.module:builder")``.

    Raises:
        OutputError: the file exists (without ``force``) or cannot be written.
    """
    if isinstance(converted, Conversion):
        model, record = converted.model, converted.record
    else:
        model = unwrapped(converted)
        record = record_of(model)
    stock = leave_path_bn(model) if has_path_bn(model) else model
    return write_checkpoint(path, model.state_dict(), make_metadata(record, _own_architecture(stock), {}), force=force)


def _own_architecture(model: nn.Module) -> Architecture | None:
    try:
        architecture = architectures.recognise(model.state_dict())
    except ArchitectureError:
        return None
    if getattr(model, "transform_input", False):
        arguments = architecture.arguments | {"transform_input": True}
        architecture = dataclasses.replace(architecture, arguments=arguments)
    built = architectures.build(architecture)
    # what no tensor shows (dilation, stride, eps) shows in the repr
    return architecture if type(built) is type(model) and repr(built) == repr(model) else None


def make_metadata(
    record: dict[str, Any] | None,
    architecture: Architecture | None,
    source: Mapping[str, str],
    *,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metadata of a converted file (see the module's docstring)."""
    own: dict[str, Any] = {} if preprocessing is None else {"preprocessing": dataclasses.asdict(preprocessing)}
    own |= {} if labels is None else {"labels": list(labels)}
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"pathconvert {__version__}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "architecture": dataclasses.asdict(architecture) if architecture else None,
        "source": dict(source),
        "record": record,
    } | own


def save_converted(
    converted: Conversion | nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    force: bool,
    check: Callable[[LoadedNetwork], None],
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write ``network`` converted, in path or Path-BN form; ``check`` sees what was written before it is renamed.

    ``preprocessing`` and ``labels`` are those that the network was fine-tuned with; without them the file keeps those
    that ``network``'s has.
    """
    file = network.checkpoint
    if network.metadata:  # what was converted first stays the source
        source = network.metadata["source"]
    else:
        source = {"tensors_sha256": tensors_digest(network.tensors_of(network.model))}
        source |= {"name": file.path.name, "sha256": file.sha256} if file else {}
    if isinstance(converted, Conversion):
        tensors, record = network.tensors_of(converted.model), converted.record
    else:
        tensors, record = converted.state_dict(), record_of(converted)
    return write_checkpoint(
        path,
        tensors,
        make_metadata(
            record,
            network.architecture,
            source,
            preprocessing=preprocessing or _own_preprocessing(file),
            labels=_own_labels(file) if labels is None else labels,
        ),
        force=force,
        source=file.path if file else None,
        check=lambda written: check(reopen(written, network)),
    )


def save_trained(
    model: nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    training: Mapping[str, Any],
) -> Path:
    """Write a fine-tuned network with its provenance, over what is at ``path``.

    Args:
        model: in any form; one in path or Path-BN form carries its record.
        network: what it was trained from, with the architecture that it has now.
        path: of the file.
        preprocessing, labels: that it was trained with.
        training: settings and measurements, JSON-serialisable.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    file = network.checkpoint
    source = dict(network.metadata["source"]) if network.metadata else {}
    if file and not network.metadata:
        source = {"name": file.path.name, "sha256": file.sha256}
    record = None if form_of(model) == "plain" else record_of(model)
    metadata = make_metadata(record, network.architecture, source, preprocessing=preprocessing, labels=labels)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return write_checkpoint(path, tensors, metadata | {"training": dict(training)}, force=True)


def trained_file(folder: Path, name: str = "best") -> Path:
    """The network that a run of ``finetune`` left in its folder: ``best``, or the ``initial`` one.

    Raises:
        CheckpointError: there is none.
    """
    for path in (folder / f"{name}.path.safetensors", folder / f"{name}.safetensors"):
        if path.is_file():
            return path
    raise CheckpointError(
        f"{folder} is a folder without {name}.path.safetensors", "Give a file, or the folder of a finetune run."
    )


def save_plain(
    model: nn.Module, network: LoadedNetwork, path: Path, *, force: bool, check: Callable[[LoadedNetwork], None]
) -> Path:
    """Write a restored network without metadata; ``check`` as in :func:`save_converted`."""
    return write_checkpoint(
        path,
        network.tensors_of(model),
        None,
        force=force,
        source=network.checkpoint.path if network.checkpoint else None,
        check=lambda written: check(reopen(written, network)),
    )


def reopen(path: Path, network: LoadedNetwork) -> LoadedNetwork:
    """The network in a file that was just written, in ``network``'s architecture."""
    checkpoint = read_checkpoint(path)
    model = _build(network.architecture, checkpoint.tensors, checkpoint)
    return LoadedNetwork(model, network.architecture, checkpoint, network.tensor_names)
