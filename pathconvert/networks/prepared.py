"""Networks with what their user says of their images and classes, and what is assumed of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pathconvert.conversion.equivalence import forward_outputs
from pathconvert.errors import DataError, first_line
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions
from pathconvert.networks.inputs import IMAGENET_MEAN, assumed, random_input, size_of
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.metadata import (
    known_preprocessing,
    said_labels,
    said_preprocessing,
    weights_sha256,
)
from pathconvert.networks.preprocessing import Preprocessing, assumption


@dataclass(frozen=True)
class PreparedNetwork(LoadedNetwork):
    """A network of which the user says how its images are prepared or what its classes are.

    Attributes:
        given: what the user says.
    """

    given: ImageOptions = NOTHING_GIVEN

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The network's preprocessing with what was given in its place, at the input's size.

        None if nothing is known of it, and nothing was given that changes it.
        """
        known = super().preprocessing
        if self.given.preparing is None:
            return known
        return self.given.over(known or assumed(self.architecture))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that were given, else those that are known."""
        return super().labels if self.given.labels is None else self.given.labels


def prepared(network: LoadedNetwork, given: ImageOptions) -> LoadedNetwork:
    """A network with the user's options in place of what is known of its images and classes.

    Raises:
        DataError: the options do not fit the network.
        PathconvertError: the network does not take images, or its input size is not known.
    """
    if given == NOTHING_GIVEN:
        return network
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    fields |= {"architecture": resized(network.architecture, given), "given": given}
    changed = PreparedNetwork(**fields)
    _require_use(changed)
    if given.labels is not None:
        given.require_labels_for(_outputs_of(changed), network.architecture.name)
    return changed


def resized(architecture: Architecture, given: ImageOptions) -> Architecture:
    """An architecture for images of the size that was given; as it is without one.

    Images have three channels where the architecture does not say.

    Raises:
        DataError: the network does not take images.
    """
    if given.size is None:
        return architecture
    _require_images(architecture, "--size")
    channels = architecture.input_size[0] if architecture.input_size else 3
    return dataclasses.replace(architecture, input_size=(channels, *given.size))


def _require_images(architecture: Architecture, option: str) -> None:
    """Refuse an option for images of a network that is known to take something else.

    Raises:
        DataError: the network's inputs are not images.
    """
    size = architecture.input_size
    if size is not None and (len(size) != 3 or size[0] not in (1, 3)):
        shown = "x".join(map(str, size))
        raise DataError(
            f"{option} is for images, but {architecture.name} takes inputs of size {shown}",
            f"Leave {option} out.",
        )


def _require_use(network: PreparedNetwork) -> None:
    """Refuse options that the network has no use for.

    Raises:
        DataError: it does not take images, or an option has no effect on it.
        PathconvertError: its input size is not known.
    """
    architecture, option = network.architecture, network.given.preparing
    if option is None:
        return
    if architecture.task == "detection":
        raise DataError(
            f"{option} has no effect on {architecture.name}: detectors prepare images themselves",
            f"Leave {option} out.",
        )
    _require_images(architecture, option)
    recipe = network.preprocessing
    if network.given.resize is not None and recipe is not None and recipe.crop is None:
        raise DataError(
            f"--resize has no effect on {architecture.name}: its images are not cropped, but"
            " brought to the input's size",
            "Give --size instead.",
        )


def _outputs_of(network: LoadedNetwork) -> int:
    """The number of channels of the network's first output.

    Raises:
        DataError: the network cannot run on inputs of its size, or has no such output.
    """
    example = random_input(network.architecture, batch=1)
    try:
        with torch.no_grad():
            outputs = forward_outputs(network.model, example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        size = "x".join(map(str, size_of(network.architecture)))
        raise DataError(
            f"{network.architecture.name} cannot run on inputs of size {size}: {first_line(error)}",
            "Give another --input-size.",
        ) from error
    if network.architecture.task == "detection" or not outputs or outputs[0].dim() < 2:
        raise DataError(
            f"--labels has no use for {network.architecture.name}: its outputs are not class"
            " scores",
            "Leave --labels out.",
        )
    return outputs[0].shape[1]


# ---- what is written, and what is said -----------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What a file records of its network's images; None where it records nothing."""

    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None


def recorded_for(network: LoadedNetwork) -> Recorded:
    """What a file that is made from a network records.

    It is what was given, else what the network's file records, else what the configuration beside
    it says. What the weights of torchvision expect is not recorded: the SHA-256 of the source tells
    it.
    """
    given = network.given if isinstance(network, PreparedNetwork) else NOTHING_GIVEN
    file, architecture = network.checkpoint, network.architecture
    return Recorded(
        network.preprocessing if given.preparing else said_preprocessing(file, architecture),
        said_labels(file, architecture) if given.labels is None else given.labels,
    )


def assumption_of(
    network: LoadedNetwork, applied: Callable[[Preprocessing], Preprocessing]
) -> str | None:
    """A sentence on which of torchvision's weights a network's images are prepared for.

    Args:
        network: any.
        applied: what becomes of a preprocessing, such as :meth:`ImageOptions.over`.

    Returns:
        None if that is not an assumption: the file or the configuration beside it says so, its
        weights are identified, all weights of the network expect the same, or the user said what
        differs.
    """
    checkpoint = network.checkpoint
    architecture = network.architecture
    if checkpoint is None or said_preprocessing(checkpoint, architecture) is not None:
        return None
    text = assumption(architecture, weights_sha256(checkpoint), applied)
    if text is None:
        return None
    return f"{'the source of ' if network.metadata else ''}{checkpoint.path} {text}"


def image_notes(network: LoadedNetwork) -> list[str]:
    """What is assumed of a network's images when they are loaded; empty if nothing is.

    Raises:
        PathconvertError: the network does not take images, or its input size is not known.
    """
    given = network.given if isinstance(network, PreparedNetwork) else NOTHING_GIVEN
    known = assumption_of(network, given.over)
    if known is not None:
        return [known]
    recorded = known_preprocessing(network.checkpoint, network.architecture)
    if given.normalises or recorded is not None or network.architecture.task == "detection":
        return []
    recipe = assumed(network.architecture)
    how = (
        "normalised with ImageNet's mean and std"
        if recipe.mean == IMAGENET_MEAN
        else "not normalised"
    )
    return [f"no preprocessing is recorded: images are scaled to [0, 1], {how}"]
