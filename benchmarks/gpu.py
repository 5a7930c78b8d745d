"""Everything that needs a GPU, in one run: checks, step cost, accuracy, ONNX Runtime.

    python benchmarks/gpu.py                      # on a GPU, all parts: at most 8 minutes
    python benchmarks/gpu.py --rehearse           # on the CPU, at toy size: at most 3 minutes
    python benchmarks/gpu.py --parts checks,step  # some parts

Every part runs in a process of its own and has its own budget; one that fails, crashes or takes too
long is reported, what it had measured is kept, and the next one runs. The results are written after
every part. What can be made ready in the background (compiled graphs, ONNX files) is made while
earlier parts run. README.md beside this file says how to bring data and ONNX Runtime to a machine
that can fetch nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts import machine
from gpu_parts.context import Context, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "gpu.json"
#: Seconds of every part, on a GPU and in a rehearsal, in order of value.
BUDGETS = {"checks": (90, 60), "step": (90, 50), "accuracy": (180, 30), "runtime": (120, 40)}
#: Seconds of a whole run, on a GPU and in a rehearsal.
LIMITS = (480, 180)
#: Parts that make something ready while earlier ones run.
PREPARED = ("step", "runtime")
#: Folder, in the data's, with packages that the machine lacks.
SITE = "site"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Options:
    """The command line."""

    parts: list[str]
    rehearse: bool
    data: Path
    onnxruntime: Path
    json: Path | None
    budget_factor: float = 1.0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def budget(self, part: str) -> float:
        """Seconds of a part."""
        return BUDGETS[part][self.rehearse] * self.budget_factor

    @property
    def limit(self) -> float:
        """Seconds of the run."""
        return LIMITS[self.rehearse] * self.budget_factor


def parse(arguments: list[str] | None = None) -> Options:
    """The command line.

    Raises:
        SystemExit: with code 2, on wrong usage.
    """
    parser = argparse.ArgumentParser(
        description="Run everything that needs a GPU: checks, step cost, accuracy, ONNX Runtime.",
        epilog="Example: python benchmarks/gpu.py --parts checks,step",
    )
    parser.add_argument(
        "--parts", default=",".join(BUDGETS), help=f"some of {','.join(BUDGETS)} (default: all)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run the same code on the CPU at toy size"
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT / ".device",
        help="folder with Fashion-MNIST's four .gz files and two weight files (default: .device)",
    )  # fmt: skip
    parser.add_argument(
        "--onnxruntime", type=Path,
        help="folder with an unpacked onnxruntime-gpu wheel, the wheel, or its pieces "
        "onnxruntime-gpu.part.* "
        "(default: the folder of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--json",
        type=Path,
        help=f"file for the results (default: {RESULTS.relative_to(ROOT)}; none in a rehearsal)",
    )
    parser.add_argument(
        "--budget-factor", type=float, default=1.0, metavar="F",
        help="multiply the time of every part, on a slow machine or for more seeds (default: 1)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    parts = [part for part in given.parts.split(",") if part]
    if not given.budget_factor > 0:
        parser.error(f"--budget-factor {given.budget_factor:g} is not positive")
    unknown = [part for part in parts if part not in BUDGETS]
    if unknown or not parts:
        missing = ", ".join(unknown) or "(none given)"
        parser.error(f"--parts {given.parts}: there is no part {missing}; "
                     f"there are {', '.join(BUDGETS)}")  # fmt: skip
    json_file = given.json or (None if given.rehearse else RESULTS)
    if json_file and not json_file.parent.is_dir():
        parser.error(f"--json {json_file}: there is no folder {json_file.parent}")
    ordered = [part for part in BUDGETS if part in parts]
    return Options(
        ordered,
        given.rehearse,
        given.data,
        given.onnxruntime or given.data,
        json_file,
        given.budget_factor,
    )


# ---- the processes of the parts ------------------------------------------------------------------


def child(spec: dict[str, Any]) -> None:
    """Run one part, or what it makes ready, as ``spec`` says; raises what the part raises."""
    bring(spec["paths"])
    context = Context(
        spec["device"], spec["rehearse"], Path(spec["data"]), Path(spec["work"]),
        Path(spec["into"]),
        time.monotonic() + spec["seconds"],
    )  # fmt: skip
    module = importlib.import_module(f"gpu_parts.{spec['part']}")
    getattr(module, spec["function"])(context)


def bring(paths: list[str]) -> None:
    """Put folders before the installed packages, here and in processes that are started from
    here.
    """
    sys.path[1:1] = (
        paths  # after this file's folder, whose export.py is not the package of that name
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    )


class Process:
    """A part that runs in a process of its own; with all that it starts it can be ended at once."""

    def __init__(
        self,
        options: Options,
        part: str,
        function: str,
        seconds: float,
        work: Path,
        paths: list[str],
    ) -> None:
        self.into = work / f"{part}.{function}.json"
        self.log = work / f"{part}.{function}.log"
        self.begun = time.monotonic()
        self.seconds = seconds
        spec = {
            "part": part, "function": function, "device": options.device,
            "rehearse": options.rehearse,
            "data": str(options.data.resolve()), "work": str(work), "into": str(self.into),
            "seconds": seconds,
            "paths": paths,
        }  # fmt: skip
        command = [sys.executable, "-u", str(Path(__file__).resolve()), "--child", json.dumps(spec)]
        # the errors of a part, and all that one in the background prints, are read from files
        self._files = contextlib.ExitStack()
        errors = self._files.enter_context(self.log.open("wb"))
        shown = function == "measure"
        # threads that wait for each other lose most where a core is shared, as in a rehearsal on a
        # busy machine
        threads = (
            {"OMP_NUM_THREADS": "1"}
            if options.rehearse
            else {}
            if shown
            else {"OMP_NUM_THREADS": "2"}
        )
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=None if shown else errors, stderr=errors,
            start_new_session=True,
            env=os.environ | threads,
        )  # fmt: skip

    def wait(self, until: float | None = None) -> str:
        """Until it ends or its time is over; what went wrong, in one line, empty if nothing did.

        Args:
            until: of :func:`time.monotonic`, in place of the end of its seconds.
        """
        until = self.begun + self.seconds if until is None else until
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return f"stopped after {until - self.begun:.0f} s; what it had measured is kept"
        self._files.close()
        if code == 0:
            return ""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self._last_error() or 'no error message'} ({how})"

    def _last_error(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:400] if lines else ""

    def end(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._files.close()

    def results(self) -> dict[str, Any]:
        """What it kept."""
        found: dict[str, Any] = json.loads(self.into.read_text()) if self.into.exists() else {}
        return found


# ---- the run -------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """All parts; the exit code: 0 if every one that could run did, else 1."""
    begun = time.monotonic()
    bring([str(options.data.resolve() / SITE)])
    missing = machine.left_out(options.parts)
    files = machine.left_out_tests() if "checks" in options.parts else {}
    print(_first_line(missing | files), flush=True)
    found = machine.gpu()
    if not options.rehearse and "name" not in found:
        print(f"error: PyTorch {machine.installed('torch')} finds no GPU", file=sys.stderr)
        print(
            "tip: python benchmarks/gpu.py --rehearse runs the same code on the CPU, at toy size",
            file=sys.stderr,
        )
        return 2
    print(
        f"{found.get('name', 'CPU')}, CUDA {found.get('cuda')}, parts {', '.join(options.parts)}",
        flush=True,
    )
    content = _stored(options.json)
    about = {
        "gpu": found, "versions": machine.versions(), "commit": machine.commit(),
        "rehearsal": options.rehearse,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    failed = False
    until = begun + options.limit
    with (
        tempfile.TemporaryDirectory() as folder,
        _prepared(options, missing, Path(folder)) as preparing,
    ):
        for part in options.parts:
            result = (
                {"failed": missing[part]}
                if part in missing
                else _part(
                    options,
                    part,
                    min(options.budget(part), until - time.monotonic()),
                    Path(folder),
                    preparing,
                )
            )
            failed = failed or "failed" in result
            content["parts"][part] = about | result
            if options.json:
                write_json(options.json, content)
            print(
                f"{part}: {result.get('failed') or 'done'}, {result.get('seconds', 0):.0f} s\n",
                flush=True,
            )
    if options.json:
        print(f"results: {options.json}")
    return int(failed)


def _first_line(missing: dict[str, str]) -> str:
    if not missing:
        return "all packages are new enough"
    why: dict[str, list[str]] = {}
    for part, reason in missing.items():
        why.setdefault(reason, []).append(part)
    return "; ".join(f"{reason}: without {', '.join(parts)}" for reason, parts in why.items())


def _stored(path: Path | None) -> dict[str, Any]:
    """The file's content, to which parts are added."""
    if path is None or not path.exists():
        return {"format_version": FORMAT_VERSION, "parts": {}}
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format_version") != FORMAT_VERSION:
        raise SystemExit(
            f"error: {path} has format version {content.get('format_version')}; give another --json"
            " FILE"
        )
    return content


