"""Commands that convert networks and look at files: reparam, restore, verify, inspect, archs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pathconvert.choices import ConvertedForm, Gauge, PivotRule, Scope
from pathconvert.commands.console import Steps, emit, facts, grid, note
from pathconvert.commands.loading import Loader, checked_output
from pathconvert.commands.options import (
    Arch,
    Force,
    Images,
    InputSize,
    Json,
    Key,
    NumClasses,
    Output,
    Prefix,
    Source,
    TrustPickle,
    with_image_options,
)
from pathconvert.errors import EquivalenceError, PathconvertError, RecordError
from pathconvert.networks.image_options import NOTHING_GIVEN, ImageOptions

if TYPE_CHECKING:
    from pathconvert.networks.loading import LoadedNetwork


@with_image_options
def reparam(
    source: Source,
    output: Output = None,
    arch: Arch = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    scope: Annotated[
        Scope, typer.Option(help="block leaves residual streams alone; network rescales them too.")
    ] = "block",
    pivot: Annotated[
        PivotRule,
        typer.Option(help="Rule that chooses which outgoing weight of a channel becomes ±1."),
    ] = "matching",
    gauge: Annotated[
        Gauge,
        typer.Option(
            help=(
                "unit makes pivots exactly ±1; pow2 uses powers of two, so outputs stay"
                " bit-identical."
            )
        ),
    ] = "unit",
    min_pivot: Annotated[
        float,
        typer.Option(
            help="A channel whose pivot is smaller than this part of its layer's usual ones is"
            " near-dead and left as it is; 0 rescales every channel."
        ),
    ] = 1e-6,
    form: Annotated[
        ConvertedForm,
        typer.Option(
            help="path rescales the weights; path-bn also inserts Path-BN layers for training."
        ),
    ] = "path",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Folder of images from which Path-BN's statistics are computed."),
    ] = None,
    skip_scale: Annotated[
        float,
        typer.Option(
            help="λ, which multiplies the pivots in Path-BN layers; it changes training, not what"
            " the network computes. The papers use 0.1 for ResNets."
        ),
    ] = 1.0,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Leave channels that meet an operation such as GELU as they are, instead of"
            " refusing the network.",
        ),
    ] = False,
    given: ImageOptions = NOTHING_GIVEN,
    key: Key = None,
    prefix: Prefix = None,
    keep_wrapper: Annotated[
        bool,
        typer.Option(
            "--keep-wrapper/--bare",
            help="Write the tensors under the source's prefix and names, and in a .pt file under"
            " its key.",
        ),
    ] = False,
    force: Force = False,
    report: Annotated[
        Path | None, typer.Option(help="Write every scale group and pivot to this JSON file.")
    ] = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Move a network into path space, and check that it computes the same function."""
    steps = Steps(3 + bool(report) + (form == "path-bn"))
    if form == "path" and (calibrate or skip_scale != 1):
        raise PathconvertError(
            "--calibrate and --skip-scale apply only to the Path-BN form", "Add --form path-bn."
        )
    from pathconvert.commands import reports

    path = checked_output(source, output, f"{form}.safetensors", force)
    if report:
        reports.prepare_report(report, force=force, taken=(Path(source), path))
    with steps.shown():
        with steps.step("load"):
            loader = Loader(arch, input_size, num_classes, key, trust_pickle, prefix)
            network = loader.open_prepared(source, given)
        from pathconvert.conversion.record import record_of
        from pathconvert.networks.checked import (
            convert_network,
            enter_path_bn,
            resume_conversion,
            save_checked,
        )

        _require_unconverted(network, source, form)
        with steps.step("convert"):
            if network.record:
                conversion = resume_conversion(network)
            else:
                conversion = convert_network(
                    network, scope, pivot, gauge, min_pivot=min_pivot, partial=partial
                )
        path_bn, remarks = None, _Remarks()
        if form == "path-bn":
            with steps.step("Path-BN"):
                remarks = _image_remarks(network, calibrate)
                conversion, path_bn = enter_path_bn(network, conversion, calibrate, skip_scale)
        with steps.step("verify and write"), _explained_by(remarks.misfit):
            equality = save_checked(
                path_bn or conversion, network, path, force=force, keep_wrapper=keep_wrapper
            )
        if report:
            with steps.step("report"):
                reports.write_report(conversion, report)
    parts = record_of(path_bn).path_bn if path_bn else None
    if network.record:
        note(f"note: {source} is in path form; its scope, pivot rule and gauge were kept")
    summary = reports.summarise(conversion, parts, network, equality, steps.seconds)
    summary |= {"source": source, "output": str(path), "notes": [*remarks.all, *summary["notes"]]}
    for remark in summary["notes"]:
        note(f"note: {remark}")
    emit(summary, facts(f"{source} → {path}", reports.summary_rows(summary)), as_json)


class _Remarks(NamedTuple):
    """On the calibration images: what is assumed of them, and what looks wrong about them."""

    assumed: tuple[str, ...] = ()
    misfit: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return self.assumed + ((self.misfit,) if self.misfit else ())


def _image_remarks(network: LoadedNetwork, images: Path | None) -> _Remarks:
    from pathconvert.networks.calibration import check_folder
    from pathconvert.networks.prepared import image_notes

    if images is None:
        return _Remarks()
    return _Remarks(tuple(image_notes(network)), check_folder(network, images))


