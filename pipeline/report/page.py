"""The report of a run: one self-contained HTML page and its Markdown twin, from the run record and manifests alone.

The page asks nothing of the network: style, script and pictures stand in it. A content security policy lets only that
one script run (by its hash), so text from a YAML file, a class name or a picture cannot become code even if the
escaping were wrong. Works for a run that failed or was interrupted: it then says where and why.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commit import Disk
from ..errors import InputError
from . import numbers
from .contributions import contributions
from .curves import as_script_data, curves, drawn_by_page
from .facts import Facts, collect
from .flips import flips
from .layers import of_layers
from .pictures import draw_tradeoff
from .reading import text
from .sections import sections
from .stages import deeds
from .steps import Picture, Shelf, Step
from .verdict import gate_sentence, speed_word, verdict
from .widths import widths

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = (
    "big", "count", "duration", "moment", "p_value", "percent", "points", "ratio", "share", "significant", "size",
)  # fmt: skip
LIBRARY = ("vendor/uPlot.iife.min.js", "vendor/uPlot.min.css")


def write(record: Mapping[str, Any], store: Shelf, *, spec_text: str = "") -> tuple[Path, Path]:
    """Write report.html and report.md into the run's folder, each complete or not at all.

    record: the parsed run.json. spec_text: pipeline.yaml as the user wrote it; without it, the recipe in the record.
    Returns both paths. InputError: the record has no id that can name a folder.
    """
    run = text(record, "id")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", run):
        raise InputError(f"the run record has no usable id: {run!r}", hint="`sievit run` writes one")
    facts = collect(record, store, spec_text)
    folder = store.root / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "report.html", folder / "report.md")
    for path, page in zip(paths, (render_html(facts), render_markdown(facts)), strict=True):
        Disk().replace(path, page.encode())
    return paths


def render_html(facts: Facts, *, live: str = "", every: int = 0) -> str:
    """The page as text. live: "going on" or "paused" on a page that is served while its run goes on and asked for again
    `every` so many seconds.
    """
    from markupsafe import Markup

    plots = curves(facts)
    script = _read("tables.js", "tips.js", *([LIBRARY[0], "curves.js"] if plots else []))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            _words(facts),
            drawn=Markup(draw_tradeoff(facts.first_setting)),  # our own SVG, its text escaped
            galleries=_galleries(facts),
            latencies=[plot for plot in plots if plot.name == "latency"],
            trainings=[plot for plot in plots if plot.name != "latency"],
            plot_data=Markup(as_script_data(plots)) if plots else "",  # escaped there, as a script's data must be
            style=Markup(_read("report.css", *([LIBRARY[1]] if plots else []))),
            script=Markup(script),
            script_digest=digest,
            live=live,
            every=every,
        )
    )


def _read(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def render_markdown(facts: Facts) -> str:
    """The same facts in short, for a pull request."""
    page = environment(autoescape=False).get_template("report.md.j2").render(_words(facts))
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _words(facts: Facts) -> dict[str, Any]:
    """What both templates are given."""
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
        "sections": [section for step in facts.steps for section in sections(step.metrics)] + [*of_layers(facts.steps)],
        "contributions": contributions(facts),
        "flips": flips(facts.measurement),
    }


def _galleries(facts: Facts) -> dict[str, list[tuple[Step, Picture]]]:
    """Pictures by the arms that share them, each artifact once; not those whose numbers the page draws itself."""
    drawn = drawn_by_page(facts)
    galleries: dict[str, list[tuple[Step, Picture]]] = {}
    for step in facts.steps:
        for picture in step.pictures:
            if (step.key, picture.file) in drawn:
                continue
            galleries.setdefault(step.arms, []).append((step, picture))
    return galleries


@cache
def environment(*, autoescape: bool) -> Environment:
    """Jinja with the forms of numbers that all pages share. Kept: a sweep writes many pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(numbers, name)
    environment.globals.update(
        DASH=numbers.DASH,
        interval=numbers.interval,
        percent=numbers.percent,
        ratio=numbers.ratio,
        shown=numbers.shown,
        significant=numbers.significant,
        signed_ms=numbers.signed_milliseconds,
        signed_points=numbers.signed_points,
    )
    environment.filters["md"] = markdown_text
    environment.filters["code"] = markdown_code
    environment.filters["fence"] = markdown_fence
    return environment


def markdown_text(value: object) -> str:
    """Text that Markdown shows as it is, in a table cell too."""
    plain = " ".join(escape(str(value), quote=False).split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def markdown_code(value: object) -> str:
    """Inline code that holds in a table cell: fences longer than any run of backticks inside, bars escaped."""
    plain = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", plain)), default=0))
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}" if plain else ""


def markdown_fence(value: str, language: str = "") -> str:
    """A code block whose fence is longer than any inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", value)), default=0))
    return f"{fence}{language}\n{value.rstrip()}\n{fence}"
