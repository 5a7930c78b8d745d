"""Write networks to files with their provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pathconvert.conversion.modules import unwrapped
from pathconvert.conversion.record import form_of, record_of
from pathconvert.conversion.reparameterize import Conversion, make_record
from pathconvert.errors import ArchitectureError, PathconvertError
from pathconvert.files.checkpoint import read_checkpoint
from pathconvert.files.weights import tensors_digest
from pathconvert.files.writing import write_checkpoint
from pathconvert.networks import architectures
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork, build_form
from pathconvert.networks.metadata import make_metadata, own_labels, own_preprocessing
from pathconvert.networks.preprocessing import Preprocessing
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
        path, model.state_dict(), make_metadata(record, _own_architecture(stock), {}), force=force
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


def _own_architecture(model: nn.Module) -> Architecture | None:
    """The torchvision architecture that builds exactly this network; None if there is none."""
    try:
        architecture = architectures.recognise(model.state_dict())
    except ArchitectureError:
        return None
    if getattr(model, "transform_input", False):
        arguments = architecture.arguments | {"transform_input": True}
        architecture = dataclasses.replace(architecture, arguments=arguments)
    built = architectures.build(architecture)
    # settings that the weights do not reveal (dilation, stride, eps) show in the repr
    return architecture if type(built) is type(model) and repr(built) == repr(model) else None


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
    """Write a converted network with its provenance.

    Args:
        converted: a conversion of ``network``, or ``network`` in Path-BN form.
        network: the network that was converted.
        path: of the file.
        force: replace a file that exists.
        check: called with the network as it was written, before the file takes its name; if it
            raises, no file is left behind and the error propagates.
        preprocessing, labels: those that the network was fine-tuned with; None keeps those in
            ``network``'s file.

    Returns:
        The path that was written.

    Raises:
        OutputError: the file exists and ``force`` is False, or it cannot be written.
        PathconvertError: a tensor is not finite.
    """
    file = network.checkpoint
    if network.metadata:  # the file that was converted first remains the source
        source = network.metadata["source"]
    else:
        source = {"tensors_sha256": tensors_digest(network.tensors_of(network.model))}
        source |= {"name": file.path.name, "sha256": file.sha256} if file else {}
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
            network.architecture,
            source,
            preprocessing=preprocessing or own_preprocessing(file),
            labels=own_labels(file) if labels is None else labels,
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
    file = network.checkpoint
    source = dict(network.metadata["source"]) if network.metadata else {}
    if file and not network.metadata:
        source = {"name": file.path.name, "sha256": file.sha256}
    record = None if form_of(model) == "plain" else record_of(model)
    metadata = make_metadata(
        record, network.architecture, source, preprocessing=preprocessing, labels=labels
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
    """Load a file that was just written, as a network of ``network``'s architecture."""
    checkpoint = read_checkpoint(path)
    model = build_form(network.architecture, checkpoint.tensors, checkpoint)
    return LoadedNetwork(model, network.architecture, checkpoint, network.tensor_names)
