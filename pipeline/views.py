"""How results are drawn for a person: one function a kind of document, readable in 80 columns.

Each takes the very document that --json prints and returns something that rich can print; none of them computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .console import Document
from .diagnostics import printable
from .report.numbers import (
    DASH,
    NARROW,
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
WIDEST = 60  # characters of a value that is shown in a table
MOST = 4  # reasons of a stage that a plan shows, and rows of one list that a difference does


def line(text: str, style: str = "") -> Text:
    """A line of text as it is: no markup, no control characters."""
    # Line by line: a line break is layout, anything else unprintable is not to be obeyed.
    lines = text.replace(NARROW, " ").split("\n")
    return Text("\n".join(map(printable, lines)), style=style)


def table(*columns: str, rows: Iterable[Sequence[Any]], right: Iterable[str] = (), whole: Iterable[str] = ()) -> Table:
    """A table without lines. right: columns of numbers; whole: columns that are never folded."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        drawn.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in whole or name in right,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else line(_shown(cell)) for cell in row))
    return drawn


def state(name: str) -> Text:
    return Text(name, style=STATES.get(name, ""))


def _shown(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(_shown, value))
        return f"[{text}]" if len(text) <= WIDEST else f"[{len(value)} values]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(each)}" for key, each in value.items()) + "}"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# ---- run and plan


def plan(document: Document) -> RenderableType:
    rows = [
        (each["arm"], each["entry"], state(each["state"]), _about(each["expected_seconds"], each["state"]), _why(each))
        for each in document["stages"]
    ]
    count = sum(each["state"] in {"run", "unknown"} for each in document["stages"])
    total = document["expected_seconds"]
    closing = f"{count} of {len(rows)} stages to run" if count else f"nothing to do: {len(rows)} stages cached"
    about = f", about {duration(total)}" if count and total is not None else ""
    return Group(
        table("arm", "stage", "state", "about", "why", rows=rows, right={"about"}, whole={"arm", "stage", "state"}),
        Text(""),
        line(closing + about),
        *(line(f"note: {note}") for note in document["notes"]),
    )


def _about(seconds: float | None, status: str) -> str:
    return duration(seconds) if seconds is not None and status in {"run", "unknown"} else ""


def _why(stage: Document) -> str:
    if stage["state"] == "cached":
        return str(stage["ref"])
    if stage["state"] == "shared":
        return f"same as in arm {stage['shared_with']}"
    waits = [f"when {stage['waits_for']} has run"] if stage["state"] == "unknown" else []
    if not waits and stage["compared_to"] is None:
        return "nothing like it in the store"
    shown = [_change(each) for each in stage["reasons"][:MOST]]
    more = len(stage["reasons"]) - len(shown)
    return "\n".join([*waits, *shown, *([f"and {more} more: sievit explain {stage['entry']}"] if more else [])])


def _change(change: Document) -> str:
    """`target.macs: 0.5 -> 0.4`; digests only as far as a person compares them."""
    old, new = (_short(change[side]) for side in ("old", "new"))
    return f"{change['field'].removeprefix('config.')}: {old} -> {new}"


