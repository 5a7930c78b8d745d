"""What the machine has: versions beside those that pathconvert needs, the GPU, an ONNX Runtime that
was brought.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import sys_tags

ROOT = Path(__file__).resolve().parents[2]
PIECES = "onnxruntime-gpu.part.*"
UNPACKED = "onnxruntime-gpu"
#: Packages that hold the same modules under another name.
ALSO = {"onnxruntime-gpu": ("onnxruntime",), "lightning-fabric": ("pytorch-lightning", "lightning")}
#: Parts that do without a package; without any other, none runs.
NEEDED_BY = {
    "onnx": ("checks", "runtime"),
    "onnxscript": ("checks", "runtime"),
    "onnxruntime-gpu": ("checks", "runtime"),
    "pytest": ("checks",),
    "lightning-fabric": ("checks",),
    "torchmetrics": ("checks",),
    "tensorboard": ("checks",),
    "matplotlib": ("checks",),
    "pyyaml": ("checks",),
    "typer": ("checks",),
}

#: Packages that one file of tests needs.
NEEDED_BY_TESTS = {"expecttest": "test_gsgd_torch.py"}


# ---- versions ------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """Those of pyproject.toml that hold on this machine, and pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], "pytest")]
    return [one for one in wanted if one.marker is None or one.marker.evaluate()]


def installed(name: str) -> str | None:
    """The version of a package, or of one that holds the same modules.

    None where there is neither.
    """
    for candidate in (name, *ALSO.get(name, ())):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unfit() -> dict[str, str]:
    """Package → what is wrong with it, empty where all is well."""
    found = {}
    for one in requirements():
        version = installed(one.name)
        if version is None:
            found[one.name] = f"{one.name} is not installed"
        elif not one.specifier.contains(version, prereleases=True):
            found[one.name] = f"{one.name} {version} is too old: pathconvert needs {one.specifier}"
    return found


def left_out(parts: list[str]) -> dict[str, str]:
    """Part → the package that keeps it from running."""
    found: dict[str, str] = {}
    for name, why in unfit().items():
        for part in NEEDED_BY.get(name, parts):
            if part in parts:
                found.setdefault(part, why)
    return found


def left_out_tests() -> dict[str, str]:
    """File of tests → the package that it lacks."""
    absent = {
        package: file for package, file in NEEDED_BY_TESTS.items() if installed(package) is None
    }
    return {file: f"{package} is not installed" for package, file in absent.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of every required package that is installed."""
    found = {one.name: installed(one.name) for one in requirements()}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v}


def gpu() -> dict[str, Any]:
    """Name, memory and driver of the GPU, as PyTorch and the driver say.

    In a process of its own.
    """
    code = (
        "import json, torch\nfound = {'cuda': torch.version.cuda, 'cudnn':"
        " torch.backends.cudnn.version()}\nif torch.cuda.is_available():\n    p ="
        " torch.cuda.get_device_properties(0)\n    found |= {'name': p.name, 'GiB':"
        " round(p.total_memory / 2**30, 1), 'capability':"
        " f'{p.major}.{p.minor}'}\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return {
            "error": (
                done.stderr.strip().splitlines()[-1]
                if done.stderr.strip()
                else "torch cannot be imported"
            )
        }
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        found["driver"] = answer[0] if answer else None
    return found


def commit() -> str:
    """The code's commit; the folder may be a copy without history."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---- an ONNX Runtime that was brought along ------------------------------------------------------


class NotWhole(Exception):
    """Pieces of a wheel that do not make one, or a wheel that is not for this Python."""


def onnxruntime_folder(folder: Path) -> Path | None:
    """The folder to put before the installed packages, or None where ``folder`` brings no ONNX
    Runtime.

    ``folder`` may be an unpacked wheel, or hold one, or hold ``onnxruntime_gpu-*.whl``, or its
    pieces ``onnxruntime-gpu.part.*``, which are joined in the order of their names. A wheel is
    unpacked beside them, once.

    Raises:
        NotWhole: pieces are missing or damaged, or the wheel is not for this Python.
    """
    for found in (folder, folder / UNPACKED):
        if (found / "onnxruntime" / "__init__.py").is_file():
            for tags in found.glob("onnxruntime_gpu-*.dist-info/WHEEL"):
                _require_this_python(tags.read_text())
            return found
    wheels = sorted(folder.glob("onnxruntime_gpu-*.whl"))
    pieces = sorted(folder.glob(PIECES))
    if not wheels and not pieces:
        return None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = wheels[0] if wheels else _joined(pieces, Path(temporary) / "joined.whl")
        _unpack(wheel, Path(temporary) / UNPACKED)
        (Path(temporary) / UNPACKED).replace(folder / UNPACKED)
    return folder / UNPACKED


def _joined(pieces: list[Path], into: Path) -> Path:
    with into.open("wb") as file:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)
    return into


def _unpack(wheel: Path, into: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
            _require_this_python(archive.read(tags).decode())
            archive.extractall(into)  # checks every file's CRC
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise NotWhole(
            f"the pieces in {wheel.parent.parent} do not make a whole wheel (yet?): {error}"
        ) from error


def _require_this_python(wheel: str) -> None:
    """Refuse a wheel for another Python or system.

    Args:
        wheel: the text of its file WHEEL.

    Raises:
        NotWhole: none of its tags is this Python's.
    """
    kinds = re.findall(r"^Tag: (\S+)", wheel, re.MULTILINE)
    if not {str(tag) for tag in sys_tags()} & set(kinds):
        raise NotWhole(
            f"the wheel is for {', '.join(kinds)}, which Python {platform.python_version()} is not"
        )
