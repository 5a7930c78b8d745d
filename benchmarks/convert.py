"""How long a conversion takes, what memory it needs, what it rescales.

Brevitas and AIMET side by side.

    python benchmarks/convert.py [NAMES…] [--all] [--pivot max,matching] [--json FILE]

All tools take turns in one process on the same network and the same small example (64 pixels, so
that a tool which traces with numbers pays little for them), one thread each; the least of several
turns counts. **Seconds are CPU seconds**: they equal wall-clock seconds on an idle machine, and
unlike those change little while other programs compute. Networks have torchvision's own
initialisation, seeded random γ (0.4…1.6) and β, and the running statistics of one random batch.
README.md beside this file says what every column means.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import nn

from pathconvert.conversion.equivalence import verify, verify_conversion
from pathconvert.networks import architectures
from pathconvert.networks.checked import convert_network, save_checked
from pathconvert.networks.loading import open_network

from convert_table import summarise, table_of
from convert_tools import (
    Result,
    Steps,
    aimet,
    brevitas,
    exceptions,
    installed,
    our_channels,
    ours,
    tied_count,
)

#: Without names and without ``--all``.
SELECTION = (
    "resnet50", "vgg16_bn", "densenet121", "googlenet", "resnext50_32x4d",
    "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf",
)  # fmt: skip
#: Above this many parameters outputs are compared on a small input, and tools take two turns
#: instead of several.
GIANT = 60e6
TURNS, GIANT_TURNS = 3, 2
#: Networks whose last pooling or auxiliary head has a fixed size.
NEEDS_ITS_SIZE = ("inception_v3", "s3d")

# ---- networks and inputs -------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """torchvision's network as torchvision initialises it; γ, β random and statistics true.

    seeded.
    """
    torch.manual_seed(0)
    task = architectures.index()[name]["task"]
    backbone = {"weights_backbone": None} if task in ("segmentation", "detection") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **backbone).eval()
    if task == "detection" and name != "ssd300_vgg16":
        model.transform.min_size, model.transform.max_size = (
            (128,),
            192,
        )  # not 800 pixels: what is compared is the same
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    was = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.4, 1.6)
            norm.bias.normal_(0, 0.3)
            norm.momentum = 1.0
            norm.train()
        if norms:
            *rest, _, side = architectures.index()[name]["input_size"]
            side = side if name in NEEDS_ITS_SIZE else 64
            body = model.backbone if task == "detection" else model
            body(torch.randn(8, *rest, side, side))
    for norm, momentum in zip(norms, was, strict=True):
        norm.momentum = momentum
    return model.eval()


def example_for(name: str, small: bool) -> Any:
    """A batch of one of the network's size, or of 64 pixels where the network takes that.

    Detectors take a list.
    """
    entry = architectures.index()[name]
    *rest, _, side = entry["input_size"]
    side = 64 if small and name not in NEEDS_ITS_SIZE and entry["task"] != "detection" else side
    size = (*rest, side, side)
    generator = torch.Generator().manual_seed(1)
    if entry["task"] == "detection":
        return [torch.rand(size, generator=generator)]
    return torch.randn(1, *size, generator=generator)


# ---- one network ---------------------------------------------------------------------------------


#: The other tools that are measured, if they are installed.
OTHERS = {"brevitas": brevitas, "aimet": aimet}


def _run_tools(
    model: nn.Module,
    example: Any,
    image: Any,
    tools: dict[str, Callable[[nn.Module, Any], Result]],
    result: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Let all tools take turns; what the first turn shows goes into ``result``.

    Returns:
        Tool → seconds of its steps in its fastest turn.
    """
    best: dict[str, dict[str, float]] = {}
    turns = GIANT_TURNS if result["parameters"] > GIANT else TURNS
    for turn in range(turns):
        for tool, function in list(tools.items()):
            gc.collect()
            try:
                with _quiet():
                    one = function(model, example)
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0][:200]
                result[tool] = {"failed": f"{type(error).__name__}: {line}"}
                del tools[tool]
                continue
            if tool not in best or sum(one.seconds.values()) < sum(best[tool].values()):
                best[tool] = one.seconds
            if turn == 0 and "conversion" in one.more:
                result["pivots"][tool] = _ours(model, one.more["conversion"], image)
            elif turn == 0:
                result[tool] = _theirs(model, one, example)
            del one
    return best


def _ours(model: nn.Module, conversion: Any, image: Any) -> dict[str, Any]:
    """What our conversion gives."""
    return {
        "channels_block": conversion.counts()["channels_rescaled"],
        "noise_ratio": verify_conversion(
            model, conversion.model, conversion.parts, image
        ).noise_ratio,
        "fallbacks": list(conversion.pivot_fallbacks),
    }


def _theirs(model: nn.Module, one: Result, example: Any) -> dict[str, Any]:
    """What another tool gives, compared on what it was traced on.

    value_trace writes sizes into some graphs.
    """
    found = {**one.more, "channels": tied_count(one.ties), "_channels": one.channels}
    try:
        found["noise_ratio"] = verify(model, one.model, example).noise_ratio
    except Exception as error:
        found["noise_ratio"] = None
        found["noise_failed"] = f"{type(error).__name__}: {error}"[:200]
    return found


def _network_scope(model: nn.Module, example: Any, image: Any, result: dict[str, Any]) -> None:
    """Add the numbers of scope network, and the channels that only other tools rescale."""
    conversion = ours("max", "network")(model, example).more["conversion"]
    rescaled, left = our_channels(conversion)
    result["channels_network"] = conversion.counts()["channels_rescaled"]
    result["noise_ratio_network"] = verify_conversion(
        model, conversion.model, conversion.parts, image
    ).noise_ratio
    for tool in OTHERS:
        if "_channels" in result.get(tool, {}):
            theirs = result[tool].pop("_channels")
            result[tool]["producer_channels"] = len(theirs)
            result[tool]["not_rescaled_by_us"] = exceptions(theirs, rescaled, left)