def _short(value: Any) -> str:
    text = "none" if value is None else _shown(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def outcome(document: Document) -> RenderableType:
    """The end of `sievit run`: what the files are worth, which gates hold, where the report is."""
    stages = document["stages"]
    cached = sum(each["state"] in {"cached", "shared"} for each in stages)
    parts: list[RenderableType] = []
    if document["rows"]:
        parts += [measurement(document), Text("")]
    elif drawn := further(document):
        parts += [*drawn[1:], Text("")]
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
        parts += [Text(""), _fields(metrics)]
    return Group(*parts)


def sensitivity(document: Document) -> RenderableType:
    """The end of `sievit sensitivity`: what every cut loses, and where the picture and the table are."""
    root = document["path"]
    return Group(
        stage_outcome(document),
        Text(""),
        _path(f"plot:  {root}/figures/sensitivity.svg"),
        _path(f"table: {root}/sensitivity.json"),
    )


def measurement(document: Document) -> RenderableType:
    """Latency and accuracy of files, a table for each setting (provider, batch, threads, where the data lies)."""
    parts: list[RenderableType] = []
    host = (document.get("host") or {}).get("processor")
    for title, rows in _settings(document["rows"]).items():
        parts += [*([Text("")] if parts else []), line(f"{host}, {title}" if host else title, "bold"), _measured(rows)]
    images = next((row["test_images"] for row in document["rows"] if row.get("test_images")), None)
    parts.append(line(f"below: 95% intervals{f'; top-1 of {images} test images' if images else ''}", "dim"))
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
            _two_lines(percent(row["top1_mean"]), interval(row["top1_low"], row["top1_high"], percent)),
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
    for section in sections({name: value for name, value in metrics.items() if name != "over_seeds"}):
        head, *others = section.heads
        rows = [[name, *map(_interval_below, cells)] for name, *cells in section.rows]
        drawn = table(*section.heads, rows=rows, right=others, whole={head})
        parts += [Text(""), line(section.title, "bold"), drawn, *(line(f"- {remark}") for remark in section.remarks)]
    return parts


def _interval_below(cell: Any) -> Any:
    """29.7% (28.3–30.8%) on two lines: side by side, three of them are wider than a terminal."""
    both = re.fullmatch(r"(\S+) \((.+)\)", cell) if isinstance(cell, str) else None
    return _two_lines(both[1], both[2]) if both else cell


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
            _two_lines(_name(row), ", ".join(_weight(row))),
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
    return _two_lines(form(row.get(value)), below or (unsaid or "").replace(", ", ",\n"))


def _two_lines(above: str, below: str) -> Text:
    return Text("\n").join([line(above), line(below, "dim")]) if below else line(above)


def _name(row: Document) -> str:
    named = "/".join(str(row[part]) for part in ("arm", "entry") if row.get(part)) or str(row.get("file", DASH))
    return f"{named} {row['variant']}" if row.get("variant") else named


# ---- inspection


def artifacts(document: Document) -> RenderableType:
    rows = [
        (
            each["ref"],
            f"{each['arm']}/{each['entry']}",
            each["created"][:16].replace("T", " "),
            duration(each["seconds"]),
            size(each["bytes"]),
            each["headline"],
        )
        for each in document["artifacts"]
    ]
    if not rows:
        return line(f"no artifacts in {document['store']}")
    columns = ("ref", "made for", "created (UTC)", "took", "size", "result")
    return table(*columns, rows=rows, right={"took", "size"}, whole=columns[:3])


def artifact(document: Document) -> RenderableType:
    """A manifest, readable: what it is, what it was made from, what it measured."""
    head = [
        ("made for", f"{document['pipeline']}: {document['arm']}/{document['entry']}"),
        ("created", f"{document['created']}, in {duration(document['seconds'])}"),
        ("folder", document["path"]),
        ("digest", document["digest"]),
        ("command", document.get("command")),
    ]
    parts: list[RenderableType] = [line(f"{document['ref']}  {document['key']}", "bold"), _pairs(head)]
    inputs = [(role, _inputs(value)) for role, value in document["inputs"].items()]
    for title, block in (("made from", inputs), ("config", None), ("metrics", None), ("ledger", None)):
        drawn = _pairs(block) if block else _fields(document[title]) if document.get(title) else None
        if drawn is not None:
            parts += [Text(""), line(title, "bold"), drawn]
    files = [(name, size(each["bytes"]), each["sha256"][:16]) for name, each in document["files"].items()]
    parts += [Text(""), line("files", "bold"), table("name", "size", "SHA-256", rows=files, right={"size"})]
    parts += [line(f"{note['level']}: {note['text']}", "yellow") for note in document.get("notes") or ()]
    return Group(*parts)


def _inputs(value: Any) -> str:
    many = value if isinstance(value, list) else [value]
    return ", ".join(str(each["ref"]) if isinstance(each, dict) else str(each) for each in many)


def _fields(values: Document) -> Table:
    return _pairs(flatten(values).items())


def _pairs(pairs: Iterable[tuple[str, Any]]) -> Table:
    drawn = Table.grid(padding=(0, 2, 0, 0))
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        drawn.add_row(line(f"  {name}"), line(_shown(value)))
    return drawn


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names: {"target": {"macs": 0.5}} -> {"target.macs": 0.5}. Lists stay whole."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def explanation(document: Document) -> RenderableType:
    parts: list[RenderableType] = [line(document["verdict"], "bold")]
    parts += [line(f"  {_change(each)}") for each in document["reasons"]]
    return Group(*parts)


def difference(document: Document) -> RenderableType:
    parts: list[RenderableType] = []
    for title in ("config", "inputs", "metrics", "files"):
        changes = document["changes"][title]
        if changes:
            rows = _summarised(changes)
            parts += [line(title, "bold"), table("field", document["left"], document["right"], rows=rows), Text("")]
    if not parts:
        parts = [line(f"{document['left']} and {document['right']} are equal"), Text("")]
    if document["common"]:
        parts += [line("in common", "bold"), table("", "", rows=list(document["common"].items())), Text("")]
    return Group(*parts[:-1])


def _summarised(changes: Sequence[Document]) -> list[tuple[str, Any, Any]]:
    """A line a field; a list of rows in which much differs (a curve, the rows of a benchmark) is a single one."""
    rows: dict[str, list[Document]] = {}
    for change in changes:
        rows.setdefault(change["field"].partition("[")[0], []).append(change)
    lines: list[tuple[str, Any, Any]] = []
    for field, several in rows.items():
        if len(several) > MOST and "[" in several[0]["field"]:
            places = {change["field"].partition("]")[0] for change in several}
            lines.append((field, f"{len(several)} values in {len(places)} rows differ", "(--json has them)"))
        else:
            lines += [(change["field"], change["left"], change["right"]) for change in several]
    return lines


def verification(document: Document) -> RenderableType:
    damaged = document["damaged"]
    parts: list[RenderableType] = []
    for each in damaged:
        parts += [
            line(each["ref"], "bold"),
            Padding(line(_fault(each["message"])), (0, 0, 0, 2), expand=False),
            _path(f"  {each['where']}"),
        ]
    closing = f"{document['checked']} artifacts checked, {len(damaged)} damaged"
    return Group(*parts, line(closing, "bold red" if damaged else "green"))


def _fault(message: str) -> str:
    """What is wrong, without the name that stands above it."""
    return message.partition(" is not what was stored: ")[2] or message


def _path(text: str) -> Text:
    """A path that is never folded: it is there to be copied."""
    shown = line(text, "dim")
    shown.no_wrap, shown.overflow = True, "ignore"
    return shown


def collection(document: Document) -> RenderableType:
    rows = [
        (
            _two_lines(each["path"].removeprefix(f"{document['store']}/"), _fault(each["why"])),
            each["kind"],
            size(each["bytes"]),
        )
        for each in document["removed"]
    ]
    if not rows:
        return line(f"nothing to remove: {_all_kept(document)}")
    verb = "would be removed" if document["dry_run"] else "removed"
    closing = f"{len(rows)} {verb}, {size(document['bytes'])}"
    return Group(table("what", "kind", "size", rows=rows, right={"size"}, whole={"kind"}), line(closing))


def _all_kept(document: Document) -> str:
    if document["artifacts"] == 0:
        return f"no artifacts in {document['store']}"
    if document["damaged_only"]:
        return "no artifact is damaged"
    return "every artifact is needed by a newest run, or newest of its kind"


def report(document: Document) -> RenderableType:
    return Group(line(f"report: {document['report']}"), line(f"also:   {document['markdown']}"))


def started(document: Document) -> RenderableType:
    return Group(line(f"wrote {document['path']}"), line(f"next:  sievit plan {document['path']}"))
