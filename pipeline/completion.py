"""What a shell offers after a tab: arms, stages, artifacts, runs, and fields for --set with the values they have.

Typer's scripts call `sievit` with the line so far in the environment; `sievit --install-completion` sets one up. Every
answer here is a look at names and manifests, and nothing is ever said of what is damaged or missing: a prompt is no
place for errors.
"""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from . import manifest as manifests
from .errors import SievitError

if TYPE_CHECKING:
    from .document import Node
    from .store import Store

VARIABLE = "_SIEVIT_COMPLETE"
BREAKS = "@=:"  # where bash takes a word apart that is one to us


# ---- what is offered for a parameter


def arms(context: typer.Context) -> list[str]:
    """The arms of the pipeline file."""
    return _quietly(lambda: ["main", *_file(context).mapping["arms"].mapping])


def entries(context: typer.Context) -> list[str]:
    """The stages of the pipeline file, by their names there."""
    return _quietly(lambda: list(_file(context).mapping["stages"].mapping))


def stages(context: typer.Context) -> list[str]:
    """The kinds of stages of which there are artifacts."""
    return _quietly(lambda: _store(context).stages())


def refs(context: typer.Context, incomplete: str) -> list[str]:
    """Artifacts: stages, and the versions of the one that is meant, newest first; behind an arm its stages."""
    return _quietly(lambda: list(_refs(_store(context), incomplete)))


def stages_and_refs(context: typer.Context, incomplete: str) -> list[str]:
    """What `sievit explain` takes."""
    return [*entries(context), *refs(context, incomplete)]


def arms_and_refs(context: typer.Context, incomplete: str) -> list[str]:
    """What names a file: an arm of the pipeline here, or an artifact."""
    return [*arms(context), *refs(context, incomplete)]


def runs(context: typer.Context) -> list[str]:
    """The ids of runs."""
    return _quietly(lambda: sorted(path.parent.name for path in _store(context).runs.glob("*/run.json")))


def settings(context: typer.Context, incomplete: str) -> list[str]:
    """`prune.target.macs=0.35`: fields of the pipeline as they are now, and of one that is named its other values."""
    return _quietly(lambda: [text for text in _settings(context, incomplete) if text.startswith(incomplete)])


