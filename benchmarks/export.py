"""How fast our exports run on ONNX Runtime beside PyTorch's own, how large they are, what they take
to make.

    python benchmarks/export.py [NAMES…] [--rounds 20] [--batch 1,8] [--threads 2] [--json FILE]

*Theirs* is ``torch.onnx.export(dynamo=True, optimize=True)`` of the original network; *ours* is
``pathconvert.export.export_onnx`` of the same network, and of its Path-BN form. All files of a
network are loaded at once and take turns in one process, a second session of theirs among them:
what its ratio says is noise. Networks are built as ``convert.py`` builds them: torchvision's
initialisation, random γ and β, true statistics. README.md beside this file says what every column
means.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pathconvert
from pathconvert.export import export_onnx
from pathconvert.export.runtime.bench import Timing, time_engines, torch_threads
from pathconvert.export.runtime.engines import session_engine, torch_engine
from pathconvert.export.runtime.providers import open_session
from pathconvert.export.runtime.session import ort
from pathconvert.networks.architectures import Architecture
from pathconvert.networks.loading import LoadedNetwork

from convert import build, example_for

NETWORKS = (
    "resnet50", "vgg16_bn", "densenet121", "googlenet", "shufflenet_v2_x1_0", "regnet_y_800mf",
    "squeezenet1_1",
)  # fmt: skip
FORMS = ("plain", "path-bn")
NOT_MEASURED = "not measured"
#: BatchNorms before an activation have no convolution to fold into.
CANNOT_FOLD = {"densenet121": 62}
CALIBRATION_IMAGES = 8


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def export_theirs(model: nn.Module, example: Tensor, path: Path) -> dict[str, Any]:
    """PyTorch's exporter at its best, into one file with a free batch size."""
    begun = time.perf_counter()
    with _quiet():
        torch.onnx.export(
            model, (example,), path, dynamo=True, optimize=True, verbose=False, external_data=False,
            dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    return {"seconds": {"total": time.perf_counter() - begun}} | _graph(path)


def export_ours(model: nn.Module, example: Tensor, path: Path) -> dict[str, Any]:
    """Our exporter, its proof included."""
    begun = time.perf_counter()
    with _quiet():
        report = export_onnx(model, path, example)
    seconds = dict(report.seconds) | {"total": time.perf_counter() - begun}
    return {"seconds": seconds, "noise_ratio": report.noise_ratio} | _graph(path)


def _graph(path: Path) -> dict[str, Any]:
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {
        "nodes": operators.total(),
        "batch_norms": operators["BatchNormalization"],
        "operators": dict(operators.most_common()),
        "file_bytes": path.stat().st_size,
    }


# ---- one network ---------------------------------------------------------------------------------


def measure(
    name: str, batches: list[int], rounds: int, threads: int, folder: Path
) -> dict[str, Any]:
    """Everything about one network; a form that fails says so, and the others are measured."""
    model = build(name)
    example = example_for(name, small=False)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    result: dict[str, Any] = {
        "network": name,
        "state_bytes": state,
        "size": list(example.shape[1:]),
        "forms": {},
    }
    theirs = folder / "theirs.onnx"
    result["theirs"] = export_theirs(model, example, theirs)
    files = {}
    for form in FORMS:
        path = folder / f"{form}.onnx"
        try:
            begun = time.perf_counter()
            source = _path_bn(model, example) if form == "path-bn" else model
            entering = time.perf_counter() - begun
            result["forms"][form] = export_ours(source, example, path) | {
                "entering_seconds": entering
            }
            files[form] = path
        except Exception as error:
            traceback.print_exc()
            result["forms"][form] = {"error": f"{type(error).__name__}: {error}"[:300]}
    architecture = Architecture(name, {}, tuple(example.shape[1:]), "classification")
    network = LoadedNetwork(model, architecture, None, ())
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    result["timings"] = {
        device: _time(theirs, files, network, device, batches, rounds, threads)
        for device in devices
    } | ({} if "cuda" in devices else {"cuda": NOT_MEASURED})  # fmt: skip
    return result


def _path_bn(model: nn.Module, example: Tensor) -> nn.Module:
    """The Path-BN form, calibrated on noise."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(CALIBRATION_IMAGES, *example.shape[1:], generator=generator)
    form: nn.Module = pathconvert.to_path_bn(model, example, calibration=images)
    return form.eval()


def _time(
    theirs: Path,
    files: dict[str, Path],
    network: LoadedNetwork,
    device: str,
    batches: list[int],
    rounds: int,
    threads: int,
) -> list[dict[str, Any]]:
    """Latencies of all engines, with ratios to theirs; one row per batch size."""
    paths = {"theirs": theirs, "theirs again": theirs, **files}
    binding = device == "cuda"
    engines = [
        session_engine(
            open_session(path, device, threads, io_binding=binding, take_turns=True), name
        )
        for name, path in paths.items()
    ]
    engines.append(torch_engine("torch eager", network, device, own_dtype=True))
    rows = []
    with torch_threads(threads):
        for batch in batches:
            timings = time_engines(engines, batch, engines[-1].input_size, rounds)
            rows.append({"batch": batch, "contenders": {t.source: _row(t) for t in timings}})
    return rows


def _row(timing: Timing) -> dict[str, float]:
    keys = ("median_ms", "low_ms", "high_ms", "fastest_ms", "ratio", "ratio_low", "ratio_high")
    return {key: round(getattr(timing, key), 4) for key in keys}


# ---- what came out -------------------------------------------------------------------------------


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets of the issue: what misses them, by network and form."""
    good = [r for r in results if "error" not in r]
    failed = {r["network"]: r["error"] for r in results if "error" in r}
    for r in good:
        failed |= {
            f"{r['network']} {form}": made["error"]
            for form, made in r["forms"].items()
            if "error" in made
        }
    return (
        {"networks": len(good), "failed": failed}
        | _summary_of_speed(good)
        | _summary_of_files(good)
        | {
            "gpu": (
                NOT_MEASURED
                if all(r["timings"]["cuda"] == NOT_MEASURED for r in good)
                else "measured"
            )
        }
    )


def _summary_of_speed(good: list[dict[str, Any]]) -> dict[str, Any]:
    slower, ratios, noise, eager = {}, {}, {}, {}
    for r in good:
        for row in r["timings"]["cpu"]:
            again = row["contenders"]["theirs again"]
            noise[f"{r['network']} batch {row['batch']}"] = max(again["ratio"], 1 / again["ratio"])
            for form in FORMS:
                if form not in row["contenders"]:
                    continue
                key, mine = f"{r['network']} {form} batch {row['batch']}", row["contenders"][form]
                ratios[key] = mine["ratio"]
                # what a second session of theirs shows is noise
                if mine["ratio_low"] > 1 and mine["ratio"] > again["ratio_high"]:
                    slower[key] = mine["ratio"]
                if r["network"] == "resnet50":
                    eager[key] = row["contenders"]["torch eager"]["median_ms"] / mine["median_ms"]
    largest = {name: max(of.items(), key=lambda pair: pair[1], default=None) for name, of in
               (("ratio_max", ratios), ("noise_max", noise))}  # fmt: skip
    return {"slower_than_theirs": slower, **largest, "resnet50_eager_over_ours": eager}


def _summary_of_files(good: list[dict[str, Any]]) -> dict[str, Any]:
    nodes, norms, larger = {}, {}, {}
    for r in good:
        for form, made in r["forms"].items():
            if "error" in made:
                continue
            key, share = f"{r['network']} {form}", made["file_bytes"] / r["state_bytes"]
            if made["nodes"] > r["theirs"]["nodes"]:
                nodes[key] = [made["nodes"], r["theirs"]["nodes"]]
            if made["batch_norms"] > CANNOT_FOLD.get(r["network"], 0):
                norms[key] = made["batch_norms"]
            if share > 1.02:
                larger[key] = share
    return {"more_nodes": nodes, "batch_norms_left": norms, "larger_than_1.02": larger}


def table_of(results: list[dict[str, Any]], threads: int) -> Table:
    table = Table(title=f"ONNX Runtime, {threads} threads, ms a batch", title_justify="left")
    table.add_column("network", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for column in (
        "device", "batch", "theirs", "again ×", "ours", "ours ×", "quartiles", "fastest ×",
        "eager ÷ ours", "nodes",
        "theirs", "BN", "fold s", "export s", "verify s", "theirs s", "size ×",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        if "error" in r:
            table.add_row(r["network"], r["error"])
            continue
        for form, made in r["forms"].items():
            if "error" in made:
                table.add_row(r["network"], form, made["error"])
                continue
            for device, rows in r["timings"].items():
                for row in [{"batch": ""}] if rows == NOT_MEASURED else rows:
                    speed = (
                        _speed(row["contenders"], form) if "contenders" in row else [NOT_MEASURED]
                    )
                    made_cells = _made(r, made) if "contenders" in row and device == "cpu" else []
                    table.add_row(
                        r["network"], form, device, str(row["batch"]), *speed, *made_cells
                    )
    return table


def _speed(contenders: dict[str, Any], form: str) -> list[str]:
    theirs, again, mine = (contenders[key] for key in ("theirs", "theirs again", form))
    eager = contenders["torch eager"]["median_ms"] / mine["median_ms"]
    return [
        f"{theirs['median_ms']:.2f}", f"{again['ratio']:.3f}", f"{mine['median_ms']:.2f}",
        f"{mine['ratio']:.3f}",
        f"{mine['ratio_low']:.3f}–{mine['ratio_high']:.3f}",
        f"{mine['fastest_ms'] / theirs['fastest_ms']:.3f}",
        f"{eager:.2f}",
    ]  # fmt: skip


def _made(result: dict[str, Any], made: dict[str, Any]) -> list[str]:
    seconds = [made["seconds"].get(step) for step in ("fold", "export", "verify and write")]
    return [
        str(made["nodes"]), str(result["theirs"]["nodes"]), str(made["batch_norms"]),
        *("" if value is None else f"{value:.1f}" for value in seconds),
        f"{result['theirs']['seconds']['total']:.1f}",
        f"{made['file_bytes'] / result['state_bytes']:.3f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each at every batch size")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results; kept after every network")
    options = parser.parse_args()
    batches = [int(size) for size in options.batch.split(",")]
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    known = (
        json.loads(options.json.read_text())["results"]
        if options.json and options.json.exists()
        else []
    )
    results: list[dict[str, Any]] = []
    for name in options.names or NETWORKS:
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                results.append(
                    measure(name, batches, options.rounds, options.threads, Path(folder))
                )
        except Exception as error:
            traceback.print_exc()
            results.append({"network": name, "error": f"{type(error).__name__}: {error}"[:300]})
        gc.collect()
        print(f"{name} {time.perf_counter() - begun:.0f} s", flush=True, file=sys.stderr)
        if options.json:
            merged = [
                r for r in known if r["network"] not in {r["network"] for r in results}
            ] + results
            content = {
                "torch": torch.__version__, "torchvision": torchvision.__version__,
                "onnxruntime": ort.__version__,
                "threads": options.threads, "rounds": options.rounds,
                "load_average": os.getloadavg()[1],
                "summary": summarise(merged), "results": merged,
            }  # fmt: skip
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=220 if not sys.stdout.isatty() else None)
    console.print(table_of(results, options.threads))
    console.print_json(data=summarise(results))


if __name__ == "__main__":
    main()
