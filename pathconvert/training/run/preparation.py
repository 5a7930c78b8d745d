"""Preparing a network of any form for training.

This makes its head, its conversion and the statistics of Path-BN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.conversion.calls import watched
from pathconvert.conversion.modules import copied
from pathconvert.conversion.record import Record, form_of, record_of
from pathconvert.conversion.reparameterize import reparameterize
from pathconvert.errors import DataError, PathconvertError
from pathconvert.networks import architectures
from pathconvert.networks.calibration import ENOUGH, check_images, unnormalised
from pathconvert.networks.image_options import ImageOptions
from pathconvert.networks.inputs import random_input
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.preprocessing import Preprocessing
from pathconvert.path_bn.entering import to_path_bn
from pathconvert.path_bn.form import leave_path_bn
from pathconvert.path_bn.restoring import restore
from pathconvert.training.data.augmentation import Transform, preprocessing_of
from pathconvert.training.data.batches import epoch_batches
from pathconvert.training.data.labelled import Data
from pathconvert.training.settings import Settings

#: The form that is trained, by norm and optimizer.
TRAINED_FORM = {
    ("path-bn", "gsgd"): "path-bn",
    ("path-bn", "sgd"): "path-bn",
    ("path-bn", "path-sgd"): "path-bn",
    ("bn", "gsgd"): "path",
    ("bn", "sgd"): "plain",  # SGD and Path-SGD are the baselines, which train the network as it was
    ("bn", "path-sgd"): "plain",
}


#: The settings that say how images are prepared.
IMAGE_SETTINGS = ("mean", "std", "size", "resize", "interpolation")


@dataclass(frozen=True)
class Prepared:
    """A network ready to be trained.

    Attributes:
        model: the network to train, float32, in evaluation mode; it carries its record unless its
            form is ``plain``.
        network: the network that it comes from, with the architecture that has the head for the
            data.
        preprocessing: how images are turned into inputs.
        labels: names of the classes, one for every output.
        head: names of the classifier's parameters.
        notes: remarks for the user about what was chosen.
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
        network: a network in any form; not changed.
        data: its classes determine the head, and its training images the statistics of Path-BN.
        settings: the run's settings.

    Raises:
        DataError: the data has more classes than ``--num-classes``, or the network's head cannot be
            replaced.
        PathconvertError: the network is not a classifier of images, or options contradict one
            another.
    """
    architecture = network.architecture
    if architecture.task not in ("classification", "other"):
        raise PathconvertError(
            f"{architecture.name} is not a classifier of images (its task: {architecture.task})",
            "finetune trains classifiers; give a network whose outputs are class scores.",
        )
    if settings.norm == "bn" and settings.skip_scale is not None:
        raise PathconvertError(
            "--skip-scale has no effect with --norm bn", "Leave it out, or give --norm path-bn."
        )
    given = ImageOptions.parse(
        **{name: getattr(settings, name) for name in IMAGE_SETTINGS}, labels=settings.labels or None
    )
    chosen = preprocessing_of(network, data, given=given)
    crop = chosen.preprocessing.crop
    assert crop is not None
    record = network.record
    network = dataclasses.replace(
        network,
        model=copied(network.model).float(),
        architecture=dataclasses.replace(
            architecture, input_size=(len(chosen.preprocessing.mean), *crop)
        ),
    )
    misfit = _misfit(network.model, data, settings, chosen.preprocessing)
    labels = _labels(data, settings, given)
    network, head, note = _with_head_for(network, record, labels, settings)
    model = _in_form(
        network.model, network, record, data, settings, Transform(chosen.preprocessing)
    )
    notes = (chosen.note, misfit, note)
    return Prepared(
        model.eval(), network, chosen.preprocessing, labels, head, tuple(n for n in notes if n)
    )


def _with_head_for(
    network: LoadedNetwork, record: Record | None, labels: tuple[str, ...], settings: Settings
) -> tuple[LoadedNetwork, tuple[str, ...], str]:
    """Give a network a classifier for ``labels``, unless its own is for just these.

    Returns:
        The network, whose model is plain if its classifier is new; the names of the classifier's
        parameters; and a note that says whether it is new.
    """
    model = network.model
    classes = _class_count(model, network)
    other_labels = network.labels is not None and tuple(network.labels) != labels
    if classes == len(labels) and not settings.new_head and not other_labels:
        head = tuple(
            f"{_layers_that_run(model, network)[-1]}.{leaf}" for leaf in ("weight", "bias")
        )
        return network, head, f"the classifier is kept: it has {classes} classes, as the data has"
    plain = restore(model, record) if record else model
    architecture, model, head = _with_head(network, plain, classes, len(labels), settings.seed)
    network = dataclasses.replace(network, model=model, architecture=architecture)
    return network, head, f"a new classifier for {len(labels)} classes: {', '.join(head)}"


def _labels(data: Data, settings: Settings, given: ImageOptions) -> tuple[str, ...]:
    """A name for every output.

    These are the labels that were given; else the classes of the data, and "class N" for outputs
    beyond them.
    """
    count = settings.num_classes or len(data.classes)
    if count < len(data.classes):
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, more than --num-classes {count}",
            "Leave --num-classes out, or give a larger number.",
        )
    given.require_labels_for(count, "the network to train")
    if given.labels is not None:
        return given.labels
    return (*data.classes, *(f"class {i}" for i in range(len(data.classes), count)))


def _in_form(
    model: nn.Module,
    network: LoadedNetwork,
    record: Record | None,
    data: Data,
    settings: Settings,
    transform: Transform,
) -> nn.Module:
    """Bring ``model`` into the form that is trained.

    Args:
        model: plain if its head is new, else in the form of its file.
        network: tells the size of the inputs.
        record: of the conversion that the file holds; None for a plain file. Its choices are kept.
        data: its training images are those that new Path-BN layers are calibrated with.
        settings: of the run.
        transform: the transform of the calibration images.

    Raises:
        PathconvertError: ``--pivot`` or ``--scope`` is given, and the file was converted with
            another.
    """
    asked = {
        name: getattr(settings, name)
        for name in ("pivot", "scope")
        if getattr(settings, name) is not None
    }
    _require_same_choices(record, asked)
    form, wanted = form_of(model), TRAINED_FORM[settings.norm, settings.optimizer]
    stored = record.path_bn.skip_scale if record and record.path_bn else None
    skip_scale = settings.skip_scale or stored or 1.0
    if form == wanted and (form != "path-bn" or skip_scale == stored):
        return model
    if wanted == "plain":
        return restore(model, record_of(model))
    if form == "path-bn":
        model = leave_path_bn(model)
        if wanted == "path":
            return model
    plain = model if form == "plain" else restore(model, record_of(model))
    example = random_input(network.architecture)
    options: dict[str, Any] = (record.choices if record else {}) | asked
    conversion = reparameterize(plain, example, **options)
    if wanted == "path":
        return conversion.model
    # begin="evaluation" keeps what the network computes in evaluation mode: its error on new data
    # is 1 % lower (benchmarks/README.md)
    return to_path_bn(
        conversion, example, _calibration(data, settings, transform), skip_scale, begin="evaluation"
    )


def _require_same_choices(record: Record | None, asked: Mapping[str, str]) -> None:
    """Refuse choices of a conversion that differ from those in its record.

    Raises:
        PathconvertError: there is a record, and it holds another choice.
    """
    stored = {name: record.choices[name] for name in asked} if record else asked
    if stored != asked:
        raise PathconvertError(
            "the source is converted already, with"
            f" {', '.join(f'{k} {v}' for k, v in stored.items())}",
            "Leave --pivot and --scope out, or start from the plain checkpoint.",
        )


def _calibration(data: Data, settings: Settings, transform: Transform) -> Iterator[Tensor]:
    """The first ``calibration_images`` of the shuffled training images, in batches.

    They are not augmented.
    """
    left = settings.calibration_images
    for images, _ in epoch_batches(
        data.train,
        transform,
        batch_size=32,
        epoch=0,
        seed=settings.seed,
        shuffle=True,
        drop_last=False,
    ):
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return


def _misfit(model: nn.Module, data: Data, settings: Settings, recipe: Preprocessing) -> str | None:
    """What looks wrong about the training images as ``recipe`` prepares them; None if nothing."""
    enough = settings.model_copy(update={"calibration_images": ENOUGH})
    pixels = torch.cat([*_calibration(data, enough, Transform(unnormalised(recipe)))])
    return check_images(model, pixels, recipe)


def _class_count(model: nn.Module, network: LoadedNetwork) -> int:
    """The number of class scores that ``model`` returns per image.

    Raises:
        PathconvertError: it returns something else.
    """
    with torch.no_grad():
        output = model.eval()(random_input(network.architecture, batch=1))
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise PathconvertError(
            f"the outputs of {network.architecture.name} are not class scores",
            "finetune trains only classifiers.",
        )
    return output.shape[1]


def _with_head(
    network: LoadedNetwork, plain: nn.Module, before: int, classes: int, seed: int
) -> tuple[architectures.Architecture, nn.Module, tuple[str, ...]]:
    """Build a plain network again with another number of outputs.

    Args:
        network: tells the architecture.
        plain: the network, whose weights are kept but for the classifiers', which are initialised
            anew.
        before, classes: its number of outputs, and the number that it gets.
        seed: of the initialisation.

    Returns:
        The new architecture, the new network, and the names of the parameters of its classifiers.

    Raises:
        DataError: no classifier is found, or another tensor would change too.
    """
    old = network.architecture
    architecture = dataclasses.replace(old, arguments=old.arguments | {"num_classes": classes})
    fresh, tensors = architectures.build(architecture), plain.state_dict()
    layers = _classifiers(fresh, plain, network, before, classes)
    kept = {
        name: tensor if name.rpartition(".")[0] in layers else tensors.get(name, tensor)
        for name, tensor in fresh.state_dict().items()
    }
    odd = [
        name
        for name, tensor in fresh.state_dict().items()
        if kept[name].shape != tensor.shape or name not in tensors
    ]
    if odd or not layers:
        what = (
            f"{odd[0]} would change too"
            if odd
            else "no layer has as many outputs as there are classes"
        )
        raise DataError(
            f"the classifier of {old.name} cannot be replaced by one of {classes} classes: {what}",
            "Its builder must take num_classes, and use it for the classifier alone.",
        )
    model = architectures.load_tensors(architecture, kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(layers):
            model.get_submodule(name).reset_parameters()  # type: ignore[operator]
    names = (name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers)
    return architecture, model.float(), tuple(names)


def _classifiers(
    fresh: nn.Module, plain: nn.Module, network: LoadedNetwork, before: int, after: int
) -> set[str]:
    """Names of the classifiers: layers with one row per class.

    Only the last layer that runs and auxiliary layers count.

    Args:
        fresh: the network with ``after`` classes.
        plain: the network with ``before`` classes.
        network: tells the size of the inputs.
        before, after: numbers of classes.
    """
    order = _layers_that_run(plain, network)
    layers = {
        name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    auxiliary = layers - set(order)  # auxiliary classifiers run only in training mode
    rows = {
        name: tuple(len(model.get_parameter(f"{name}.weight")) for model in (plain, fresh))
        for name in layers
    }
    return {name for name in {order[-1], *auxiliary} if rows[name] == (before, after)}


def _layers_that_run(model: nn.Module, network: LoadedNetwork) -> list[str]:
    """Names of linear layers and convolutions, in the order in which they run.

    They run in evaluation mode.
    """
    order: list[str] = []
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    with torch.no_grad(), watched(layers, before=lambda name, _: order.append(name)):
        model.eval()(random_input(network.architecture, batch=1))
    return order
