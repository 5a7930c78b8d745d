"""How the commands print: results on stdout, notes and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderResult
    from rich.table import Table

#: Width, in characters, to which a column that may break anywhere can shrink.
FOLDED_WIDTH = 12


def note(message: str) -> None:
    """Print a note for people on stderr."""
    typer.echo(message, err=True)


@dataclass(frozen=True)
class Titled:
    """A table below its title.

    The title stays on one line even if the table is narrower (rich would wrap it).

    Attributes:
        title: printed in bold.
        table: its columns.
        foldable: indices of the columns that may break anywhere, such as file names; the others
            break at spaces, or not at all.
    """

    title: str
    table: Table
    foldable: tuple[int, ...] = ()

    def __rich_console__(self, *_: object) -> RenderResult:
        from rich.text import Text

        yield Text(self.title, style="bold", no_wrap=True, overflow="ignore")
        yield self.table

    def fits(self) -> bool:
        """Whether the terminal is wide enough for every cell to stay on one line."""
        console = _stdout()
        return (
            console.measure(self.table, options=console.options.update(width=10_000)).maximum
            <= console.width
        )

    def least_width(self) -> int:
        """The width in characters below which rich would cut off words and numbers."""
        console = _stdout()
        for i in self.foldable:
            self.table.columns[i].max_width = FOLDED_WIDTH
        least = console.measure(self.table, options=console.options.update(width=10_000)).minimum
        for i in self.foldable:
            self.table.columns[i].max_width = None
        return least


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def emit(result: dict[str, Any], table: Titled, as_json: bool) -> None:
    """Print the result on stdout, as a table or as one JSON object.

    If the terminal is too narrow for the table, its rows run over the edge: no number is cut off.
    """
    if as_json:
        # JSON has no Infinity: it becomes null.
        finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
        typer.echo(json.dumps(finite))
        return
    console = _stdout()
    console.width = max(console.width, table.least_width())
    console.print(table)


def facts(title: str, rows: Mapping[str, str]) -> Titled:
    """A table of two columns: names and their values."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return Titled(title, table, foldable=(1,))


def grid(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> Titled:
    """A table with a header.

    Args:
        title: printed above the table.
        columns: the columns' names → how their texts are set: ``right`` (numbers, never broken),
            ``left`` (broken at spaces if the terminal is too narrow) or ``wrap`` (broken anywhere).
        rows: for every row, one text per column.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    cells = [tuple(row) for row in rows]
    table = Table(box=box.SIMPLE)
    for i, (name, how) in enumerate(columns.items()):
        if how == "right":
            whole = max(cell_len(text) for text in (name, *(row[i] for row in cells)))
            table.add_column(name, justify="right", no_wrap=True, min_width=whole)
        else:
            table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    return Titled(title, table, tuple(i for i, how in enumerate(columns.values()) if how == "wrap"))


class Steps:
    """A progress bar over named steps, shown on stderr after two seconds.

    Args:
        total: number of steps.

    Attributes:
        seconds: the time that each step took, by name; ``total`` is the time of all of them.
    """

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("", total=total)
        self._timer = threading.Timer(2.0, self._progress.start)
        self._timer.daemon = True
        self._begun = time.perf_counter()
        self._done = 0
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar while the steps run, and measure the total time."""
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
        """Run one step. Its time is added to ``seconds`` under its name."""
        begun = time.perf_counter()
        self._progress.update(self._task, description=name)
        yield
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def part(self, done: int, total: int | None) -> None:
        """Report how much of the current step is done."""
        if total:
            self._progress.update(self._task, completed=self._done + done / total)

    def total(self) -> dict[str, str]:
        """A table row with the total time."""
        return {"time": f"{self.seconds['total']:.1f} s"}
