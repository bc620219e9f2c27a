"""Progress on a terminal that can redraw: a bar for the run, one for each task under way, and lines that stay above.

A module of its own because it needs rich, which only a terminal pays for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from .diagnostics import printable
from .progress import duration, told_values
from .stage import Task

LABEL = 24  # columns of "arm/stage", in lines and above the bars


class Bars:
    """One bar for the stages, one for each task. Columns have fixed widths, so that nothing jumps between tasks."""

    def __init__(self, stream: TextIO, *, colour: bool = True) -> None:
        self._console = Console(file=stream, no_color=not colour or None, highlight=False, markup=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(width=18, no_wrap=True)),
            BarColumn(bar_width=14),
            _Count(table_column=Column(min_width=11, no_wrap=True, justify="right")),
            _Time(table_column=Column(width=15, no_wrap=True, justify="right")),
            TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
        )
        self._total: TaskID | None = None
        self._stages = 0
        self._at: tuple[int, str] | None = None  # the stage that works now

    @contextmanager
    def run(self, stages: int) -> Iterator[None]:
        self._stages = stages
        self._total = self._bars.add_task("stages", total=stages, values="", timed=False)
        with self._bars:
            yield
        self._bars.remove_task(self._total)
        self._total = None

    def begin(self, number: int, label: str) -> None:
        self._at = number, label
        if self._total is not None:
            self._bars.update(self._total, completed=number - 1, values=printable(label))

    def end(self, number: int, label: str, outcome: str, seconds: float) -> None:
        self._at = None
        if self._total is not None:
            self._bars.update(self._total, completed=number, values="")
        took = f"  {duration(seconds)}" if seconds else ""
        self._line((number, label), f"{outcome}{took}")

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        task = self._bars.add_task(printable(label), total=total, values="", timed=True)
        try:
            yield _BarTask(self._bars, task)
        finally:
            self._bars.remove_task(task)

    def note(self, text: str) -> None:
        self._line(self._at, text)

    def warn(self, text: str) -> None:
        self._line(self._at, f"warning: {text}", "yellow")

    def _line(self, at: tuple[int, str] | None, text: str, style: str = "") -> None:
        """A line that stays, under the stage that it is about; a long one goes on below its beginning."""
        words = Text(printable(text), style=style)
        if at is None:  # before the first stage
            self._console.print(words)
            return
        number, label = at
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True, min_width=len(f"{self._stages}") + 4)
        row.add_column(no_wrap=True, min_width=LABEL)
        row.add_column(overflow="fold")
        row.add_row(Text(f"{number:>3}/{self._stages}"), Text(printable(label)), words)
        self._console.print(row)


class _Count(ProgressColumn):
    """67/152"""

    def render(self, task: RichTask) -> Text:
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f}", style="progress.download")


class _Time(ProgressColumn):
    """What is left of a task; where that is not known, what it has taken. Stages are too unlike to foretell the run."""

    def render(self, task: RichTask) -> Text:
        left = task.time_remaining if task.fields["timed"] and task.completed else None
        return Text(f"{duration(left)} left" if left else duration(task.elapsed or 0.0), style="progress.remaining")


class _BarTask:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._values: dict[str, float] = {}

    def advance(self, steps: int = 1, **values: float) -> None:
        self._values.update(values)
        self._bars.update(self._task, advance=steps, values=told_values(self._values))
