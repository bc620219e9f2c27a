"""How what is in the store is drawn for a person: lists, manifests, differences, damage. Readable in 80 columns.

As in `views`, each draws the document that --json prints, and none of them computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from .console import Document
from .drawing import aligned, fields, line, table, two_lines, whole_path
from .report.numbers import duration, size

PLACE = 15  # columns of arm/entry
MOST = 4  # rows of one list that a difference shows


def artifacts(document: Document) -> RenderableType:
    listed = document["artifacts"]
    if not listed:
        return line(f"no artifacts in {document['store']}")
    year = listed[-1]["created"][:5]  # "2026-", of the newest: it goes without saying
    rows = [
        (
            each["ref"],
            _place(each["arm"], each["entry"]),
            each["created"][:16].removeprefix(year).replace("T", " ")[:11],
            duration(each["seconds"]),
            size(each["bytes"]),
            each["headline"],
        )
        for each in listed
    ]
    columns = ("ref", "made for", f"{year}... UTC", "took", "size", "result")
    return table(*columns, rows=rows, right={"took", "size"}, whole=columns)


def _place(arm: str, entry: str) -> str:
    """main/finetune; on two lines where it would push the results off the screen."""
    return f"{arm}/{entry}" if len(arm) + len(entry) < PLACE else f"{arm}/\n{entry}"


def artifact(document: Document) -> RenderableType:
    """A manifest, readable: what it is, what it was made from, what it measured."""
    head = [
        ("made for", f"{document['pipeline']}: {document['arm']}/{document['entry']}"),
        ("created", f"{document['created']}, in {duration(document['seconds'])}"),
        ("folder", document["path"]),
        ("digest", document["digest"]),
        ("command", document.get("command")),
    ]
    parts: list[RenderableType] = [line(f"{document['ref']}  {document['key']}", "bold"), aligned(head)]
    inputs = [(role, _inputs(value)) for role, value in document["inputs"].items()]
    for title, block in (("made from", inputs), ("config", None), ("metrics", None), ("ledger", None)):
        drawn = aligned(block) if block else fields(document[title]) if document.get(title) else None
        if drawn is not None:
            parts += [Text(""), line(title, "bold"), drawn]
    files = [(name, size(each["bytes"]), each["sha256"][:16]) for name, each in document["files"].items()]
    parts += [Text(""), line("files", "bold"), table("name", "size", "SHA-256", rows=files, right={"size"})]
    parts += [line(f"{note['level']}: {note['text']}", "yellow") for note in document.get("notes") or ()]
    return Group(*parts)


def _inputs(value: Any) -> str:
    many = value if isinstance(value, list) else [value]
    return ", ".join(str(each["ref"]) if isinstance(each, dict) else str(each) for each in many)


def explanation(document: Document) -> RenderableType:
    parts: list[RenderableType] = [line(document["verdict"], "bold")]
    parts += [line(f"  {each['says']}") for each in document["reasons"]]
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
            whole_path(f"  {each['where']}"),
        ]
    closing = f"{document['checked']} artifacts checked, {len(damaged)} damaged"
    return Group(*parts, line(closing, "bold red" if damaged else "green"))


def _fault(message: str) -> str:
    """What is wrong, without the name that stands above it."""
    return message.partition(" is not what was stored: ")[2] or message


def collection(document: Document) -> RenderableType:
    rows = [
        (
            two_lines(each["path"].removeprefix(f"{document['store']}/"), _fault(each["why"])),
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