@contextlib.contextmanager
def _prepared(
    options: Options, missing: dict[str, str], work: Path
) -> Iterator[dict[str, Process]]:
    """What parts make ready, in the background; ended at the end of the run."""
    wanted = [part for part in PREPARED if part in options.parts and part not in missing]
    paths = _paths(options, wait=0.0)[0]
    made = {
        part: Process(options, part, "prepare", seconds=options.limit, work=work, paths=paths)
        for part in wanted
    }
    try:
        yield made
    finally:
        for process in made.values():
            process.end()


def _part(
    options: Options, part: str, budget: float, work: Path, preparing: dict[str, Process]
) -> dict[str, Any]:
    """Run a part to the end of its ``budget`` in seconds, in which it waits for what it makes
    ready.
    """
    print(f"== {part} (at most {budget:.0f} s)", flush=True)
    begun = time.monotonic()
    result: dict[str, Any] = {}
    paths, why = _paths(options, wait=budget / 3 if part == "runtime" else 0.0)
    if why:
        print(f"  {why}", flush=True)
        result["onnxruntime"] = why
    if part in preparing:
        ready = preparing[part]
        not_ready = ready.wait(until=begun + budget / 2)
        result["prepared in"] = round(time.monotonic() - ready.begun, 1)
        if not_ready:
            result["not prepared"] = not_ready
            print(f"  making it ready: {not_ready}", flush=True)
    process = Process(
        options, part, "measure", seconds=begun + budget - time.monotonic(), work=work, paths=paths
    )
    try:
        failure = process.wait()
    finally:
        process.end()
    result |= {"seconds": round(time.monotonic() - begun, 1), "budget": round(budget)}
    result["measured"] = process.results()
    if failure:
        print(process.log.read_text(errors="replace")[-3000:], file=sys.stderr)
        result["failed"] = failure
    return result


def _paths(options: Options, wait: float) -> tuple[list[str], str]:
    """Folders that go before the installed packages, and why an ONNX Runtime that was brought along
    is not among them.

    Args:
        options: the command line.
        wait: seconds for the last pieces of a wheel to arrive.
    """
    until = time.monotonic() + wait
    extra = [str(options.data.resolve() / SITE), str(ROOT)]
    while True:
        try:
            found = machine.onnxruntime_folder(options.onnxruntime)
        except machine.NotWhole as error:
            if time.monotonic() < until:
                time.sleep(1)
                continue
            return extra, str(error)
        return ([str(found.resolve())] if found else []) + extra, ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        # so that the parts end too
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        sys.exit(run(parse()))
