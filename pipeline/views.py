"""How what a command made is drawn for a person: plans, runs, stages, measurements. Readable in 80 columns.

Each takes the very document that --json prints and returns something that rich can print; none of them computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .console import Document
from .drawing import fields, line, table, two_lines, whole_path
from .report.numbers import (
    DASH,
    Format,
    big,
    duration,
    interval,
    percent,
    points,
    ratio,
    significant,
    size,
)
from .report.sections import sections

STATES = {
    "cached": "dim",
    "shared": "dim",
    "done": "green",
    "run": "bold cyan",
    "unknown": "yellow",
    "waiting": "yellow",
    "failed": "bold red",
}
TO_RUN = {"run", "unknown"}  # the states that take time
MOST = 4  # reasons of a stage that a plan shows


def plan(document: Document) -> RenderableType:
    rows = [
        (
            each["arm"],
            each["entry"],
            state(each["state"]),
            _about(each["expected_seconds"], each["state"]),
            _why(each, forecasts=document["expected_seconds"] is not None),
        )
        for each in document["stages"]
    ]
    to_run = any(each["state"] in TO_RUN for each in document["stages"])
    unseen = to_run and not document["checked"]
    return Group(
        table("arm", "stage", "state", "about", "why", rows=rows, right={"about"}, whole={"arm", "stage", "state"}),
        Text(""),
        line(_closing(document)),
        *([line("images, network, device and providers not looked at: `sievit plan --check`")] if unseen else []),
        *(line(f"warning: {warning}", "bold yellow") for warning in document["warnings"]),
        *(line(f"note: {note}") for note in document["notes"]),
    )


def _closing(document: Document) -> str:
    """9 of 17 stages to run, about 3 min 20 s for 7 of them, about 2.1 MB of the 52 GB free"""
    stages, unknown = document["stages"], document["without_forecast"]
    count = sum(each["state"] in TO_RUN for each in stages)
    if not count:
        return f"nothing to do: {len(stages)} stages cached"
    closing = f"{count} of {len(stages)} stages to run"
    if document["expected_seconds"] is None:
        return f"{closing}; no minutes: nothing {'like them ' if document['has_run'] else ''}has run here yet"
    known = f" for {count - unknown} of them" if unknown else ""
    closing += f", about {duration(document['expected_seconds'])}{known}"
    closing += f", about {size(document['expected_bytes'])} of the {size(document['free_bytes'])} free"
    return closing + (f"; nothing like the other {unknown} has run here yet" if unknown else "")


def _about(seconds: float | None, status: str) -> str:
    return duration(seconds) if seconds is not None and status in TO_RUN else ""


def _why(stage: Document, *, forecasts: bool) -> str:
    """forecasts: whether any stage has one; where none has, that is said once, below."""
    if stage["state"] == "cached":
        return str(stage["ref"])
    if stage["state"] == "shared":
        return f"same as in arm {stage['shared_with']}"
    told = [f"when {stage['waits_for']} has run"] if stage["state"] == "unknown" else []
    if not told and stage["compared_to"] is None:
        told.append("nothing like it in the store")
    told += [each["says"] for each in stage["reasons"][:MOST]]
    if len(stage["reasons"]) > MOST:
        told.append(f"and {len(stage['reasons']) - MOST} more: sievit explain {stage['arm']}/{stage['entry']}")
    if stage["resumes"] is not None:
        told.append(stage["resumes"]["says"])
    if stage["expected_says"]:
        told.append(stage["expected_says"])
    elif forecasts:
        told.append("no run like it yet")
    return "\n".join(told)


def state(name: str) -> Text:
    return Text(name, style=STATES.get(name, ""))


def outcome(document: Document) -> RenderableType:
    """The end of `sievit run`: what the files are worth, which gates hold, where the report is."""
    stages = document["stages"]
    cached = sum(each["state"] in {"cached", "shared"} for each in stages)
    parts: list[RenderableType] = []
    if document["rows"]:
        parts += [measurement(document), Text("")]
    elif drawn := further(document):
        parts += [*drawn[1:], Text("")]
    if document["verdict"]:
        parts += [line(document["verdict"], "bold"), Text("")]
    parts += [_gate(gate) for gate in document["gates"]]
    if stages and cached == len(stages):
        parts.append(line(f"nothing to do: {cached} stages cached", "green"))
    else:
        ran = sum(each["state"] == "done" for each in stages)
        parts.append(line(f"{ran} stages run, {cached} cached, in {duration(document['seconds'])}"))
    if document["report"]:
        parts.append(line(f"report: {document['report']}"))
    return Group(*parts)


def _gate(gate: Document) -> Text:
    verdict = "met" if gate["passed"] else "missed"
    style = "green" if gate["passed"] else "bold red"
    form = ratio if gate["name"] == "speedup" else points
    relation = "at least" if gate["name"] == "speedup" else "at most"
    text = f"gate {gate['name']}: {form(gate['measured'])}, {relation} {form(gate['bound'])} asked: {verdict}"
    return line(text, style)


def stage_outcome(document: Document) -> RenderableType:
    """The end of a stage command: the artifact and what it measured."""
    did = "made" if document["state"] == "done" else "unchanged:"
    head = f"{did} {document['ref']}  ({document['arm']}/{document['entry']}, {duration(document['seconds'])})"
    parts: list[RenderableType] = [line(head, "green"), line(f"in {document['path']}")]
    metrics = document["metrics"]
    if isinstance(metrics.get("rows"), list):
        parts += [Text(""), measurement(metrics)]
    elif drawn := further(metrics):
        parts += drawn
    elif metrics:
        parts += [Text(""), fields(metrics)]
    return Group(*parts)


def sensitivity(document: Document) -> RenderableType:
    """The end of `sievit sensitivity`: what every cut loses, and where the picture and the table are."""
    root = document["path"]
    return Group(
        stage_outcome(document),
        Text(""),
        whole_path(f"plot:  {root}/figures/sensitivity.svg"),
        whole_path(f"table: {root}/sensitivity.json"),
    )


def measurement(document: Document) -> RenderableType:
    """Latency and accuracy of files, a table for each setting (provider, batch, threads, where the data lies)."""
    parts: list[RenderableType] = []
    host = (document.get("host") or {}).get("processor")
    for title, rows in _settings(document["rows"]).items():
        parts += [*([Text("")] if parts else []), line(f"{host}, {title}" if host else title, "bold"), _measured(rows)]
    images = next((row["test_images"] for row in document["rows"] if row.get("test_images")), None)
    parts.append(line(f"below: 95% intervals{f'; top-1 of {images} test images' if images else ''}", "dim"))
    parts += [
        line(f"not measured on {one['provider']}: {one['file']}: {one['reason']}", "yellow")
        for one in document.get("unmeasured", ())
    ]
    floor = (document.get("noise_floor") or {}).get("percent")
    if floor is not None:
        parts.append(line(f"noise floor: {floor:.1f}% between equal files", "dim"))
    if document.get("disturbed"):
        parts.append(line("the machine was busy: these latencies are disturbed", "yellow"))
    for title, rows in _settings(document.get("over_seeds", ())).items():
        seeds = ", ".join(map(str, rows[0]["seeds"]))
        parts += [Text(""), line(f"over seeds {seeds}: {title}", "bold"), _over_seeds(rows)]
    return Group(*parts, *further(document))


def _over_seeds(rows: Sequence[Document]) -> Table:
    """The mean of the final files of an arm, its 95 % interval, and each seed."""
    columns = ("arm", "top-1", "each seed", "speed-up", "each seed")
    shown = [
        (
            line(row["arm"]),
            two_lines(percent(row["top1_mean"]), interval(row["top1_low"], row["top1_high"], percent)),
            line(" ".join(map(percent, row["top1"]))),
            line(ratio(row["speedup_mean"])),
            line(" ".join(map(ratio, row["speedup"]))),
        )
        for row in rows
    ]
    return table(*columns, rows=shown, right=("top-1", "speed-up"), whole=("arm",))


def further(metrics: Document) -> list[RenderableType]:
    """What else the report has to say of a stage's metrics, as tables."""
    parts: list[RenderableType] = []
    for section in sections(
        {name: value for name, value in metrics.items() if name not in ("over_seeds", "between_arms")}
    ):
        head, *others = section.heads
        rows = [[name, *map(_interval_below, cells)] for name, *cells in section.rows]
        drawn = table(*section.heads, rows=rows, right=others, whole={head})
        parts += [Text(""), line(section.title, "bold"), drawn, *(line(f"- {remark}") for remark in section.remarks)]
    return parts


