"""The report of a sweep: its trials as one table and one picture, in HTML and Markdown, beside the reports of the runs.

Self-contained and escaped as the report of a run is, whose style and script it shares. It is written anew after each
trial, so it can be read while the sweep goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commit import Disk
from ..manifest import as_text
from ..objectives import HIGHER, Estimate, front
from ..search_space import overrides
from ..sweep import REPORTED, reported
from . import numbers
from .numbers import Format, interval
from .pictures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Scale, frame
from .templating import digest, environment, read, tidy

if TYPE_CHECKING:
    from ..store import Store
    from ..sweep import Sweep

TITLES = {"top1": "Top-1", "speedup": "Speed-up", "bytes": "Size", "macs": "MACs", "parameters": "Parameters"}
FORMS: dict[str, Format] = {
    "top1": numbers.percent,
    "speedup": numbers.ratio,
    "bytes": numbers.size,
    "macs": numbers.big,
    "parameters": numbers.big,
}


def document_of(sweep: Sweep) -> dict[str, Any]:
    """What is known of a sweep now, as --json prints it and both pages tell it."""
    trials = sweep.trials()
    done = [trial for trial in trials if trial.state == "done"]
    estimates = [{name: Estimate(**found) for name, found in trial.values.items()} for trial in done]
    best = {trial.number for trial, on_it in zip(done, front(estimates), strict=True) if on_it}
    objectives = sweep.question.objectives
    document = {
        "sweep": sweep.id,
        "started": sweep.started,
        **sweep.question.as_json(),
        "state_says": _state(trials, sweep.question.grid, sweep.question.trials),
        "front_says": _front_sentence(objectives, len(done) - len(best)),
        "trials": [{**asdict(trial), "front": trial.number in best} for trial in trials],
    }
    return _with_collected(document, sweep.store)


def _with_collected(document: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """The document with a mark at every trial whose run gc has removed."""
    trials = [
        {**trial, "collected": trial["run"] is not None and not (store.runs / trial["run"]).is_dir()}
        for trial in document["trials"]
    ]
    return {**document, "trials": trials}


def _state(trials: Sequence[Any], grid: bool, asked: int) -> str:
    """9 trials: 7 done, 1 failed, 1 waiting"""
    counts = {state: sum(t.state == state for t in trials) for state in ("done", "failed", "running", "waiting")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    missing = 0 if grid else max(0, asked - len(trials))
    more = f"{', ' if told else ''}{missing} to be chosen" if missing else ""
    return f"{len(trials) + missing} trials: {told}{more}"


def _front_sentence(objectives: Sequence[str], others: int) -> str:
    """others: trials that are not on it."""
    if len(objectives) == 1:
        way = "greatest" if HIGHER[objectives[0]] else "least"
        name = TITLES[objectives[0]]
        return f"the {way} {name}, and what its interval cannot tell from it"
    if not others:
        return "the Pareto front, with every trial: none is worse than another beyond the intervals"
    return (
        "the Pareto front: to each of the others one of these is better in an objective and worse in none, beyond the "
        "intervals"
    )


def write(document: Mapping[str, Any], folder: Path, store: Store) -> tuple[Path, Path]:
    """Write report.html and report.md into the sweep's folder, and what they tell as JSON, each complete or not at all;
    the paths of both pages.
    """
    pages = {"report.html": _html(document, folder, store).encode(), "report.md": _markdown(document).encode()}
    for name, page in {**pages, REPORTED: as_text(document)}.items():
        Disk().replace(folder / name, page)
    return folder / "report.html", folder / "report.md"


def write_again(store: Store) -> None:
    """The pages of the sweeps that do not say yet which of their runs gc has removed."""
    for folder, told in reported(store):
        now = _with_collected(told, store)
        if now != told:
            write(now, folder, store)


def _html(document: Mapping[str, Any], folder: Path, store: Store) -> str:
    from markupsafe import Markup

    script = read("tables.js")
    page = environment(autoescape=True).get_template("sweep.html.j2")
    return page.render(
        _words(document),
        drawn=Markup(draw_front(document)),  # our own SVG, its text escaped
        links=_links(document, folder, store),
        style=Markup(read("report.css")),
        script=Markup(script),
        script_digest=digest(script),
    )


def _links(document: Mapping[str, Any], folder: Path, store: Store) -> dict[str, str]:
    """Run -> the way to its report."""
    runs = {trial["run"] for trial in document["trials"] if trial["run"] is not None}
    pages = {run: store.runs / run / "report.html" for run in runs}
    return {run: os.path.relpath(page, folder) for run, page in pages.items() if page.exists()}


def _markdown(document: Mapping[str, Any]) -> str:
    return tidy(environment(autoescape=False).get_template("sweep.md.j2").render(_words(document)))


def _words(document: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates are given."""
    trials = document["trials"]
    return {
        "sweep": document,
        "front": [trial for trial in trials if trial["front"]],
        "fields": list(document["space"]),
        "titles": [
            (name, TITLES[name], "more is better" if HIGHER[name] else "less is better")
            for name in document["objectives"]
        ],
        "told": told,
        "within": within,
        "command": _command(document),
        "setting": lambda trial, field: overrides({field: trial["settings"][field]})[0].partition("=")[2],
        "noise": noise(document["objectives"]),
    }


