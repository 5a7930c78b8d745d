"""How a fine-tuning run begins, and how it is resumed."""

from __future__ import annotations

import atexit
from pathlib import Path

import torch.distributed
from lightning_fabric import Fabric

from pathconvert.choices import TrainingDevice
from pathconvert.conversion.record import record_of
from pathconvert.networks.loading import LoadedNetwork, open_network, trained_file
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.training.data.labelled import Data, open_data
from pathconvert.training.run.devices import make_fabric
from pathconvert.training.run.folder import CONFIG, RunFolder
from pathconvert.training.run.loop import Run
from pathconvert.training.run.preparation import Prepared, prepare
from pathconvert.training.settings import Settings


def load_data(network: LoadedNetwork, settings: Settings) -> Data:
    """The labelled images that ``settings`` name, with as many channels as ``network`` takes.

    Raises:
        DataError: the data set is missing, empty or inconsistent.
        CheckpointError: its first image cannot be read.
    """
    size = network.architecture.input_size
    return open_data(
        settings.data,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
        limit_train=settings.limit_train,
        limit_val=settings.limit_val,
        channels=1 if size and size[0] == 1 else 3,
    )


def begin(
    network: LoadedNetwork,
    settings: Settings,
    path: Path,
    *,
    device: TrainingDevice = "auto",
    force: bool = False,
    dry_run: bool = False,
) -> Run:
    """A new run, ready to train.

    Args:
        network: a network in any form; not changed.
        settings: the run's settings.
        path: the run's folder, which is made only once everything else is ready.
        device: ``auto``, ``cuda`` or ``cpu``.
        force: write into the folder even if it holds something.
        dry_run: write nothing; the run is there only to be looked at.

    Raises:
        TrainingError: the device, the precision or the number of processes cannot be used.
        DataError: the data set is missing, empty or inconsistent, or does not fit the network.
        OutputError: the folder cannot be made, or holds something.
        PathconvertError: the network is not a classifier of images, or options contradict one
            another.
    """
    fabric = _launched(settings, device, None if dry_run else path)
    data = load_data(network, settings)
    prepared = prepare(network, data, settings)
    if dry_run:
        return Run(prepared, data, settings, RunFolder(path), fabric)
    folder = RunFolder.create(path, force=force) if fabric.is_global_zero else RunFolder(path)
    run = Run(prepared, data, settings, folder, fabric)
    run.write_initial()
    if fabric.is_global_zero:
        folder.write_text(CONFIG, _resolved(run))
    fabric.barrier()
    return run


def _resolved(run: Run) -> str:
    """The text of ``config.yaml``.

    These are the settings, below comments with what followed from the network and the data.
    """
    prepared, recipe = run.prepared, run.prepared.preprocessing
    architecture, source = prepared.network.architecture, prepared.network.checkpoint
    record = None if prepared.form == "plain" else record_of(prepared.model)
    conversion = [f"{name} {choice}" for name, choice in record.choices.items()] if record else []
    if record and record.path_bn:
        conversion.append(f"skip scale {record.path_bn.skip_scale:g}")
    remarks = {
        "source": source.path if source else "torchvision's weights",
        "architecture": architecture.name,
        "form": ", ".join([prepared.form, *conversion]),
        "inputs": "x".join(map(str, architecture.input_size or ())),
        "mean and std": f"{list(recipe.mean)}, {list(recipe.std)}",
        "classes": len(prepared.labels),
        "device": f"{run.fabric.device.type}, {run.fabric.world_size} processes",
        "steps": run.total_steps,
    }
    return "".join(f"# {name}: {text}\n" for name, text in remarks.items()) + run.settings.to_yaml()


def resume(path: Path, *, device: TrainingDevice = "auto", data: str | None = None) -> Run:
    """Resume the run in a folder from its last checkpoint.

    Args:
        path: the run's folder.
        device: ``auto``, ``cuda`` or ``cpu``.
        data: where the run's images are now, if they were moved.

    Raises:
        CheckpointError: no run has begun in the folder, or its files are damaged.
        DataError: the data set is missing, or has changed.
        TrainingError: the device cannot be used.
    """
    folder = RunFolder.open(path)
    settings = Settings.from_file(path / CONFIG, {} if data is None else {"data": data})
    fabric = _launched(settings, device, path)
    network = open_network(trained_file(path, "initial"))
    found = load_data(network, settings)
    assert network.checkpoint is not None
    preprocessing = network.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    head = tuple((network.training or {}).get("head", ()))
    prepared = Prepared(
        network.model, network, preprocessing, network.labels or found.classes, head, ()
    )
    run = Run(prepared, found, settings, folder, fabric)
    state = folder.load()
    if state is not None:
        run.resume(state)
    if data is not None and fabric.is_global_zero:
        folder.write_text(CONFIG, _resolved(run))
    return run


def _launched(settings: Settings, device: TrainingDevice, path: Path | None) -> Fabric:
    """Launch Fabric, with TensorBoard logs in the folder ``path``; None writes no logs."""
    fabric = make_fabric(settings, device, None if path is None else RunFolder(path))
    fabric.launch()
    if fabric.world_size > 1:
        # Fabric leaves only NCCL groups. A gloo group that is still alive when the interpreter ends
        # aborts the process now and then ("terminate called without an active exception"), and
        # torchrun reports a failure
        atexit.register(_leave_process_group)
    return fabric


def _leave_process_group() -> None:
    """Leave the process group, unless an error has done so already."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
