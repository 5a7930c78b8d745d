"""Convert, restore and compare networks that were loaded from files.

What is written is checked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pathconvert.choices import Gauge, PivotRule, Scope
from pathconvert.conversion.diagnosis import first_not_finite
from pathconvert.conversion.equivalence import (
    PASSING_NOISE_RATIO,
    EquivalenceReport,
    forward_outputs,
    verify,
    verify_conversion,
)
from pathconvert.conversion.pivots import MIN_PIVOT
from pathconvert.conversion.record import Record
from pathconvert.conversion.reparameterize import Conversion, reparameterize, resume
from pathconvert.conversion.whole import require_same_whole
from pathconvert.errors import EquivalenceError, PathconvertError
from pathconvert.files.weights import tensors_digest
from pathconvert.files.writing import BARE
from pathconvert.networks.adjusting import network_text
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.images import folder_images
from pathconvert.networks.inputs import load_images, random_input
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.saving import save_converted, save_plain
from pathconvert.networks.way_out import layout_of
from pathconvert.path_bn.entering import to_path_bn
from pathconvert.path_bn.restoring import restore
from pathconvert.path_bn.skip_scale import with_skip_scale
from pathconvert.path_bn.statistics import CHUNK

#: Seeds of the inputs on which a network that was converted part by part is compared as a whole.
WHOLE_SEEDS = (0, 1)


def convert_network(
    network: LoadedNetwork,
    scope: Scope,
    pivot: PivotRule,
    gauge: Gauge,
    *,
    min_pivot: float = MIN_PIVOT,
    partial: bool,
) -> Conversion:
    """Reparameterize a network with a random input of its size.

    See :func:`~pathconvert.conversion.reparameterize.reparameterize`.
    """
    return reparameterize(
        network.model,
        random_input(network.architecture),
        scope,
        pivot,
        gauge,
        min_pivot=min_pivot,
        partial=partial,
    )


def enter_path_bn(
    network: LoadedNetwork, conversion: Conversion, images: Path | None, skip_scale: float
) -> tuple[Conversion, nn.Module]:
    """Enter Path-BN form with :func:`to_path_bn`, calibrated on a folder of images if one is given.

    Returns:
        The conversion with pivots of ±``skip_scale``, and the network in Path-BN form.

    Raises:
        CheckpointError: ``images`` is not a folder with images, or one of them cannot be read.
    """
    calibration = None if images is None else _chunks(folder_images(images), network)
    conversion = with_skip_scale(conversion, skip_scale)
    return conversion, to_path_bn(
        conversion, random_input(network.architecture), calibration, skip_scale
    )


def _chunks(paths: list[Path], network: LoadedNetwork) -> Iterator[torch.Tensor]:
    """Images as inputs of the network, ``CHUNK`` at a time."""
    for start in range(0, len(paths), CHUNK):
        yield load_images(paths[start : start + CHUNK], network.architecture, network.preprocessing)


def resume_conversion(network: LoadedNetwork) -> Conversion:
    """The conversion that a file in path form contains."""
    assert network.record is not None
    return resume(network.model, random_input(network.architecture), network.record)


def _equality(
    original: nn.Module, other: nn.Module, parts: tuple[str, ...], architecture: Architecture
) -> EquivalenceReport:
    """Compare two networks on two random inputs and, if that fails, on 16.

    Two inputs give a network with few classes too few outputs to measure its noise: about 1 in 30
    correct conversions fails on them by chance. Networks that really differ fail on 16 inputs too.
    """
    equality = verify_conversion(original, other, parts, random_input(architecture))
    if equality.passed:
        return equality
    return verify_conversion(original, other, parts, random_input(architecture, batch=16, seed=1))


def _require_finite(model: nn.Module, architecture: Architecture) -> None:
    """Check that a network's own results are finite, as nothing can be compared otherwise.

    Raises:
        EquivalenceError: they are not; it names the first layer.
    """
    inputs = random_input(architecture)
    layer = first_not_finite(model, lambda: forward_outputs(model, inputs))
    if layer is not None:
        name = layer or "the network"
        raise EquivalenceError(
            f"the results of {name} in the original are not finite, so nothing can be compared; no"
            " file was written",
            "Check its weights and statistics for NaN, infinity and numbers that overflow.",
        )


def _require_equality(
    original: nn.Module, converted: nn.Module, record: Record, network: LoadedNetwork, what: str
) -> EquivalenceReport:
    """Compare two networks, part by part and as a whole.

    Args:
        original, converted: the networks before and after the conversion.
        record: of the conversion.
        network: says how to make inputs.
        what: the network that would be written, for the message.

    Returns:
        The comparison. If a network that was converted part by part only agrees as a whole in exact
        arithmetic (``whole.py``), it is that of the parts.

    Raises:
        EquivalenceError: they differ; ``what`` is not written.
    """
    equality = _equality(original, converted, record.parts, network.architecture)
    if not equality.passed:
        _require_finite(original, network.architecture)
        raise EquivalenceError(
            f"{what} differs from the original: its error is {equality.noise_ratio:.3g} times the"
            f" noise of the dtype (limit: {PASSING_NOISE_RATIO:g}), largest difference"
            f" {equality.max_abs:.3g}; no file was written",
            "Try --gauge pow2, and report it: a conversion should never change the function.",
        )
    if record.parts == ("",):  # the whole was the only part
        return equality
    inputs = [random_input(network.architecture, seed=seed) for seed in WHOLE_SEEDS]
    try:
        whole = require_same_whole(original, converted, record, inputs)
    except EquivalenceError as error:
        message = f"{what} differs from the original: {error}; no file was written"
        raise EquivalenceError(message, error.tip) from error
    return equality if whole is None else EquivalenceReport.worst([equality, whole])


def save_checked(
    converted: Conversion | nn.Module,
    network: LoadedNetwork,
    path: Path,
    *,
    force: bool,
    keep_wrapper: bool = False,
) -> EquivalenceReport:
    """Write a network, after checking that what was written equals the original.

    Args:
        converted: a conversion, or a network in Path-BN form.
        network: the network that was converted.
        path: of the file.
        force: replace a file that exists.
        keep_wrapper: write the tensors under the key, prefix and names of ``network``'s file.

    Raises:
        EquivalenceError: it differs from the original; no file is left behind.
        OutputError: the file exists and ``force`` is False, or it cannot be written.
    """
    reports: list[EquivalenceReport] = []

    def check(written: LoadedNetwork) -> None:
        assert written.record is not None
        reports.append(
            _require_equality(
                network.model, written.model, written.record, network, "the converted network"
            )
        )

    layout = (layout_of(network) if keep_wrapper else None) or BARE
    save_converted(converted, network, path, force=force, check=check, layout=layout)
    return reports[0]


def restore_checked(
    network: LoadedNetwork, path: Path, *, force: bool
) -> tuple[EquivalenceReport, bool]:
    """Undo a conversion and write the result, checked as in :func:`save_checked`.

    Returns:
        The comparison of the converted with the restored network, and whether the restored tensors
        equal the original ones bit by bit (they never do after fine-tuning).

    Raises:
        EquivalenceError: the restored network differs from the converted one; no file is left
            behind.
        OutputError: the file exists and ``force`` is False, or it cannot be written.
    """
    record = network.record
    assert record is not None
    assert network.metadata is not None
    restored = restore(network.model, record)
    reports: list[EquivalenceReport] = []

    def check(written: LoadedNetwork) -> None:
        # The restored network is the original again, so its noise is the measure, as it was for the
        # conversion.
        reports.append(
            _require_equality(written.model, network.model, record, network, "the restored network")
        )

    save_plain(restored, network, path, force=force, check=check)
    digest = network.metadata["source"].get("tensors_sha256")
    return reports[0], digest == tensors_digest(network.tensors_of(restored))


@dataclass(frozen=True)
class Comparison:
    """The comparison of two networks on random inputs and on images.

    Attributes:
        equality: over all inputs.
        images: the number of images; 0 if none were given.
        same_top1: the number of images for which both networks have the same largest output.
    """

    equality: EquivalenceReport
    images: int
    same_top1: int

    @property
    def passed(self) -> bool:
        """Whether the outputs are equal up to rounding, on all inputs."""
        return self.equality.passed

    def to_json(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "equality": self.equality.to_json(),
            "images": self.images,
            "same_top1": self.same_top1,
        }


def compare(a: LoadedNetwork, b: LoadedNetwork, images: Path | None) -> Comparison:
    """Compare two loaded networks of one architecture.

    Raises:
        PathconvertError: they have different architectures.
        CheckpointError: ``images`` is not a folder with images, or one of them cannot be read.
    """
    if (a.architecture.name, a.architecture.arguments) != (
        b.architecture.name,
        b.architecture.arguments,
    ):
        names = (network_text(x.architecture.name, x.architecture.arguments) for x in (a, b))
        raise PathconvertError(
            f"the networks have different architectures: {' and '.join(names)}",
            "verify compares two forms of one network.",
        )
    if a.record and not b.record:
        a, b = b, a  # the noise of the original is the measure
    record = a.record or b.record
    parts = record.parts if record else ("",)
    reports = [_equality(a.model, b.model, parts, a.architecture)]
    same = count = 0
    if images is not None:
        batch = load_images(
            folder_images(images), a.architecture, (b if b.was_trained_here else a).preprocessing
        )
        for chunk in batch.split(8):
            reports.append(verify(a.model, b.model, chunk))
            first, second = (_top1(network, chunk) for network in (a, b))
            same += int((first == second).sum())
            count += len(chunk)
    return Comparison(EquivalenceReport.worst(reports), count, same)


def _top1(network: LoadedNetwork, images: torch.Tensor) -> torch.Tensor:
    return forward_outputs(network.model, images)[0].flatten(1).argmax(1)
