"""`sievit init`: looks at the images, asks what is wanted, and writes a commented pipeline.yaml that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer

from sievit.pipeline import host, options
from sievit.pipeline.diagnostics import printable, suggest
from sievit.pipeline.errors import InputError, UsageError
from sievit.pipeline.session import DEFAULT_PIPELINE, session_of

from .methods import InvalidInput
from .starter import DIGITS, PHOTO_MODEL, Model, Wish, starter

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sievit.pipeline.console import Console

    from .targets import Target
    from .vision.census import Census

Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
READERS = ("builtin:", "torch/", "hfds/")  # sources that are a name, not a path
SOURCES = "a folder with a folder per class, a .tar of one, builtin:digits, torch/<dataset> or hfds/<dataset>"
TARGETS = "macs=0.5, params=0.5, size_mb=8, latency_ms=5 or speedup=2"
SHOWN = 3  # broken images that are named

Answer = TypeVar("Answer")


def init(
    context: typer.Context,
    where: Annotated[
        Path, typer.Argument(metavar="WHERE", help="a .yaml file, or a folder to put pipeline.yaml in")
    ] = DEFAULT_PIPELINE,
    *,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="a folder per class, a .tar, torch/<name>, hfds/<name>"),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="a timm model, taken pretrained")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="KIND=VALUE", help=f"what must be left: {TARGETS}")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="|".join(DEVICES), help="what to compute on")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing; what no option says is chosen")] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a commented pipeline.yaml to start from, its settings chosen by the images.

    On a terminal it asks for what no option says. A folder or tar is listed, and up to 500 of its images are opened:
    classes, sizes and balance are told, broken files counted; image size, batch size and epochs follow from them, with
    the reason beside each. Without --data the pipeline is for scikit-learn's digits.

        sievit init flowers --data ~/photos/flowers --target speedup=2 --yes
    """
    console = session_of(context).console
    where = where.resolve()
    path = where if where.suffix in {".yaml", ".yml"} else where / "pipeline.yaml"
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="name another file, or --force to overwrite it")
    ask = console.interactive and not yes
    wanted = _target(target) if target is not None else None
    chosen = _device(device) if device is not None else None
    if data is None and ask:
        source, census = _asked(
            console,
            "images (a folder, a .tar, torch/<dataset> or hfds/<dataset>)",
            DIGITS,
            lambda text: _looked_at(console, text, path.parent),
        )
    else:
        source, census = _looked_at(console, data or DIGITS, path.parent)
    wish = Wish(source, None if model is None else _model(model))
    if ask:
        if model is None:
            small = _suits_own(wish, census)
            question = "timm model, taken pretrained" + ("; own: a small one for such small images" if small else "")
            usual = "own" if small else PHOTO_MODEL.name
            wish = Wish(
                source, _asked(console, question, usual, lambda text: None if small and text == "own" else _model(text))
            )
        if wanted is None:
            usual = "macs=0.35" if wish.plain_digits else "macs=0.5"
            wanted = _asked(console, f"what must be left ({TARGETS})", usual, _target)
        if chosen is None:
            chosen = _asked(console, f"device ({', '.join(DEVICES)})", "auto", _device)
    wish = Wish(source, wish.model, wanted, chosen or "auto")
    if wish.device == "cuda" and host.device("auto") != "cuda":
        console.say("warning: there is no NVIDIA driver here; `sievit run` would refuse device: cuda")
    _write(path, starter(path.parent.name, wish, census))
    console.result({"path": str(path), "data": _document(source, census)}, draw)


def _asked(console: Console, question: str, usual: str, parse: Callable[[str], Answer]) -> Answer:
    """The answer to a question, asked again until it can be understood."""
    while True:
        text = typer.prompt(question, default=usual, err=True)
        try:
            return parse(str(text).strip())
        except (InputError, UsageError, InvalidInput) as error:
            hint = str(getattr(error, "hint", ""))
            console.say(f"error: {error}{f'; {hint}' if hint else ''}")


