"""A run on a terminal that can redraw: arms and their stages as a tree, a bar for the run and one for each task under
way, and above them the lines that stay.

A module of its own because it needs rich, which only a terminal pays for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from .diagnostics import printable
from .progress import Ended, Ending, Place, duration, told_values
from .stage import Task

LABEL = 24  # columns of "arm/stage" in lines, at most
ARM = 18  # columns of an arm's name, at most
# Widths of label, bar, count and time, on terminals of at least so many columns: loss and top-1 behind them need 24.
COLUMNS = ((100, (18, 14, 11, 17)), (76, (14, 7, 9, 17)), (0, (8, 4, 9, 14)))
ECHO = 3  # columns that ^C takes behind the last line: were that full, all that is drawn would be one line off
BELOW = 6  # lines of the screen that the tree leaves to bars and to the lines above

State = Literal["waiting", "working"] | Ended
SIGNS: dict[State, tuple[str, str, str]] = {  # as it is drawn, where a terminal has no such signs, style
    "waiting": ("·", ".", "dim"),
    "working": ("▸", ">", "bold cyan"),
    "done": ("✓", "+", "green"),
    "cached": ("✓", "+", "dim green"),
    "failed": ("✗", "x", "bold red"),
    "stopped": ("■", "x", "yellow"),
}


class Bars:
    """The live part of the screen is gone when the run ends; the lines above it, one for each stage, note and warning,
    are what stays of it.
    """

    def __init__(self, stream: TextIO, *, colour: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream, no_color=not colour or None, highlight=False, markup=False, emoji=False)
        self._clock = clock
        self._bars = _bars(self._console)
        self._states: dict[Place, State] = {}
        self._expected: Mapping[Place, float | None] = {}
        self._total: TaskID | None = None
        self._at: tuple[int, Place] | None = None  # the stage that works now
        self._since = 0.0  # when it began
        self._warned: list[str] = []  # which stages
        self._live = Live(console=self._console, get_renderable=self.screen, transient=True)

    @contextmanager
    def run(self, places: Sequence[Place], expected: Mapping[Place, float | None]) -> Iterator[None]:
        self._states = dict.fromkeys(places, "waiting")
        self._expected = expected
        self._total = self._bars.add_task("stages", total=len(places), values="", run=self)
        with self._live:
            yield
        self._bars.remove_task(self._total)
        self._total = None

    def begin(self, number: int, place: Place) -> None:
        self._at, self._since = (number, place), self._clock()
        self._states[place] = "working"
        self._count(number - 1)

    def end(self, number: int, place: Place, ending: Ending) -> None:
        self._at = None
        self._states[place] = ending.state
        self._count(number)
        took = f"  {duration(ending.seconds)}" if ending.seconds else ""
        style = "" if ending.state in ("done", "cached") else SIGNS[ending.state][2]
        self._line((number, place), f"{ending.outcome}{took}", style)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        task = self._bars.add_task(printable(label), total=total, values="", run=None)
        self._live.refresh()
        try:
            yield _BarTask(self._bars, task)
        finally:
            self._bars.remove_task(task)

    def note(self, text: str) -> None:
        self._line(self._at, text)

    def warn(self, text: str) -> None:
        self._warned.append("/".join(self._at[1]) if self._at else "the run")
        self._line(self._at, f"warning: {text}", "yellow")

    def left(self) -> float | None:
        """Seconds until the run will have ended, as far as earlier runs tell; None where one of its stages is new."""
        seconds = 0.0
        for place, expected in self._expected.items():
            state = self._states.get(place)
            if state not in ("waiting", "working"):
                continue
            if expected is None:
                return None
            gone = self._clock() - self._since if state == "working" else 0.0
            seconds += max(0.0, expected - gone)
        return seconds

    def screen(self) -> RenderableType:
        """The live part: tree, warnings, bars."""
        parts: list[RenderableType] = [self._tree()]
        if self._warned:
            whose = ", ".join(dict.fromkeys(self._warned))
            count = len(self._warned)
            text = f"{count} warning{'s' * (count > 1)} above: {printable(whose)}"
            parts.append(Text(text, style="yellow", no_wrap=True, overflow="ellipsis"))
        return Constrain(Group(*parts, self._bars), self._console.width - ECHO)

    def _count(self, completed: int) -> None:
        if self._total is not None:
            self._bars.update(self._total, completed=completed)
            self._live.refresh()

    def _tree(self) -> Table:
        """An arm a row, its stages with their states; of many arms those around the one that is worked on."""
        arms: dict[str, list[Place]] = {}
        for place in self._states:
            arms.setdefault(place[0], []).append(place)
        width = min(ARM, max(map(len, arms), default=0))
        tree = Table.grid(padding=(0, 2, 0, 0))
        tree.add_column(no_wrap=True, width=width)
        tree.add_column()
        room = max(1, self._console.height - BELOW)
        rows = [(arm, self._entries(places, self._console.width - width - 2)) for arm, places in arms.items()]
        first, last = _window([text.plain.count("\n") + 1 for _, text in rows], self._row(list(arms)), room)
        if first:
            tree.add_row("", Text(f"{first} arms before", style="dim"))
        for arm, text in rows[first:last]:
            tree.add_row(Text(printable(arm), overflow="ellipsis"), text)
        if last < len(rows):
            tree.add_row("", Text(f"{len(rows) - last} arms after", style="dim"))
        return tree

    def _row(self, arms: Sequence[str]) -> int:
        """The arm that is worked on, or else the first that waits."""
        waiting = [place for place, state in self._states.items() if state == "waiting"]
        place = self._at[1] if self._at else waiting[0] if waiting else None
        return arms.index(place[0]) if place else max(0, len(arms) - 1)

    def _entries(self, places: Sequence[Place], width: int) -> Text:
        """The stages of an arm in lines of so many columns, none broken."""
        text, column = Text(), 0
        for place in places:
            sign, plain, style = SIGNS[self._states[place]]
            shown = f"{sign if self._writes(sign) else plain} {printable(place[1])}"
            if column and column + 2 + len(shown) > width:
                text.append("\n")
                column = 0
            text.append("  " if column else "")
            text.append(shown, style)
            column += len(shown) + (2 if column else 0)
        return text

    def _writes(self, sign: str) -> bool:
        try:
            sign.encode(self._console.encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def _line(self, at: tuple[int, Place] | None, text: str, style: str = "") -> None:
        """A line that stays, under the stage that it is about; a long one goes on below its beginning."""
        words = Text(printable(text), style=style)
        if at is None:  # before the first stage
            self._console.print(words)
            return
        number, place = at
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True, min_width=len(f"{len(self._states)}") + 4)
        row.add_column(no_wrap=True, min_width=min(LABEL, max(len("/".join(each)) for each in self._states)))
        row.add_column(overflow="fold")
        row.add_row(Text(f"{number:>3}/{len(self._states)}"), Text(printable("/".join(place))), words)
        self._console.print(row)


def _window(heights: Sequence[int], at: int, room: int) -> tuple[int, int]:
    """[first, last) of the rows around row `at` that fit into so many lines, two of them kept for what is left out."""
    if sum(heights) <= room or not heights:
        return 0, len(heights)
    first, last, taken = at, at + 1, heights[at]
    while True:
        if last < len(heights) and taken + heights[last] <= room - 2:
            taken, last = taken + heights[last], last + 1
        elif first > 0 and taken + heights[first - 1] <= room - 2:
            taken, first = taken + heights[first - 1], first - 1
        else:
            return first, last


def _bars(console: Console) -> Progress:
    """Columns have fixed widths, so that nothing jumps between tasks."""
    label, bar, count, time_ = next(columns for least, columns in COLUMNS if console.width >= least)
    values = max(1, console.width - ECHO - label - bar - count - time_ - 4)  # one between each two

    def fixed(width: int, justify: Literal["left", "right"] = "left") -> Column:
        return Column(width=width, no_wrap=True, overflow="ellipsis", justify=justify)

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=fixed(label)),
        BarColumn(bar_width=bar, table_column=fixed(bar)),
        _Count(table_column=fixed(count, "right")),
        _Time(table_column=fixed(time_, "right")),
        TextColumn(
            "{task.fields[values]}",
            markup=False,
            table_column=Column(max_width=values, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        auto_refresh=False,  # it is a part of the screen that is drawn
    )


class _Count(ProgressColumn):
    """67/152"""

    def render(self, task: RichTask) -> Text:
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f}", style="progress.download")


class _Time(ProgressColumn):
    """What is left of a task, or of the run where earlier ones tell it; what it has taken where that is not known."""

    def render(self, task: RichTask) -> Text:
        run: Bars | None = task.fields["run"]
        left = run.left() if run is not None else task.time_remaining if task.completed else None
        about = "~" if run is not None else ""
        shown = f"{about}{duration(left)} left" if left else duration(task.elapsed or 0.0)
        return Text(shown, style="progress.remaining")


class _BarTask:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._values: dict[str, float] = {}

    def advance(self, steps: int = 1, **values: float) -> None:
        self._values.update(values)
        self._bars.update(self._task, advance=steps, values=told_values(self._values))