def _quietly(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except Exception:  # whatever is wrong is told by the command itself, not while it is typed
        return []


def _store(context: typer.Context) -> Store:
    from .session import store_of

    pipeline = context.params.get("pipeline")
    return store_of(_path(context.params.get("store")), _path(pipeline) if pipeline else None)


def _path(given: Any) -> Path | None:
    return None if given is None else Path(given)


def _file(context: typer.Context) -> Node:
    from .document import contents, parse
    from .session import DEFAULT_PIPELINE

    path = Path(context.params.get("pipeline") or DEFAULT_PIPELINE)
    return parse(contents(path), str(path))


def _refs(store: Store, incomplete: str) -> Iterator[str]:
    from .references import places

    if incomplete:
        yield from (name for name in places(store) if name.startswith(incomplete))
    meant = [name for name in store.stages() if name.startswith(incomplete.partition("@")[0])]
    if "@" not in incomplete:
        yield from meant
    if len(meant) == 1 or "@" in incomplete:
        for name in meant:
            yield from (f"{name}@{version}" for version in sorted(_versions(store.root / name), reverse=True))


def _versions(folder: Path) -> Iterator[int]:
    """Of the artifacts in a stage's folder. Their manifests are not proven: whoever names one gets it proven."""
    for path in folder.glob(f"*/{manifests.NAME}"):
        try:
            yield int(manifests.read_json(path, manifests.NAME)["version"])
        except (SievitError, OSError, KeyError, TypeError, ValueError):
            continue


def _settings(context: typer.Context, incomplete: str) -> Iterator[str]:
    from .settings import DataConfig, GatesConfig, LaunchConfig, ModelConfig

    kinds = {stage.name: stage.config for stage in context.find_root().obj.stages}
    root = _file(context).mapping
    blocks: list[tuple[str, type[BaseModel], Node | None]] = [
        ("data", DataConfig, root.get("data")),
        ("model", ModelConfig, root.get("model")),
        ("gates", GatesConfig, root.get("gates")),
        ("launch", LaunchConfig, root.get("launch")),
    ]
    for name, node in root["stages"].mapping.items():
        uses = node.mapping.get("uses")
        kind = kinds.get(str(uses.value) if uses is not None else name)
        if kind is not None:
            blocks.append((name, kind, node))
    for name, config, block in blocks:
        if name.startswith(incomplete) or incomplete.startswith(f"{name}."):
            yield from _fields(name, config, block, incomplete)


def _fields(path: str, config: type[BaseModel], node: Node | None, incomplete: str) -> Iterator[str]:
    """Every field below a path with the value that the file or the config gives it."""
    for name, field in config.model_fields.items():
        place = f"{path}.{name}"
        written = node.mapping.get(name) if node is not None else None
        kinds = list(_kinds(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from _fields(place, inner[0], written, incomplete)
            continue
        present = written.plain() if written is not None else None if field.is_required() else field.get_default()
        yield f"{place}={_yaml(present)}"
        if incomplete.startswith(f"{place}="):
            yield from (f"{place}={_yaml(value)}" for value in _choices(kinds) if value != present)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, `X | None` and Annotated taken apart."""
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _kinds(one)
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    else:
        yield annotation


def _choices(kinds: Iterable[Any]) -> Iterator[Any]:
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from get_args(kind)
        elif kind is bool:
            yield from (True, False)
        elif kind is type(None):
            yield None


def _yaml(value: Any) -> str:
    """A value as --set takes it; of a list or a mapping, which the shell would take apart, nothing."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value:g}" if isinstance(value, float) else str(value)
        case str():
            return value
        case _:
            return ""


# ---- the line so far


def asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is there for a tab."""
    return bool(environment.get(VARIABLE, "").startswith("complete_"))


def command_of(environment: Mapping[str, str] = os.environ) -> str | None:
    """The command whose arguments are completed; None while it is being typed itself."""
    words = _words(environment)[0]
    return words[1] if len(words) > 2 and not words[1].startswith("-") else None


def answer(complete: Callable[[], object]) -> int:
    """Run Typer's part and print what it finds; of a word that bash has taken apart, what comes behind the break."""
    words, before = _words(os.environ)
    if before is not None:
        os.environ["COMP_WORDS"] = shlex.join(words)
        os.environ["COMP_CWORD"] = str(len(words) - 1)
    found = io.StringIO()
    try:
        with redirect_stdout(found), redirect_stderr(io.StringIO()):
            complete()
    except SystemExit:
        pass
    except Exception:  # as above: no errors at a prompt
        return 0
    for line in filter(None, found.getvalue().splitlines()):
        typer.echo(line.removeprefix(before or ""))
    return 0


def _words(environment: Mapping[str, str]) -> tuple[list[str], str | None]:
    """(the words of the line up to the cursor, the last of them perhaps empty; what bash has already cut off that one).

    The second is None for other shells. bash gives `train@3` as three words, joined by line breaks.
    """
    if "COMP_WORDS" not in environment:
        line = environment.get("_TYPER_COMPLETE_ARGS", "")
        return [*line.split(), *([""] if line.endswith(" ") else [])], None
    given = environment["COMP_WORDS"]
    pieces = given.split("\n") if "\n" in given else given.split()
    pieces = [*pieces, ""][: int(environment.get("COMP_CWORD") or 0) + 1]
    words: list[str] = []
    cut = ""
    for piece in pieces:
        glued = len(words) > 1 and piece and (piece[0] in BREAKS or words[-1][-1:] in tuple(BREAKS))
        if glued:
            words[-1] += piece
        else:
            words.append(piece)
        last = words[-1]
        cut = last[: max(last.rfind(sign) for sign in BREAKS) + 1] if glued else ""
    return words, cut
