"""Commands that convert networks and look at files: reparam, restore, verify, inspect, archs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Source,
    TrustPickle,
)
from pathconvert.errors import EquivalenceError, PathconvertError, RecordError

if TYPE_CHECKING:
    from pathconvert.networks.loading import LoadedNetwork


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
    key: Key = None,
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

    path = checked_output(source, output, form, force)
    if report:
        reports.prepare_report(report, force=force, taken=(Path(source), path))
    with steps.shown():
        with steps.step("load"):
            network = Loader(arch, input_size, num_classes, key, trust_pickle).open(source)
        from pathconvert.conversion.record import record_of
        from pathconvert.networks.checked import (
            convert_network,
            enter_path_bn,
            resume_conversion,
            save_checked,
        )

        _require_unconverted(network, source, form)
        with steps.step("convert"):
            conversion = (
                resume_conversion(network)
                if network.record
                else convert_network(
                    network, scope, pivot, gauge, min_pivot=min_pivot, partial=partial
                )
            )
        path_bn = None
        if form == "path-bn":
            with steps.step("Path-BN"):
                conversion, path_bn = enter_path_bn(network, conversion, calibrate, skip_scale)
        with steps.step("verify and write"):
            equality = save_checked(path_bn or conversion, network, path, force=force)
        if report:
            with steps.step("report"):
                reports.write_report(conversion, report)
    parts = record_of(path_bn).path_bn if path_bn else None
    if network.record:
        note(f"note: {source} is in path form; its scope, pivot rule and gauge were kept")
    summary = reports.summarise(conversion, parts, network, equality, steps.seconds)
    summary |= {"source": source, "output": str(path)}
    for remark in summary["notes"]:
        note(f"note: {remark}")
    emit(summary, facts(f"{source} → {path}", reports.summary_rows(summary)), as_json)


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
    """Undo a conversion and write the original network. This works after fine-tuning, too."""
    steps = Steps(2)
    path = checked_output(source, output, "restored", force)
    with steps.shown():
        with steps.step("load"):
            network = Loader(arch, input_size).open(source)
        if network.record is None:
            raise RecordError(
                f"{source} was never converted by pathconvert: it holds no conversion record",
                "Give the .path.safetensors file that pathconvert reparam wrote.",
            )
        from pathconvert.networks.checked import restore_checked

        with steps.step("restore, verify and write"):
            equality, identical = restore_checked(network, path, force=force)
    from pathconvert.commands import reports

    result = {
        "source": source,
        "output": str(path),
        "architecture": network.architecture.name,
        "equality": equality.to_json(),
        "bit_identical_to_the_original": identical,
        "fine_tuned": network.training is not None,
        "seconds": steps.seconds,
    }
    rows = {"network": network.architecture.name, "equality": reports.equality_text(equality)}
    exactly = "bit for bit" if identical else "up to rounding (2 units in the last place)"
    tuned = "has other weights, because the network was fine-tuned"
    rows["original file"] = tuned if network.training else f"restored {exactly}"
    emit(result, facts(f"{source} → {path}", rows | steps.total()), as_json)


def verify(
    a: Annotated[str, typer.Argument(help="The original network.")],
    b: Annotated[str, typer.Argument(help="The other network, in any form.")],
    images: Images = None,
    arch: Arch = None,
    input_size: InputSize = None,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Check that two networks of one architecture compute the same function.

    If not, the exit code is 1.
    """
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            network_a, network_b = Loader(arch, input_size, trust_pickle=trust_pickle).open_pair(
                a, b
            )
        from pathconvert.commands import reports
        from pathconvert.networks.checked import compare

        with steps.step("verify"):
            comparison = compare(network_a, network_b, images)
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
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Show what a file contains and, for a plain checkpoint, how uneven its channel scales are."""
    steps = Steps(2)
    with steps.shown():
        with steps.step("load"):
            network = Loader(arch, input_size, None, key, trust_pickle).open(source)
        from pathconvert.commands import reports

        with steps.step("inspect"):
            result = {"file": source} | reports.inspect_network(network)
    emit(result, facts(source, reports.inspection_rows(result)), as_json)


def archs(as_json: Json = False) -> None:
    """List torchvision's networks: which are supported, and why the others are not."""
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