def _suits_own(wish: Wish, census: Census | None) -> bool:
    """Whether the starter would take a small network of its own."""
    return "pretrained: false" in starter("", wish, census)


def _model(text: str) -> Model:
    """What timm knows of a model. InvalidInput for one that it does not have, or of a family that does not go
    through.
    """
    if text == PHOTO_MODEL.name:
        return PHOTO_MODEL  # known without importing torch
    from .vision.network import trained_size

    return Model(text, *trained_size(text))


def _target(text: str) -> Target:
    from pydantic import ValidationError

    from .targets import Target

    kind, equals, value = text.partition("=")
    try:
        return Target.model_validate({kind.strip(): float(value)})
    except ValidationError as error:
        first = error.errors()[0]
        why = "" if first["type"] == "extra_forbidden" else f": {first['msg'].lower()}"
        raise UsageError(f"{text!r} is no target{why}", hint=f"such as {TARGETS}") from error
    except ValueError as error:
        what = "its value is no number" if equals else "it has no value"
        raise UsageError(f"{text!r} is no target: {what}", hint=f"such as {TARGETS}") from error


def _device(text: str) -> Device:
    if text not in DEVICES:
        raise UsageError(f"there is no device {text!r}", hint=suggest(text, DEVICES, kind="devices"))
    return text


def _looked_at(console: Console, data: str, base: Path) -> tuple[str, Census | None]:
    """(the source as pipeline.yaml must say it, what is in it). Names stay as they are, and what would have to be
    fetched is not looked at; paths become relative to the file's folder where they can be.
    """
    if data.startswith(READERS):
        if data.startswith("builtin:") and data != DIGITS:
            raise InputError(f"there is no {data}", hint=f"the one built-in data set is {DIGITS}")
        return data, None
    path = Path(data).expanduser().resolve()
    if not path.exists():
        raise InputError(f"no data at {data}", hint=SOURCES)
    console.say(f"looking at {printable(data)} ...")
    from sievit.pipeline.settings import DataConfig

    from .vision.census import take_census

    census = take_census(str(path), base, max_megapixels=DataConfig.model_fields["max_megapixels"].default)
    if not census.sides:
        raise InputError(
            f"none of the {census.looked} images looked at in {data} can be read: {census.broken[0]}",
            hint="give images that can be opened",
        )
    source = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
    return source, census


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", hint="give this user the right to write there, or name another"
        ) from error


def _document(source: str, census: Census | None) -> dict[str, Any]:
    if census is None:
        return {"source": source, "looked_at": 0}
    return {
        "source": source,
        "classes": census.images,
        "images": census.total,
        "test_images": census.test,
        "looked_at": census.looked,
        "median_side": census.side,
        "broken": list(census.broken),
    }


def draw(document: dict[str, Any]) -> RenderableType:
    """What was seen, and what to do next."""
    from rich.console import Group

    from sievit.pipeline.drawing import line

    data = document["data"]
    parts: list[RenderableType] = []
    if classes := data.get("classes"):
        of = data["images"] + (data["test_images"] or 0)
        few, many = min(classes.values()), max(classes.values())
        each = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        parts.append(
            line(f"{of:,} images in {len(classes):,} classes, {each} each, {data['median_side']} px the median")
        )
        broken = data["broken"]
        seen = "looked at all of them" if data["looked_at"] == of else f"looked at {data['looked_at']:,} of them"
        parts.append(line(f"{seen}, {len(broken) or 'none'} broken", "yellow" if broken else ""))
        parts += [line(f"  {text}", "yellow") for text in broken[:SHOWN]]
        if len(broken) > SHOWN:
            parts.append(line(f"  and {len(broken) - SHOWN} more: --json has them", "yellow"))
    parts += [line(f"wrote {document['path']}"), line(f"next:  sievit plan {document['path']}")]
    return Group(*parts)
