"""The results that the commands print: as JSON, and as the rows of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathconvert.conversion.deploy_forms import deploy_hint
from pathconvert.conversion.equivalence import EquivalenceReport
from pathconvert.conversion.path_bn_record import PathBnRecord
from pathconvert.conversion.reparameterize import Conversion, reparameterize
from pathconvert.conversion.tracing.trace import FloatVector
from pathconvert.errors import OutputError, PathconvertError
from pathconvert.networks.adjusting import network_text
from pathconvert.networks.inputs import random_input
from pathconvert.networks.loading import LoadedNetwork
from pathconvert.networks.way_out import recorded_layout


def summarise(
    conversion: Conversion,
    path_bn: PathBnRecord | None,
    network: LoadedNetwork,
    equality: EquivalenceReport,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The result of ``pathconvert reparam`` as a JSON-serialisable dictionary.

    Args:
        conversion: what was converted.
        path_bn: the part of the record that describes the Path-BN layers; None in path form.
        network: the network before the conversion.
        equality: the comparison of the file with it.
        seconds: step → how long it took.
    """
    magnitudes = np.abs(conversion.pivots.value[conversion.pivots.layer >= 0])
    return {
        "architecture": network.architecture.name,
        "arguments": network.architecture.arguments,
        "form": "path-bn" if path_bn else "path",
        "scope": conversion.scope,
        "pivot": conversion.pivot,
        "gauge": conversion.gauge,
        **conversion.counts(),
        "pivots_recentred": int((conversion.exponents() != 0).sum()),
        "pivot_magnitude": _spread(magnitudes),
        "scales": _spread(conversion.scales[conversion.rescaled()]),
        "path_bn": _path_bn_json(path_bn) if path_bn else None,
        "equality": equality.to_json(),
        "parts": list(conversion.parts),
        "left_alone": conversion.left_alone,
        "notes": _notes(conversion) + _path_bn_notes(path_bn),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }


def _spread(values: FloatVector) -> dict[str, float | None]:
    """Minimum, median and maximum of some values; all three are None without values."""
    if not values.size:
        return dict.fromkeys(("min", "median", "max"))
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def _scales_row(scales: dict[str, float | None]) -> str:
    """The row ``scales``: ``min 1.2e-03, median 0.48, max 3.1``."""
    return ", ".join(f"{name} {_two_digits(value)}" for name, value in scales.items() if value)


def _two_digits(value: float) -> str:
    """A positive number with two digits, without an exponent if it has an ordinary size."""
    return f"{value:.2g}" if 0.01 <= value < 99.5 else f"{value:.1e}"


def _notes(conversion: Conversion) -> list[str]:
    counts = conversion.counts()
    notes = [
        f"{name} is too wide for the pivot rule matching: max was used there"
        for name in conversion.pivot_fallbacks
    ]
    if counts["channels_held_back"]:
        held_back = counts["channels_held_back"]
        notes.append(
            f"{held_back} channels were held back: rescaled, they would leave the dtype's normal"
            " range, or a BatchNorm that reads them could not carry their factors"
        )
    if counts["channels_near_dead"]:
        notes.append(
            f"{counts['channels_near_dead']} channels are near-dead: their pivots are tiny beside"
            " those of their layer, so they were left as they are (--min-pivot)"
        )
    if recentred := int((conversion.exponents() != 0).sum()):
        notes.append(
            f"{recentred} pivots are λ times a power of two instead of λ (±1 in path form), so that"
            " factors do not leave their range"
        )
    hint = deploy_hint(conversion)
    notes += [hint] if hint else []
    if counts["channels_circular"]:
        notes.append(
            f"{counts['channels_circular']} channels were left alone: their pivots run in a circle"
        )
    if conversion.parts != ("",):
        notes.append(f"converted part by part: {', '.join(conversion.parts)}")
    notes += [f"left alone: {name} ({why})" for name, why in conversion.left_alone.items()]
    return notes


def _path_bn_json(path_bn: PathBnRecord) -> dict[str, Any]:
    """The description of Path-BN layers, with their names in place of their entries."""
    return path_bn.to_json() | {"layers": [layer.name for layer in path_bn.layers]}