def measure(
    name: str, pivots: list[str], others: dict[str, str | None], quick: bool = False
) -> dict[str, Any]:
    """Everything about one network."""
    model = build(name)
    count = sum(p.numel() for p in model.parameters())
    example, image = example_for(name, small=True), example_for(name, small=count > GIANT)
    result: dict[str, Any] = {
        "network": name,
        "parameters": count,
        "traced_on": _sizes(example),
        "compared_on": _sizes(image),
        "pivots": {},
    }
    tools: dict[str, Callable[[nn.Module, Any], Result]] = {pivot: ours(pivot) for pivot in pivots}
    tools |= {
        tool: OTHERS[tool] for tool, state in others.items() if state and "not import" not in state
    }
    best = _run_tools(model, example, image, tools, result)
    for tool, seconds in best.items():
        target = result["pivots"][tool] if tool in pivots else result[tool]
        target["seconds"] = {**seconds, "sum": sum(seconds.values())}
    _network_scope(model, example, image, result)
    result["recognise_seconds"] = _recognise(model)
    if not quick:
        result["total_seconds"] = _total(name, model)
    del model
    gc.collect()
    result["peak_memory_over_weights"] = _memory(name, pivots)
    return result


def _sizes(example: Any) -> list[int]:
    return list((example[0] if isinstance(example, list) else example).shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _recognise(model: nn.Module) -> float | None:
    """CPU seconds of ``architectures.recognise``, the least of three."""
    state, times = model.state_dict(), []
    for _ in range(3):
        begun = time.process_time()
        try:
            architectures.recognise(state)
        except Exception as error:
            print(f"recognise: {error}", file=sys.stderr)
            return None
        times.append(time.process_time() - begun)
    return min(times)


def _total(name: str, model: nn.Module) -> dict[str, float]:
    """Load → convert (block, matching) → verify → write, as ``pathconvert reparam`` does it.

    CPU seconds.
    """
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{name}.pt")
        torch.save(model.state_dict(), source)
        with steps.step("load"):
            network = open_network(source)
        with steps.step("convert"):
            conversion = convert_network(network, "block", "matching", "unit", partial=False)
        with steps.step("verify and write"):
            save_checked(conversion, network, Path(folder, f"{name}.path.safetensors"), force=False)
    return {**steps.seconds, "sum": sum(steps.seconds.values())}


# ---- memory, in a process of its own -------------------------------------------------------------


def _memory(name: str, pivots: list[str]) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--memory-of", name, "--pivot", ",".join(pivots)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: memory not measured: {done.stderr[-300:]}", file=sys.stderr)
        return None
    peaks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def memory_of(name: str, pivots: list[str]) -> dict[str, float]:
    """(VmHWM − resident before the network was built) / bytes of weights.

    A small network first loads all code.
    """
    for pivot in pivots:
        ours(pivot)(build("shufflenet_v2_x0_5"), example_for("shufflenet_v2_x0_5", small=True))
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)
    before = _status_bytes("VmRSS")
    model = build(name)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    example = example_for(name, small=True)
    peaks = {}
    for pivot in pivots:
        gc.collect()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        ours(pivot)(model, example)
        peaks[pivot] = (_status_bytes("VmHWM") - before) / weights
    return peaks


def _status_bytes(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


# ---- the command line ----------------------------------------------------------------------------


def help_seconds() -> float:
    """Median wall-clock seconds of ``pathconvert --help``, of ten."""
    command = [str(Path(sys.executable).with_name("pathconvert")), "--help"]
    if not Path(command[0]).exists():
        command = [sys.executable, "-c", "from pathconvert.cli import main; main()", "--help"]
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="every supported network")
    parser.add_argument("--pivot", default="max,matching")
    parser.add_argument("--json", type=Path, help="write the results; kept after every network")
    parser.add_argument("--quick", action="store_true", help="leave out the seconds in all")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    pivots = options.pivot.split(",")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, pivots)))
        return
    every = [entry.name for entry in architectures.catalogue() if entry.supported]
    names = options.names or (every if options.all else list(SELECTION))
    others = installed()
    results: list[dict[str, Any]] = []
    known = (
        json.loads(options.json.read_text())["results"]
        if options.json and options.json.exists()
        else []
    )
    for name in names:
        print(name, end=" ", flush=True, file=sys.stderr)
        begun = time.perf_counter()
        try:
            results.append(measure(name, pivots, others, options.quick))
        except Exception as error:
            results.append({"network": name, "error": f"{type(error).__name__}: {error}"[:300]})
        print(f"{time.perf_counter() - begun:.0f} s", flush=True, file=sys.stderr)
        if options.json:
            done = {r["network"] for r in results}
            merged = [r for r in known if r["network"] not in done] + results
            content = {
                "torch": torch.__version__, "torchvision": torchvision.__version__, "tools": others,
                "load_average": os.getloadavg()[1], "summary": summarise(merged, pivots),
                "results": merged,
            }  # fmt: skip
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=240 if not sys.stdout.isatty() else None)
    console.print(table_of(results, pivots, others))
    summary = summarise(results, pivots) | {"help_seconds": help_seconds()}
    console.print_json(data=summary)
    if options.json:
        content["help_seconds"] = summary["help_seconds"]
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
