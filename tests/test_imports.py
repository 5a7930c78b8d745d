"""Which part of the package may import what (CONTRIBUTING.md), counting imports inside functions
too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pathconvert

PACKAGE = Path(pathconvert.__file__).parent
ROOT = PACKAGE.parent
BASE = {"choices", "errors", "formats", "version"}
#: Every part, and the parts that it may import: downwards only.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "formats": {"errors", "version"},
    "choices": {"errors"},
    "__init__": {*BASE, "conversion", "path_bn", "networks", "export"},
    "conversion": BASE,
    "path_bn": {*BASE, "conversion"},
    "files": BASE,
    "networks": {*BASE, "conversion", "path_bn", "files"},
    "training.settings": BASE,
    "training.optimizer": {*BASE, "conversion", "path_bn", "training.settings"},
    "training.data": {*BASE, "networks", "training.settings"},
    "training.run": {
        *BASE, "conversion", "path_bn", "files", "networks", "training.settings",
        "training.optimizer", "training.data",
    },
    "training.__init__": {"training.optimizer"},
    "export.card": {*BASE, "networks"},
    "export.runtime": {*BASE, "conversion", "files", "networks", "export.card"},
    "export.graph": {*BASE, "conversion", "path_bn", "files", "networks", "export.card",
        "export.runtime"},
    "export.__init__": {"export.graph", "export.card", "networks"},
    "commands": {*BASE, "conversion", "path_bn", "files", "networks", "training", "export"},
    "cli": {*BASE, "commands"},
    "__main__": {"cli"},
}  # fmt: skip
#: Parts that are told apart by their second name.
DIVIDED = ("training", "export")


def modules() -> dict[str, Path]:
    """Dotted name → file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it.

    Not those for type checking alone.
    """
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module or ""


def part_of(name: str) -> str:
    """``pathconvert.training.data.images`` → ``training.data``."""
    names = name.split(".")[1:] or ["__init__"]
    if names[0] not in DIVIDED:
        return names[0]
    return ".".join([*names, "__init__"][:2])


def importers(*wanted: str) -> set[str]:
    """The parts that import one of ``wanted`` or of their modules."""
    return {
        part_of(name)
        for name in MODULES
        if any(
            one == module or one.startswith(f"{module}.")
            for one in imported(name)
            for module in wanted
        )
    }


@pytest.mark.parametrize("part", sorted({part_of(name) for name in MODULES}))
def test_imports_run_downwards(part: str) -> None:
    own = [name for name in MODULES if part_of(name) == part]
    used = {
        part_of(one) for name in own for one in imported(name) if one.split(".")[0] == "pathconvert"
    } - {part}
    allowed = MAY_IMPORT[part] | {f"{one}.__init__" for one in MAY_IMPORT[part]}
    odd = {one for one in used if one not in allowed and one.split(".")[0] not in MAY_IMPORT[part]}
    assert not odd, f"{part} imports {', '.join(sorted(odd))}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {one for one in imported(name) if one in MODULES} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_typer_and_rich_stay_at_the_command_line() -> None:
    assert importers("typer", "rich") <= {"cli", "commands"}


def test_onnx_stays_in_export() -> None:
    users = importers("onnx", "onnx_ir", "onnxruntime", "onnxscript")
    assert {part.split(".")[0] for part in users} == {"export"}


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, pathconvert, pathconvert.training, pathconvert.export; assert 'torch' not in"
        " sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("link", ["training", "export"])
def test_a_link_at_the_root_is_no_second_package(link: str) -> None:
    """``import training`` from the checkout would make a second GSGD class, which no isinstance
    knows.
    """
    command = [sys.executable, "-c", f"import {link}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == f"ImportError: import it as pathconvert.{link}, not as {link}"
    )