def _path_bn_notes(path_bn: PathBnRecord | None) -> list[str]:
    """One note for every reason why layers did not become Path-BN layers."""
    by_reason: dict[str, list[str]] = {}
    for name, why in path_bn.left.items() if path_bn else ():
        by_reason.setdefault(why, []).append(name)
    return [f"no Path-BN: {_listing(names)} ({why})" for why, names in by_reason.items()]


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _path_bn_row(path_bn: dict[str, Any]) -> str:
    calibration = path_bn["calibration"]
    images = calibration.get("images")
    source = (
        f"calibrated on {images} images"
        if images
        else "statistics estimated from the BatchNorms (Gaussian), without images"
    )
    layers = f"{len(path_bn['layers'])} layers, {len(path_bn['left'])} left as they are"
    return f"{layers}; λ {path_bn['skip_scale']:g}; {source}"


def summary_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The rows of the table that reparam prints."""
    magnitude = summary["pivot_magnitude"]
    seconds = summary["seconds"]
    rows = {
        "network": network_text(summary["architecture"], summary["arguments"]),
        "form": (
            f"{summary['form']}; scope {summary['scope']}, pivot {summary['pivot']}, gauge"
            f" {summary['gauge']}"
        ),
        "groups": f"{summary['groups']} ({summary['groups_pinned']} pinned)",
        "channels": (
            f"{summary['channels_rescaled']} rescaled, {summary['channels_pinned']} pinned, "
            f"{summary['channels_dead']} dead, {summary['channels_near_dead']} near-dead"
        ),
    }
    if summary["scales"]["min"] is not None:
        rows["scales"] = _scales_row(summary["scales"])
    if magnitude["min"] is not None:
        rows["pivots before"] = (
            f"min {magnitude['min']:.2e}, median {magnitude['median']:.2e}, max"
            f" {magnitude['max']:.2e}"
        )
    if summary["path_bn"]:
        rows["Path-BN"] = _path_bn_row(summary["path_bn"])
    rows["equality"] = _equality_row(summary["equality"])
    rows["time"] = f"{seconds['total']:.1f} s (conversion {seconds['convert']:.2f} s)"
    return rows


def equality_text(equality: EquivalenceReport) -> str:
    """The result of a comparison as one line."""
    return _equality_row(equality.to_json())


def _equality_row(equality: dict[str, Any]) -> str:
    verdict = "passed" if equality["passed"] else "FAILED"
    if equality["bit_identical"]:
        return f"{verdict}: outputs bit-identical"
    return (
        f"{verdict}: error {equality['noise_ratio']:.2f} × the dtype's own noise (limit: 4), "
        f"largest difference {equality['max_abs']:.1e} ({equality['max_rel']:.1e} relative)"
    )


def prepare_report(path: Path, *, force: bool, taken: tuple[Path, ...]) -> None:
    """Check, before any work is done, that a report can be written at ``path``.

    Args:
        path: the file for the report.
        force: replace a file that exists.
        taken: the source and the output, which the report must not replace.

    Raises:
        OutputError: the path is taken, is a directory, is not writable, or exists and ``force`` is
            False.
    """
    tip = "Give another file to --report."
    if any(path.resolve() == other.resolve() for other in taken):
        raise OutputError(
            f"{path} is the source or the output, so the report cannot be written there.", tip
        )
    if path.is_dir():
        raise OutputError(
            f"{path} is a directory; expected the name of a file for the report.", tip
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder {path.parent} of the report {path} does not exist or is not writable.", tip
        )
    if path.exists() and not force:
        raise OutputError(
            f"{path} exists already.",
            "Pass --force to replace it, or give another file to --report.",
        )


def write_report(conversion: Conversion, path: Path) -> None:
    """Write every scale group and pivot as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    groups = [
        {
            "name": group.name,
            "size": group.size,
            "producers": list(group.producers),
            "pinned_by": group.pinned_by,
            "scales": group.scales.tolist(),
            "held_back": np.flatnonzero(group.held_back).tolist(),
            "near_dead": np.flatnonzero(group.near_dead).tolist(),
            "pivots": [pivot._asdict() if pivot else None for pivot in group.pivots],
        }
        for group in conversion.groups
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(
            json.dumps({"groups": groups, "left_alone": conversion.left_alone}, indent=1)
        )
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} was not written: {error.strerror}", "Give another file to --report."
        ) from error


