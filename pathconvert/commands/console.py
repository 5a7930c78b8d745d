"""What the commands print: results on stdout, remarks and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table


def note(message: str) -> None:
    """A remark for people: stderr."""
    typer.echo(message, err=True)


def emit(result: dict[str, Any], table: Table, as_json: bool) -> None:
    """The result: a table on stdout, or one JSON object instead."""
    if as_json:
        finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no Infinity
        typer.echo(json.dumps(finite))
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(table)


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """A table of names and what is to be said of each."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False, box=box.SIMPLE, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def grid(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> Table:
    """A table with a header.

    Args:
        title: above it.
        columns: their names, and how each stands: ``right`` (numbers), ``left``, or ``wrap``, which gives way where
            the terminal is too narrow.
        rows: a text for every column.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=escape(title), title_justify="left", title_style="bold")
    for name, how in columns.items():
        justify: Literal["left", "right"] = "right" if how == "right" else "left"
        table.add_column(name, justify=justify, no_wrap=how != "wrap", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def fits(table: Table) -> bool:
    """Whether no column of ``table`` has to give way."""
    from rich.console import Console

    console = Console()
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


class Steps:
    """Progress over named steps, shown on stderr once they have taken two seconds."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total)
        self._timer = threading.Timer(2.0, self._progress.start)
        self._timer.daemon = True
        self._begun = time.perf_counter()
        self._done = 0
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The bar, while the steps run."""
        self._timer.start()
        try:
            yield
        finally:
            self._timer.cancel()
            if self._progress.live.is_started:
                self._progress.stop()
            self.seconds["total"] = time.perf_counter() - self._begun

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One of them; its seconds add up under its name."""
        begun = time.perf_counter()
        self._progress.update(self._task, description=name)
        yield
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def part(self, done: int, total: int | None) -> None:
        """How far the step is that runs now."""
        if total:
            self._progress.update(self._task, completed=self._done + done / total)

    def total(self) -> dict[str, str]:
        """A row with the seconds of all."""
        return {"time": f"{self.seconds['total']:.1f} s"}