def _interval_below(cell: Any) -> Any:
    """29.7% (28.3–30.8%) on two lines: side by side, three of them are wider than a terminal."""
    both = re.fullmatch(r"(\S+) \((.+)\)", cell) if isinstance(cell, str) else None
    return two_lines(both[1], both[2]) if both else cell


def _settings(rows: Iterable[Document]) -> dict[str, list[Document]]:
    """The rows under the setting they were measured in."""
    found: dict[str, list[Document]] = {}
    for row in rows:
        threads = row.get("threads")
        title = f"{row.get('provider')}, batch {row.get('batch')}, {threads} thread{'' if threads == 1 else 's'}"
        io = row.get("io")
        found.setdefault(title if io in (None, "host") else f"{title}, data on {io}", []).append(row)
    return found


def _measured(rows: Sequence[Document]) -> Table:
    """Two lines a file: what was measured, and under it the 95 % interval, or why there is none."""
    columns = ("file", "top-1", "p50 ms", "p90 ms", "p99 ms", "speed-up")
    shown = [
        (
            two_lines(_name(row), ", ".join(_weight(row))),
            _estimate(row, "top1", "top1", percent),
            *(_estimate(row, f"{rank}_ms", rank, significant) for rank in ("p50", "p90", "p99")),
            _estimate(row, "speedup", "speedup", ratio),
        )
        for row in rows
    ]
    return table(*columns, rows=shown, right=columns[1:])


def _weight(row: Document) -> list[str]:
    """What the file weighs, as far as it is known: 472 KB, 21.9 M MACs."""
    macs = row.get("macs")
    return [size(row.get("bytes")), *([f"{big(macs)} MACs"] if macs is not None else [])]


def _estimate(row: Document, value: str, ends: str, form: Format) -> Text:
    low, high, unsaid = (row.get(f"{ends}_{part}") for part in ("low", "high", "unsaid"))
    below = "" if row.get(value) == low == high else interval(low, high, form)  # the baseline is 1 exactly
    return two_lines(form(row.get(value)), below or (unsaid or "").replace(", ", ",\n"))


def _name(row: Document) -> str:
    named = "/".join(str(row[part]) for part in ("arm", "entry") if row.get(part)) or str(row.get("file", DASH))
    return f"{named} {row['variant']}" if row.get("variant") else named


def started(document: Document) -> RenderableType:
    return Group(line(f"wrote {document['path']}"), line(f"next:  sievit plan {document['path']}"))
