"""The tests marked ``gpu`` and ``device``: what has to hold on a GPU as it does on the CPU.

Figures that tests measure (the fixture ``measured`` of tests/test_devices.py) are kept by test.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gpu_parts import machine
from gpu_parts.context import Context

ROOT = Path(__file__).resolve().parents[2]
MARKS = re.compile(r"mark\.(gpu|device)\b|\binstantiate_device_type_tests\(")


class Collector:
    """Notes the outcome of every test, one after the other."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.passed = 0
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported, where a package is missing."""
        if report.failed:
            self.failed[report.nodeid] = _last_line(report.longreprtext)
            self._keep()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's set-up, call or tear-down."""
        name = report.nodeid.removeprefix("tests/")
        if report.failed:
            self.failed[name] = _last_line(report.longreprtext)
        elif report.skipped:
            self.skipped[name] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            ).removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed += 1
        if report.when == "call":
            self.seconds[name] = round(report.duration, 2)
            if report.user_properties:
                self.figures[name] = dict(report.user_properties)
        self._keep()

    def _keep(self) -> None:
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:10]
        for name, value in (
            ("passed", self.passed), ("failed", self.failed), ("skipped", self.skipped),
            ("figures", self.figures),
            ("slowest, seconds", dict(slowest)),
        ):  # fmt: skip
            self.context.results[name] = value
        self.context.keep("passed", self.passed)


def _last_line(text: str) -> str:
    """pytest's own summary of a failure: the last line that begins with E, else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["no message"])[0][:300]


def measure(context: Context) -> None:
    """Run them; raises AssertionError where one failed."""
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if MARKS.search(path.read_text())
    ]
    without = machine.left_out_tests()
    context.keep("left out", without)
    files = [path for path in files if path.name not in without]
    files.sort(key=lambda path: path.name != "test_devices.py")  # the most telling first
    processes: list[str] = []
    if not context.rehearse and importlib.util.find_spec("xdist"):
        processes = [
            "--numprocesses",
            str(min(4, (os.cpu_count() or 2) // 2)),
            "--dist",
            "worksteal",
        ]
    options: list[Any] = [
        "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore",
        "--continue-on-collection-errors",
        "-m", context.size("gpu or device", "device"), *processes,
    ]  # fmt: skip
    if context.rehearse:  # test by test they run in the suite already
        options += ["-k", "twenty_steps or autocast or pinned or resumed or synchronised"]
    collector = Collector(context)
    code = pytest.main(["--rootdir", str(ROOT), *options, *map(str, files)], plugins=[collector])
    shown = (
        f"{collector.passed} passed, {len(collector.failed)} failed, {len(collector.skipped)}"
        " skipped"
    )
    print(shown)
    for name, why in collector.failed.items():
        print(f"  FAILED {name}: {why}")
    for why in dict.fromkeys(collector.skipped.values()):
        count = list(collector.skipped.values()).count(why)
        print(f"  {count} skipped: {why}")
    if collector.failed or code or not collector.passed:
        raise AssertionError(f"pytest ended with code {int(code)}: {shown}")
