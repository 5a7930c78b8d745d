"""Write networks to files with their provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pathconvert.conversion.modules import unwrapped
from pathconvert.conversion.record import form_of, record_of
from pathconvert.conversion.reparameterize import Conversion, make_record
from pathconvert.errors import PathconvertError
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.layout import Layout
from pathconvert.files.weights import tensors_digest
from pathconvert.files.writing import BARE, write_checkpoint
from pathconvert.networks.architectures import PICKLED_MODULE, Architecture
from pathconvert.networks.loading import LoadedNetwork, build_form
from pathconvert.networks.metadata import make_metadata
from pathconvert.networks.names_identity import own_architecture
from pathconvert.networks.prepared import recorded_for
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.networks.way_out import layout_of
from pathconvert.path_bn.form import has_path_bn, leave_path_bn


def save(converted: Conversion | nn.Module, path: str | Path, *, force: bool = False) -> Path:
    """Save a conversion, or a network in Path-BN form, that was made through the Python API.

    The file stores the architecture if the network is one of torchvision's with all its settings;
    any other network is loaded again with ``load(path, arch="package.module:builder")``.

    Returns:
        The path that was written.

    Raises:
        OutputError: the file exists and ``force`` is False, or it cannot be written.
        PathconvertError: a tensor is not finite.
    """
    if isinstance(converted, Conversion):
        model, record = converted.model, make_record(converted)
    else:
        model = unwrapped(converted)
        record = record_of(model)
    _require_finite(model)
    stock = leave_path_bn(model) if has_path_bn(model) else model
    return write_checkpoint(
        path, model.state_dict(), make_metadata(record, own_architecture(stock), {}), force=force
    )


def _require_finite(model: nn.Module) -> None:
    """Check that no tensor is NaN, and no parameter infinite.

    A buffer may be infinite, as masks of attention are.

    Raises:
        PathconvertError: one is; the message names it.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in (parameters | dict(model.named_buffers())).items():
        if not tensor.is_floating_point():
            continue
        if bool(tensor.isnan().any()) or (name in parameters and bool(tensor.isinf().any())):
            raise PathconvertError(
                f"{name} contains numbers that are not finite, so the network is not saved",
                "Check the weights of the network that was converted for NaN and infinity.",
            )


def save_converted(
    converted: Conversion | nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    force: bool,
    check: Callable[[LoadedNetwork], None],
    layout: Layout = BARE,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a converted network with its provenance.

    Args:
        converted: a conversion of ``network``, or ``network`` in Path-BN form.
        network: the network that was converted.
        path: of the file.
        force: replace a file that exists.
        check: called with the network as it was written, before the file takes its name; if it
            raises, no file is left behind and the error propagates.
        layout: the names and keys that the tensors get in the file; by default torchvision's names
            and no key.
        preprocessing, labels: those that the network was fine-tuned with; None keeps what the user
            gave, or what ``network``'s file records.

    Returns:
        The path that was written.

    Raises:
        OutputError: the file exists and ``force`` is False, or it cannot be written.
        PathconvertError: a tensor is not finite.
    """
    file, own = network.checkpoint, recorded_for(network)
    source = _source_of(network)
    _require_finite(converted.model if isinstance(converted, Conversion) else converted)
    if isinstance(converted, Conversion):
        tensors, record = network.tensors_of(converted.model), make_record(converted)
    else:
        tensors, record = converted.state_dict(), record_of(converted)
    return write_checkpoint(
        path,
        tensors,
        make_metadata(
            record,
            _nameable(network.architecture),
            source,
            preprocessing=preprocessing or own.preprocessing,
            labels=own.labels if labels is None else labels,
        ),
        layout=layout,
        force=force,
        source=file.path if file else None,
        check=lambda written: check(reopen(written, network, layout)),
    )


def _source_of(network: LoadedNetwork) -> dict[str, Any]:
    """Where a network comes from, for metadata; the file that was converted first remains it."""
    if network.metadata:
        return dict(network.metadata["source"])
    source: dict[str, Any] = {"tensors_sha256": tensors_digest(network.tensors_of(network.model))}
    file, layout = network.checkpoint, layout_of(network)
    source |= {"name": file.path.name, "sha256": file.sha256} if file else {}
    return source | ({"layout": layout.to_json()} if layout else {})


def _nameable(architecture: Architecture) -> Architecture | None:
    """The architecture, if the network can be built again by its name."""
    return None if architecture.name == PICKLED_MODULE else architecture


def save_trained(
    model: nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    training: Mapping[str, Any],
) -> Path:
    """Write a fine-tuned network with its provenance; a file that exists is replaced.

    Args:
        model: the network in any form; in path or Path-BN form it carries its record.
        network: the network that it was trained from, with the architecture that ``model`` has now.
        path: of the file.
        preprocessing, labels: those that it was trained with.
        training: settings and measurements, JSON-serialisable.

    Returns:
        The path that was written.

    Raises:
        OutputError: the file cannot be written; a file that existed stays as it was.
    """
    source = _source_of(network)
    record = None if form_of(model) == "plain" else record_of(model)
    metadata = make_metadata(
        record, _nameable(network.architecture), source, preprocessing=preprocessing, labels=labels
    )
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    return write_checkpoint(path, tensors, metadata | {"training": dict(training)}, force=True)


def save_plain(
    model: nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    force: bool,
    check: Callable[[LoadedNetwork], None],
) -> Path:
    """Write a restored network without metadata, in the layout that the original file had.

    Args:
        model: the restored network.
        network: the converted network that it was made from.
        path, force, check: as in :func:`save_converted`.

    Returns:
        The path that was written.

    Raises:
        OutputError: the file exists and ``force`` is False, or it cannot be written.
    """
    layout = layout_of(network) or BARE
    return write_checkpoint(
        path,
        network.tensors_of(model),
        None,
        layout=layout,
        force=force,
        source=network.checkpoint.path if network.checkpoint else None,
        check=lambda written: check(reopen(written, network, layout)),
    )


def reopen(path: Path, network: LoadedNetwork, layout: Layout = BARE) -> LoadedNetwork:
    """Load a file that was just written, as a network of the same architecture.

    Args:
        path: the file.
        network: the network that the file was made from.
        layout: the layout in which it was written.

    Raises:
        CheckpointError, ArchitectureError: the file does not have the network's tensors.
    """
    checkpoint = read_checkpoint(path)
    names = (checkpoint.prefix + name for name in checkpoint.tensors)
    tensors = layout.read_back(dict(zip(names, checkpoint.tensors.values(), strict=True)))
    model = build_form(network.architecture, tensors, checkpoint, template=network.model)
    return LoadedNetwork(model, network.architecture, checkpoint, network.tensor_names)