def inspect_network(network: LoadedNetwork) -> dict[str, Any]:
    """What a file contains, as JSON.

    For a plain checkpoint, this includes how uneven its channel scales are.
    """
    parameters = list(network.model.parameters())
    file = network.checkpoint
    result: dict[str, Any] = {
        "form": "plain checkpoint" if network.form == "plain" else network.form,
        "architecture": network.architecture.name,
        "arguments": network.architecture.arguments,
        "task": network.architecture.task,
        "parameters": sum(p.numel() for p in parameters),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "wrapper_key": file.key if file else None,
        "sha256": file.sha256 if file else None,
    }
    if network.training:
        result["training"] = network.training
    if network.record and network.metadata:
        record = network.record
        result |= record.choices | {"tool": record.tool, "groups": len(record.groups)}
        result["scales"] = _spread(record.chosen_scales())
        if record.path_bn:
            result["path_bn"] = _path_bn_json(record.path_bn)
        result["source"] = network.metadata.get("source")
        return result
    try:
        conversion = reparameterize(
            network.model,
            random_input(network.architecture),
            scope="network",
            pivot="max",
            partial=True,
        )
    except PathconvertError as error:
        return result | {"scales": f"not measured: {error}"}
    return result | {"groups": len(conversion.groups), "uneven": _unevenness(conversion)}


def _unevenness(conversion: Conversion) -> list[dict[str, Any]]:
    """The scale groups, the most uneven first.

    Each comes with the ratio of its largest to its smallest factor.
    """
    free = [group for group in conversion.groups if group.pinned_by is None]
    ratios = [
        {
            "group": group.name,
            "size": group.size,
            "largest_over_smallest": float(group.scales.max() / group.scales.min()),
        }
        for group in free
    ]
    return sorted(ratios, key=lambda row: -float(row["largest_over_smallest"]))


def inspection_rows(result: dict[str, Any]) -> dict[str, str]:
    """The rows of the table that inspect prints."""
    rows = {
        "form": result["form"],
        "network": network_text(result["architecture"], result["arguments"]),
        "parameters": f"{result['parameters'] / 1e6:.2f} M, {', '.join(result['dtypes'])}",
    }
    for name in ("wrapper_key", "sha256", "scope", "pivot", "gauge", "tool", "groups", "scales"):
        if result.get(name) is not None:
            rows[name.replace("_", " ")] = str(result[name])
    if isinstance(scales := result.get("scales"), dict):
        rows["scales"] = _scales_row(scales) or "no channel is rescaled"
    if result.get("path_bn"):
        rows["Path-BN"] = _path_bn_row(result["path_bn"])
    if result.get("source"):
        rows["converted from"] = ", ".join(f"{k} {v}" for k, v in result["source"].items())
    if result.get("training"):
        settings, measured = result["training"]["settings"], result["training"].get("measured")
        rows["fine-tuned"] = (
            f"{settings['optimizer']}, norm {settings['norm']}, on {settings['data']}"
        )
        if measured:
            rows["fine-tuned"] += f"; epoch {measured['epoch']}: top-1 {measured['val_top1']:.2%}"
    if result.get("uneven"):
        ratios = [row["largest_over_smallest"] for row in result["uneven"]]
        rows["channel scales"] = (
            f"largest / smallest of each group: median {np.median(ratios):.3g}, worst"
            f" {ratios[0]:.3g}"
        )
        rows["most uneven"] = ", ".join(
            f"{row['group']} {row['largest_over_smallest']:.3g}" for row in result["uneven"][:5]
        )
    return rows


def layout_facts(network: LoadedNetwork, path: Path) -> dict[str, Any]:
    """How a restored file lies, beside the original one.

    Returns:
        ``key``, ``prefix`` and ``container`` of the file; and ``lost``, what it lacks of the
        original file.
    """
    layout = recorded_layout(network)
    if layout is None:
        return {"key": None, "prefix": "", "container": None, "lost": []}
    lost = list(layout.lost)
    flat = path.suffix.lower() == ".safetensors"
    if flat != (layout.container == "safetensors"):
        lost.append(f"the container {layout.container}")
    return {
        "key": ".".join(layout.key) or None if not flat else None,
        "prefix": layout.prefix,
        "container": "safetensors" if flat else layout.container,
        "lost": lost,
    }


def layout_rows(layout: Mapping[str, Any]) -> dict[str, str]:
    """:func:`layout_facts` as rows of a table."""
    names = [f"under the key {layout['key']!r}"] if layout["key"] else []
    names += [f"with the prefix {layout['prefix']!r}"] if layout["prefix"] else []
    rows = {"tensors": ", ".join(names)} if names else {}
    return rows | ({"not restored": "; ".join(layout["lost"])} if layout["lost"] else {})
