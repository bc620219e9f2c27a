"""The report of a run: one self-contained HTML page and its Markdown twin, from the run record and manifests alone.

The page asks nothing of the network: style, script and pictures stand in it. A content security policy lets only that
one script run (by its hash), so text from a YAML file, a class name or a picture cannot become code even if the
escaping were wrong. Works for a run that failed or was interrupted: it then says where and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..commit import Disk
from ..errors import InputError
from .contributions import contributions
from .controls import roles
from .curves import as_script_data, curves
from .facts import Facts, Row, collect
from .flips import flips
from .layers import of_layers
from .pictures import MOST_NAMES, draw_tradeoff
from .reading import text
from .sections import sections
from .several import Beside, beside
from .stages import deeds
from .steps import Picture, Shelf, Step, leave_out
from .templating import digest, environment, read, tidy
from .verdict import gate_sentence, speed_word, verdict
from .widths import widths

MOST_BYTES = 2_950_000  # the page must stay a file that people mail
FEW = 12  # rows of a table that is read at once
OF_ARMS = ("seeds", "arms")  # sections on whole arms
LIBRARY = ("vendor/uPlot.iife.min.js", "vendor/uPlot.min.css")


def write(record: Mapping[str, Any], store: Shelf, *, spec_text: str = "") -> tuple[Path, Path]:
    """Write report.html and report.md into the run's folder, each complete or not at all.

    record: the parsed run.json. spec_text: pipeline.yaml as the user wrote it; without it, the recipe in the record.
    Returns both paths. InputError: the record has no id that can name a folder.
    """
    run = _usable_id(record)
    facts = collect(record, store, spec_text)
    return _kept(store.root / "runs" / run, "report", render_html(facts), render_markdown(facts))


def headline(record: Mapping[str, Any], store: Shelf, *, spec_text: str = "") -> str:
    """The report's first words, as plain text."""
    return verdict(collect(record, store, spec_text)).text


def write_beside(records: Sequence[Mapping[str, Any]], store: Shelf) -> tuple[Path, Path]:
    """Write the page on several runs and its twin into the folder of the first, named after the others.

    Raises InputError: a record without a usable id, fewer than two runs, too many, or one that stands there twice.
    """
    first, *others = map(_usable_id, records)
    found = beside([(record, collect(record, store)) for record in records])
    pages = (render_beside_html(found), render_beside_markdown(found))
    return _kept(store.root / "runs" / first, f"beside-{'-'.join(others)}", *pages)


def _usable_id(record: Mapping[str, Any]) -> str:
    run = text(record, "id")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", run):
        raise InputError(f"the run record has no usable id: {run!r}", hint="`sievit run` writes one")
    return run


def _kept(folder: Path, name: str, html: str, markdown: str) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{name}.html", folder / f"{name}.md")
    for path, page in zip(paths, (html, markdown), strict=True):
        Disk().replace(path, page.encode())
    return paths


def render_html(facts: Facts, *, live: str = "", every: int = 0) -> str:
    """The page as text, without its largest pictures where it would be too large to send. live: "going on" or "paused"
    on a page that is served while its run goes on and asked for again `every` so many seconds.
    """
    page = _html(facts, live, every)
    over = len(page.encode()) - MOST_BYTES
    if over <= 0 or not any(step.pictures for step in facts.steps):
        return page
    sentences = 120 * sum(len(step.pictures) for step in facts.steps)  # that say what was left out
    return _html(replace(facts, steps=leave_out(facts.steps, over + sentences)), live, every)


def _html(facts: Facts, live: str, every: int) -> str:
    from markupsafe import Markup

    plots = curves(facts)
    script = read("tables.js", "tips.js", *([LIBRARY[0], "curves.js"] if plots else []))
    return (
        environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            _words(facts),
            drawn=Markup(draw_tradeoff(facts.first_setting)),  # our own SVG, its text escaped
            many=len(facts.first_setting) > MOST_NAMES,
            galleries=_galleries(facts),
            latencies=[plot for plot in plots if plot.name == "latency"],
            trainings=[plot for plot in plots if plot.name != "latency"],
            plot_data=Markup(as_script_data(plots)) if plots else "",  # escaped there, as a script's data must be
            style=Markup(read("report.css", *([LIBRARY[1]] if plots else []))),
            script=Markup(script),
            script_digest=digest(script),
            live=live,
            every=every,
        )
    )


def render_markdown(facts: Facts) -> str:
    """The same facts in short, for a pull request."""
    return tidy(environment(autoescape=False).get_template("report.md.j2").render(_words(facts)))


def render_beside_html(found: Beside) -> str:
    """The page on several runs as text."""
    from markupsafe import Markup

    script = read("tables.js", "tips.js")
    return (
        environment(autoescape=True)
        .get_template("runs.html.j2")
        .render(
            _words_beside(found),
            drawn=Markup(draw_tradeoff([row for _, row in found.points], [name for name, _ in found.points])),
            style=Markup(read("report.css")),
            script=Markup(script),
            script_digest=digest(script),
        )
    )


def render_beside_markdown(found: Beside) -> str:
    """The same facts, for a pull request."""
    return tidy(environment(autoescape=False).get_template("runs.md.j2").render(_words_beside(found)))


def _words_beside(found: Beside) -> dict[str, Any]:
    return {
        "beside": found,
        "gates": [(column.name, *gate_sentence(gate)) for column in found.columns for gate in column.facts.gates],
        "speed_word": speed_word,
    }


def _words(facts: Facts) -> dict[str, Any]:
    """What both templates are given. Sections of whole arms come before those of single files."""
    told = [section for step in facts.steps for section in sections(step.metrics)] + [*of_layers(facts.steps)]
    return {
        "facts": facts,
        "verdict": verdict(facts),
        "gates": [(gate, *gate_sentence(gate)) for gate in facts.gates],
        "widths": [found for step in facts.steps if (found := widths(step))],
        "notes": [(step, note) for step in facts.steps for note in step.notes],
        "speed_word": lambda row: speed_word(row, facts),
        "deeds": deeds,
        "budgets": list(
            dict.fromkeys(word for step in facts.steps if (word := text(step.manifest, "ledger", "budget")))
        ),
        "shared": any((cost.processes or 1) > 1 for cost in facts.costs),
        "metered": any(cost.values["energy_j"] is not None for cost in facts.costs),
        "of_arms": [section for section in told if section.name in OF_ARMS],
        "sections": [section for section in told if section.name not in OF_ARMS],
        "roles": roles(facts.arms, facts.baseline_arm, facts.controls),
        "chief": _chief(facts),
        "seeded": any("@" in row.arm for row in facts.rows),
        "contributions": contributions(facts),
        "flips": flips(facts.measurement),
    }


def _chief(facts: Facts) -> list[Row]:
    """The rows that are read first: all of them where they are few, else final files and the baseline of one seed."""
    found = [row for row in facts.rows if (row.final or row.baseline) and "@" not in row.arm]
    return found if found and len(facts.rows) > FEW else list(facts.rows)


def _galleries(facts: Facts) -> dict[str, list[tuple[Step, Picture]]]:
    """Pictures by the arms that share them, each artifact once."""
    galleries: dict[str, list[tuple[Step, Picture]]] = {}
    for step in facts.steps:
        for picture in step.pictures:
            galleries.setdefault(step.arms, []).append((step, picture))
    return galleries
