"""The pages that are made from the code at each build, so that they cannot fall behind it.

A page a stage: its docstring, what it reads and writes, and a table of its settings; a page of the sections that
belong to no stage; a page of all commands, as --help prints them. Decisions are listed as they are found. External
links are looked at for their form alone: a build asks nothing of the network.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sievit.pipeline.manual import laid_out
from sievit.pipeline.settings import DataConfig, GatesConfig, LaunchConfig, ModelConfig, TrackConfig
from sievit.pipeline.stage import Stage
from sievit.stages import __main__ as composition

LOG = logging.getLogger("mkdocs.hooks.pages")
DOCS = Path(__file__).parent
SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "gates": GatesConfig,
    "launch": LaunchConfig,
    "track": TrackConfig,
}
COLUMNS = 90  # of the help on the page of commands
LINK = re.compile(r"\]\(\s*<?(https?:[^)\s>]*)")


# ---- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with a page for every stage and decision there is."""
    stages = [{name: f"stages/{name}.md"} for name, _ in stage_pages()]
    decisions = [{_title(path): f"decisions/{path.name}"} for path in sorted((DOCS / "decisions").glob("*.md"))]
    written = [path for path in sorted(DOCS.glob("*.md")) if path.stem not in ("index", "tutorial", "numbers", "LOG")]
    config.nav = [
        {"Sievit": "index.md"},
        {"Your own images": "tutorial.md"},
        {"Numbers you can trust": "numbers.md"},
        {"Stages": stages},
        {
            "Reference": [
                {"pipeline.yaml": "settings.md"},
                {"Commands": "commands.md"},
                *({_title(path): path.name} for path in written),
            ]
        },
        {"Decisions": decisions},
        {"Log of experiments": "LOG.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The made pages stand among the written ones."""
    for name, text in stage_pages():
        files.append(File.generated(config, f"stages/{name}.md", content=text))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **rest: Any) -> str:
    """External links have a form that a browser can follow; --strict makes the warning an error."""
    for link in wrong_links(markdown):
        LOG.warning("%s: this link cannot be followed: %s", page.file.src_uri, link)
    return markdown


def wrong_links(markdown: str) -> list[str]:
    """External links that are not https, or name no host."""
    found = []
    for link in LINK.findall(markdown):
        parts = urlsplit(link)
        if parts.scheme != "https" or "." not in (parts.hostname or ""):
            found.append(link)
    return found


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").replace("`", "").strip() or path.stem


# ---- stages and settings


def stage_pages() -> Iterator[tuple[str, str]]:
    """(name, Markdown) of every stage, in the order of a pipeline."""
    for stage in composition.STAGES:
        yield stage.name, stage_page(stage)


def stage_page(stage: Stage) -> str:
    """The manual of a stage, its place in a pipeline and its settings."""
    how = {True: ", of all arms", False: ""}
    reads = ", ".join(
        f"{one.kind} (as `{one.role}`{how[one.many]}{', where there are any' if one.optional else ''})"
        for one in stage.reads
    )
    facts = [
        f"Reads {reads or 'nothing but the data'}; writes {stage.writes}.",
        "It stands once for all arms." if stage.across_arms else "",
        "Several processes can share its work." if stage.shares else "",
        f"Its command: `sievit {stage.name}` ([all options](../commands.md#sievit-{stage.name})).",
    ]
    return "\n\n".join(
        [
            f"# {stage.name}",
            manual(stage.manual),
            " ".join(filter(None, facts)),
            "## Settings",
            f"Under `stages.{stage.name}` in pipeline.yaml, or `--set {stage.name}.FIELD=VALUE`.",
            table(stage.config),
        ]
    )


def manual(text: str) -> str:
    """A docstring as Markdown: prose stays prose, what is indented or stands in columns is kept as it is."""
    parts = []
    for block in text.strip("\n").split("\n\n"):
        lines = block.splitlines()
        kept = all(line.startswith(" ") for line in lines) or any(re.search(r"\S {2,}\S", line) for line in lines)
        parts.append(f"```text\n{laid_out(block, COLUMNS)}\n```" if kept else escaped(" ".join(lines)))
    return "\n\n".join(parts)


def settings_page() -> str:
    """The sections of the file that belong to no stage."""
    parts = [
        "# pipeline.yaml",
        "`stages:` holds the stages in their order, each with its settings ([pages of the stages](stages/ticket.md)); "
        "`arms:` the same pipeline with other settings; `name`, `seed` (or `seeds`, all arms under each) and `device` "
        "(`auto`, `cpu`, `cuda`) stand at the top. The other sections:",
    ]
    for name, config in SECTIONS.items():
        parts += [f"## {name}", escaped(" ".join((config.__doc__ or "").split())), table(config)]
    return "\n\n".join(parts)


def table(config: type[BaseModel]) -> str:
    """Every setting with its type, default and meaning; those inside of others by their dotted path."""
    rows = [
        f"| `{path}` | {cell(kind)} | {cell(default)} | {barred(escaped(meaning))} |"
        for path, kind, default, meaning in settings(config)
    ]
    if not rows:
        return "It has none."
    return "\n".join(["| Field | Type | Default | Meaning |", "|---|---|---|---|", *rows])


def settings(config: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(path, type, default, meaning) of every setting of a config and of those within it."""
    for name, field in config.model_fields.items():
        inner = models(field.annotation)
        kind = told(field.annotation, field.metadata)
        about = field.description or " ".join((inner[0].__doc__ or "").split()) if inner else field.description or ""
        yield f"{path}{name}", kind, default_of(field), about
        for one in inner:
            if not path.startswith(f"{name}.") and f".{name}." not in path:
                yield from settings(one, f"{path}{name}.")


def models(annotation: Any) -> list[type[BaseModel]]:
    """The configs inside of a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in typing.get_args(annotation) for one in models(part)]


def told(annotation: Any, metadata: list[Any]) -> str:
    """A type in words: number ≥ 0, one of a, b, list of whole numbers ≥ 1, null."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = parts[1:]
        return told(parts[0], [*(m for one in inner for m in getattr(one, "metadata", [one])), *metadata])
    if origin is Literal:
        return " | ".join(json.dumps(part) if not isinstance(part, str) else part for part in parts)
    if origin in (typing.Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        words = " | ".join(told(part, metadata) for part in rest)
        return f"{words} | null" if type(None) in parts else words
    if origin in (tuple, list):
        if origin is list or parts[1:] == (Ellipsis,):
            return f"list of {told(parts[0], [])}"
        return f"[{', '.join(told(part, []) for part in parts)}]"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    plain = {int: "whole number", float: "number", bool: "true | false", str: "text"}.get(annotation, "value")
    return " ".join([plain, ", ".join(bounds(metadata))]).strip()


def bounds(metadata: list[Any]) -> Iterator[str]:
    """≥ 0, < 1, of pydantic's constraints."""
    for one in metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if getattr(one, name, None) is not None:
                yield f"{sign} {getattr(one, name):g}"


def default_of(field: FieldInfo) -> str:
    """As it would be written in the file."""
    if field.is_required():
        return "(must be given)"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_unset=True)
        return json.dumps(given) if given else "as below"
    if isinstance(value, tuple | list) and any(isinstance(one, BaseModel) for one in value):
        return json.dumps([one.model_dump(mode="json", exclude_unset=True) for one in value])
    return json.dumps(value, default=str)


def cell(text: str) -> str:
    """Code in a cell of a table."""
    return f"`{text}`" if text else ""


def barred(text: str) -> str:
    """A bar in the text of a cell ends no column; one in code does not anyway."""
    return text.replace("|", "\\|")


def escaped(text: str) -> str:
    """Text in which <, _ and * stand for themselves; what stands in backticks is code already."""

    def plain(part: str) -> str:
        return re.sub(r"([\\*_\[\]{}])", r"\\\1", part.replace("&", "&amp;").replace("<", "&lt;"))

    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if at % 2 else plain(part) for at, part in enumerate(parts))


# ---- commands


def commands_page() -> str:
    """What --help says of every command."""
    overview = help_of([])
    names = re.findall(r"^  ([a-z]+) {2,}", overview.partition("\n\nRun:")[2], re.MULTILINE)
    assert len(names) > 10, "the overview has changed its form"
    parts = ["# Commands", "As `--help` prints them.", f"```text\n{overview}\n```"]
    for name in names:
        parts += [f"## sievit {name}", f"```text\n{help_of([name])}\n```"]
    return "\n\n".join(parts)


def help_of(arguments: list[str]) -> str:
    """The text of --help, as wide as the page."""
    told_here = io.StringIO()
    with (
        patch.dict(os.environ, COLUMNS=str(COLUMNS)),
        patch.object(sys, "argv", ["sievit", *arguments, "--help"]),
        redirect_stdout(told_here),
    ):
        code = composition.main()
    assert code == 0, arguments
    return told_here.getvalue().strip()
