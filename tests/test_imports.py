"""Which part of the package may import what (CONTRIBUTING.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pathconvert

ROOT = Path(pathconvert.__file__).parent


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, those for type checking alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def importers(*modules: str) -> set[str]:
    """The parts of the package, a module or a subpackage each, that import one of ``modules``."""
    return {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in imported(path) for module in modules)
    }


def test_typer_and_rich_stay_at_the_command_line():
    assert importers("typer", "rich") <= {"cli.py", "commands"}


def test_onnx_stays_in_export():
    assert importers("onnx", "onnxruntime", "onnxscript") == {"export"}


def test_training_and_export_do_not_know_each_other():
    assert "training" not in importers("pathconvert.export")
    assert "export" not in importers("pathconvert.training")


def test_the_core_knows_no_command():
    assert importers("pathconvert.commands", "pathconvert.cli") <= {"cli.py", "commands"}
