"""How facts become HTML and Markdown: jinja2 with the report's forms of numbers, and text that stays text."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import numbers

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = (
    "big", "count", "duration", "moment", "p_value", "percent", "points", "ratio", "share", "significant", "size",
)  # fmt: skip


def read(*names: str) -> str:
    """Files of the templates folder, one after the other."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def digest(script: str) -> str:
    """Of a script, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


@cache
def environment(*, autoescape: bool) -> Environment:
    """jinja2 with the forms of numbers that all pages share. Kept: a sweep writes many pages."""
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


def tidy(page: str) -> str:
    """Markdown without the empty lines that templates leave."""
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


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
