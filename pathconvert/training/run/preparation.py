"""From a file of any form to the network that is trained: its head, its conversion, Path-BN's statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.record import form_of, record_of
from pathconvert.conversion.reparameterize import reparameterize
from pathconvert.errors import DataError, PathconvertError
from pathconvert.networks import architectures
from pathconvert.networks.inputs import random_input
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing, parse_sides, parse_values
from pathconvert.path_bn.entering import to_path_bn
from pathconvert.path_bn.form import leave_path_bn
from pathconvert.path_bn.restoring import restore
from pathconvert.training.data.augmentation import Transform, preprocessing_of
from pathconvert.training.data.batches import batches
from pathconvert.training.data.labelled import Data
from pathconvert.training.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """A network ready to be trained.

    Attributes:
        model: float32, in evaluation mode; carries its record unless its form is ``plain``.
        network: where it comes from; its architecture has the head of the data.
        preprocessing: of the images.
        labels: names of the classes, one for every output.
        head: names of the classifier's parameters.
        notes: what was chosen on the way.
    """

    model: nn.Module
    network: LoadedNetwork
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    head: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def form(self) -> str:
        """``plain``, ``path`` or ``path-bn``."""
        return form_of(self.model)


def prepare(network: LoadedNetwork, data: Data, settings: Settings) -> Prepared:
    """Give ``network`` the head, the form and the statistics that ``settings`` ask for.

    Args:
        network: in any form; not changed.
        data: its classes decide the head, its training images Path-BN's statistics.
        settings: of the run.

    Raises:
        PathconvertError: no classifier of images, a head that cannot be replaced, or options against each other.
    """
    architecture = network.architecture
    if architecture.task not in ("classification", "other"):
        raise PathconvertError(f"{architecture.name} is no classifier of images ({architecture.task})")
    if settings.norm == "bn" and settings.skip_scale is not None:
        raise PathconvertError("--skip-scale belongs to Path-BN", "Leave it out, or give --norm path-bn.")
    chosen = preprocessing_of(
        network,
        data,
        size=parse_sides(settings.size),
        mean=parse_values(settings.mean, "--mean"),
        std=parse_values(settings.std, "--std"),
    )
    notes = [chosen.note] if chosen.note else []
    crop = chosen.preprocessing.crop
    assert crop is not None
    record = network.record
    channels = len(chosen.preprocessing.mean)
    network = dataclasses.replace(
        network,
        model=copy.deepcopy(network.model).float(),
        architecture=dataclasses.replace(architecture, input_size=(channels, *crop)),
    )
    head: tuple[str, ...] = ()
    model = network.model
    labels = _labels(data, settings)
    classes = _class_count(model, network)
    other_labels = network.labels is not None and tuple(network.labels) != labels
    if classes != len(labels) or settings.new_head or other_labels:
        plain = restore(model, record) if record else model
        architecture, model, head = _with_head(network, plain, classes, len(labels), settings.seed)
        notes.append(f"a new classifier for {len(labels)} classes: {', '.join(head)}")
        network = dataclasses.replace(network, model=model, architecture=architecture)
    else:
        head = tuple(f"{_layers_that_run(model, network)[-1]}.{leaf}" for leaf in ("weight", "bias"))
        notes.append(f"the classifier is kept: it has {classes} classes, as the data has")
    model = _in_form(model, network, record, data, settings, Transform(chosen.preprocessing))
    return Prepared(model.eval(), network, chosen.preprocessing, labels, head, tuple(notes))


def _labels(data: Data, settings: Settings) -> tuple[str, ...]:
    """A name for every output: those of the data, and numbers for outputs that it has no class for."""
    count = settings.num_classes or len(data.classes)
    if count < len(data.classes):
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, more than --num-classes {count}", "Leave it out."
        )
    return (*data.classes, *(f"class {i}" for i in range(len(data.classes), count)))


def _in_form(
    model: nn.Module,
    network: LoadedNetwork,
    record: Mapping[str, Any] | None,
    data: Data,
    settings: Settings,
    transform: Transform,
) -> nn.Module:
    """``model`` (plain if its head is new, else as the file has it) in the form that is trained."""
    converted = form_of(model) != "plain"
    asked = {name: getattr(settings, name) for name in ("pivot", "scope") if getattr(settings, name) is not None}
    if asked and record:
        stored = {name: record[name] for name in asked}
        if stored != asked:
            raise PathconvertError(
                f"the source is converted already, with {', '.join(f'{k} {v}' for k, v in stored.items())}",
                "Leave --pivot and --scope out, or start from the plain checkpoint.",
            )
    if settings.norm == "bn" and settings.optimizer != "gsgd":  # the baselines train the network as it was
        return restore(model, record_of(model)) if converted else model
    stored_path_bn = (record or {}).get("path_bn", {})
    skip_scale = settings.skip_scale or stored_path_bn.get("skip_scale", 1.0)
    if form_of(model) == "path-bn":
        if settings.norm == "path-bn" and skip_scale == stored_path_bn["skip_scale"]:
            return model
        model = leave_path_bn(model)
    if converted and settings.norm == "bn":
        return model
    example = random_input(network.architecture)
    options: dict[str, Any] = {name: (record or {}).get(name) for name in ("scope", "pivot", "gauge")}
    plain = restore(model, record_of(model)) if converted else model
    conversion = reparameterize(plain, example, **{k: v for k, v in (options | asked).items() if v is not None})
    if settings.norm == "bn":
        return conversion.model
    # from what the network computes in evaluation mode: on new data 1 % of error better (benchmarks/README.md)
    return to_path_bn(conversion, example, _calibration(data, settings, transform), skip_scale, begin="evaluation")


def _calibration(data: Data, settings: Settings, transform: Transform) -> Iterator[Tensor]:
    """Training images, as evaluation sees them."""
    left = settings.calibration_images
    for images, _ in batches(
        data.train, transform, batch_size=32, epoch=0, seed=settings.seed, shuffle=True, drop_last=False
    ):
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return


def _class_count(model: nn.Module, network: LoadedNetwork) -> int:
    with torch.no_grad():
        output = model.eval()(random_input(network.architecture, batch=1))
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise PathconvertError(f"{network.architecture.name} gives no class scores", "finetune trains classifiers.")
    return output.shape[1]


def _with_head(
    network: LoadedNetwork, plain: nn.Module, before: int, classes: int, seed: int
) -> tuple[architectures.Architecture, nn.Module, tuple[str, ...]]:
    """The plain network with another number of outputs; layers of class scores are initialised anew."""
    old = network.architecture
    architecture = dataclasses.replace(old, arguments=old.arguments | {"num_classes": classes})
    fresh, tensors = architectures.build(architecture), plain.state_dict()
    layers = _classifiers(fresh, plain, network, before, classes)
    kept = {
        name: tensor if name.rpartition(".")[0] in layers else tensors.get(name, tensor)
        for name, tensor in fresh.state_dict().items()
    }
    odd = [
        name for name, tensor in fresh.state_dict().items() if kept[name].shape != tensor.shape or name not in tensors
    ]
    if odd or not layers:
        what = f"{odd[0]} changes too" if odd else "none is found"
        raise DataError(
            f"the classifier of {old.name} cannot be replaced by one of {classes} classes: {what}",
            "Its builder has to take num_classes.",
        )
    model = architectures.load_tensors(architecture, kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(layers):
            model.get_submodule(name).reset_parameters()  # type: ignore[operator]
    names = (name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers)
    return architecture, model.float(), tuple(names)


def _classifiers(fresh: nn.Module, plain: nn.Module, network: LoadedNetwork, before: int, after: int) -> set[str]:
    """The last layer that runs, and auxiliary ones: those whose rows are as many as the classes in both networks."""
    order = _layers_that_run(plain, network)
    layers = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    auxiliary = layers - set(order)  # they run in training mode alone
    rows = {name: tuple(len(model.get_parameter(f"{name}.weight")) for model in (plain, fresh)) for name in layers}
    return {name for name in {order[-1], *auxiliary} if rows[name] == (before, after)}


def _layers_that_run(model: nn.Module, network: LoadedNetwork) -> list[str]:
    """Linear layers and convolutions in the order in which evaluation calls them."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model.eval()(random_input(network.architecture, batch=1))
    finally:
        for handle in handles:
            handle.remove()
    return order