def told(trial: Mapping[str, Any], name: str) -> str:
    """The value of an objective, a dash where there is none."""
    found = trial["values"].get(name)
    return FORMS[name](found["value"] if found else None)


def within(trial: Mapping[str, Any], name: str) -> str:
    """Its interval; "" of an exact one."""
    found = trial["values"].get(name)
    return interval(found["low"], found["high"], FORMS[name]) if found and found["low"] < found["high"] else ""


def estimate(trial: Mapping[str, Any], name: str) -> str:
    """Both, the interval in brackets."""
    span = within(trial, name)
    return f"{told(trial, name)}{f' ({span})' if span else ''}"


def noise(objectives: Sequence[str]) -> list[str]:
    """What the numbers can and cannot tell."""
    words = [
        "One trial is better than another where their intervals do not meet. A difference inside the noise is none."
    ]
    if "top1" in objectives:
        words.append(
            "Top-1 is of the test split with its 95% interval; all trials see the same images, so a paired "
            "test (sievit compare) can tell files apart that these intervals do not. The best of many trials on one "
            "test split is a little worse on new images."
        )
    if "speedup" in objectives:
        words.append(
            "Speed-up is over the baseline measured in the same run, its interval over sessions widened by what the "
            "baseline showed against itself (A/A). Runs of different hours on a shared host can differ by more: time "
            "the files that matter once more, side by side (sievit benchmark --onnx A --onnx B)."
        )
    return words


def _command(document: Mapping[str, Any]) -> str:
    """The command line again. A database is not named: its URL may hold a password."""
    import shlex

    option = "--grid" if document["kind"] == "grid" else "--search"
    words = ["sievit", "sweep", document["path"]]
    for field, tried in document["space"].items():
        words += [option, f"{field}={_values(tried)}"]
    for name in document["objectives"]:
        words += ["--objective", name]
    if document["kind"] == "search":
        words += ["--seed", str(document["seed"])]
    for text in document["overrides"]:
        words += ["--set", text]
    return shlex.join(words)


def _values(tried: Any) -> str:
    if isinstance(tried, Mapping):
        return f"{tried['low']}..{tried['high']}{':log' if tried['log'] else ''}"
    return ",".join(overrides({"": value})[0].removeprefix("=") for value in tried)


# ---- the picture


def draw_front(document: Mapping[str, Any]) -> str:
    """SVG of the first objective against the second, or against the number of the trial when there is one; "" when no
    trial has ended well. A point carries its trial's number; its settings and numbers are its <title>.
    """
    done = [trial for trial in document["trials"] if trial["state"] == "done"]
    if not done:
        return ""
    up_name, *others = document["objectives"]
    across_name = others[0] if others else None

    def place(trial: Mapping[str, Any], name: str | None) -> tuple[float, float, float]:
        if name is None:
            return (trial["number"],) * 3
        found = trial["values"][name]
        return found["low"], found["value"], found["high"]

    across = _axis([place(trial, across_name) for trial in done], LEFT, WIDTH - RIGHT)
    up = _axis([place(trial, up_name) for trial in done], HEIGHT - BOTTOM, TOP)
    sideways = (TITLES[across_name], FORMS[across_name]) if across_name else ("Trial", lambda number: f"{number:g}")
    parts = frame(Scale(across, *sideways), Scale(up, TITLES[up_name], FORMS[up_name]))
    for trial in sorted(done, key=lambda one: one["front"]):  # the front lies on top
        parts.append(_point(trial, place(trial, across_name), place(trial, up_name), across, up))
    label = f"{TITLES[up_name]} against {TITLES[across_name] if across_name else 'the trial'}, one point a trial. "
    label += "The same numbers stand in the table of trials."
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axis(spans: Sequence[tuple[float, float, float]], start: float, end: float) -> Axis:
    """With room around the points, and some length where they are all alike."""
    low, high = min(span[0] for span in spans), max(span[2] for span in spans)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - pad, high + pad, start, end)


def _point(
    trial: Mapping[str, Any],
    x: tuple[float, float, float],
    y: tuple[float, float, float],
    across: Axis,
    up: Axis,
) -> str:
    at_x, at_y = across(x[1]), up(y[1])
    whiskers = [
        f'<line class="whisker" x1="{across(x[0]):.1f}" y1="{at_y:.1f}" x2="{across(x[2]):.1f}" y2="{at_y:.1f}"/>',
        f'<line class="whisker" x1="{at_x:.1f}" y1="{up(y[0]):.1f}" x2="{at_x:.1f}" y2="{up(y[2]):.1f}"/>',
    ]
    says = f"trial {trial['number']}: {', '.join(overrides(trial['settings']))}; " + ", ".join(
        f"{TITLES[name]} {estimate(trial, name)}" for name in trial["values"]
    )
    return (
        f'<g class="point trial {"shipped" if trial["front"] else "other"}"><title>{escape(says)}</title>'
        f"{''.join(whiskers)}"
        f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="11"/>'
        f'<text class="number" x="{at_x:.1f}" y="{at_y + 4:.1f}" text-anchor="middle">{trial["number"]}</text></g>'
    )