@contextlib.contextmanager
def _explained_by(misfit: str | None) -> Iterator[None]:
    """Let what looks wrong about the images be the tip of a conversion that is not equal."""
    try:
        yield
    except EquivalenceError as error:
        if misfit is None:
            raise
        raise EquivalenceError(str(error), f"{misfit[0].upper()}{misfit[1:]}.") from error


def _require_unconverted(network: LoadedNetwork, source: str, form: ConvertedForm) -> None:
    """Refuse a network that is in the wanted form already, or in Path-BN form.

    Raises:
        RecordError: it is.
    """
    if network.form in (form, "path-bn"):
        form_now = {"path": "path form", "path-bn": "Path-BN form"}[network.form]
        raise RecordError(
            f"{source} is converted already: it is in {form_now}",
            f"Restore it first: pathconvert restore {source}",
        )


def restore(
    source: Source,
    output: Output = None,
    arch: Arch = None,
    input_size: InputSize = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Undo a conversion and write the original network. This works after fine-tuning, too.

    The file gets the container, the key, the prefix and the names that the original file had.
    """
    steps = Steps(2)
    if output:
        checked_output(source, output, "restored.safetensors", force)
    with steps.shown():
        with steps.step("load"):
            network = Loader(arch, input_size).open(source)
        if network.record is None:
            raise RecordError(
                f"{source} was never converted by pathconvert: it holds no conversion record",
                "Give the .path.safetensors file that pathconvert reparam wrote.",
            )
        from pathconvert.networks.checked import restore_checked
        from pathconvert.networks.way_out import original_suffix

        path = checked_output(source, output, f"restored{original_suffix(network)}", force)
        with steps.step("restore, verify and write"):
            equality, identical = restore_checked(network, path, force=force)
    from pathconvert.commands import reports

    layout = reports.layout_facts(network, path)
    result = {
        "source": source,
        "output": str(path),
        "architecture": network.architecture.name,
        "equality": equality.to_json(),
        "bit_identical_to_the_original": identical,
        "layout": layout,
        "fine_tuned": network.training is not None,
        "seconds": steps.seconds,
    }
    rows = {"network": network.architecture.name, "equality": reports.equality_text(equality)}
    exactly = "bit for bit" if identical else "up to rounding (2 units in the last place)"
    tuned = "has other weights, because the network was fine-tuned"
    rows["original file"] = tuned if network.training else f"restored {exactly}"
    rows |= reports.layout_rows(layout)
    emit(result, facts(f"{source} → {path}", rows | steps.total()), as_json)


@with_image_options
def verify(
    a: Annotated[str, typer.Argument(help="The original network.")],
    b: Annotated[str, typer.Argument(help="The other network, in any form.")],
    images: Images = None,
    given: ImageOptions = NOTHING_GIVEN,
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Check that two networks of one architecture compute the same function.

    If not, the exit code is 1.
    """
    if images is None and given.preparing:
        raise PathconvertError(
            f"{given.preparing} has no effect without images", "Add --images DIR."
        )
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            from pathconvert.networks.prepared import image_notes, prepared

            loader = Loader(arch, input_size, trust_pickle=trust_pickle)
            loader.require_one_size(given)
            pair = [prepared(network, given) for network in loader.open_pair(a, b)]
        from pathconvert.commands import reports
        from pathconvert.networks.checked import compare

        with steps.step("verify"):
            comparison = compare(pair[0], pair[1], images)
    if images is not None:
        # those of the network whose preprocessing is used: one that records it, else the original
        for remark in image_notes(
            min(pair, key=lambda network: (not network.was_trained_here, network.form != "plain"))
        ):
            note(f"note: {remark}")
    result = comparison.to_json() | {"a": a, "b": b, "seconds": steps.seconds}
    rows = {"equality": reports.equality_text(comparison.equality)}
    if comparison.images:
        rows["images"] = f"same top-1 on {comparison.same_top1} of {comparison.images}"
    emit(result, facts(f"{a} and {b}", rows | steps.total()), as_json)
    if not comparison.passed:
        raise EquivalenceError(f"{a} and {b} do not compute the same function")


def inspect(
    source: Source,
    arch: Arch = None,
    input_size: InputSize = None,
    key: Key = None,
    prefix: Prefix = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Show what a file contains and, for a plain checkpoint, how uneven its channel scales are."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            network = Loader(arch, input_size, None, key, trust_pickle, prefix).open(source)
        from pathconvert.commands import reports

        with steps.step("inspect"):
            result = {"file": source} | reports.inspect_network(network)
    emit(result, facts(source, reports.inspection_rows(result)), as_json)


def archs(as_json: Json = False) -> None:
    """List the networks that are known: which are supported, and why the others are not."""
    from pathconvert.networks.architectures import catalogue

    entries = catalogue()
    rows = ((e.name, e.task, "yes" if e.supported else f"no: {e.reason}") for e in entries)
    table = grid(
        "torchvision networks", {"network": "left", "task": "left", "supported": "wrap"}, rows
    )
    keys = ("name", "task", "supported", "reason")
    emit({"architectures": [{k: getattr(e, k) for k in keys} for e in entries]}, table, as_json)
    note(
        "For any other module give --arch package.module:builder, or --arch timm/NAME if timm is"
        " installed."
    )
