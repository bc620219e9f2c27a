"""`sievit pack`: one folder with all that somebody needs who has the model and nothing else of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sievit.pipeline import completion, options
from sievit.pipeline.session import session_of, written_store

from . import adopt, products
from .methods import InvalidInput

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sievit.pipeline.store import Artifact, Store

    from .card import Facts, Measured
    from .deploy.bundle import Bundle
    from .products import Product

SIDECAR, CLASSES, CARD, PROGRAM = "model.json", "classes.txt", "README.md", "predict.py"


def pack(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="an arm of the newest whole run, an artifact, or an .onnx file",
            autocompletion=completion.arms_and_refs,
        ),
    ] = "main",
    *,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="where it goes: new, or empty")],
    zip_: Annotated[bool, typer.Option("--zip", help="FOLDER.zip beside it, too")] = False,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Pack a model to hand over: file, preprocessing, classes, card, program, checksums.

    MODEL is an arm (its last file in the newest run that has made those of all arms), an artifact (quantize@3), a run
    (5f3a91, 5f3a91/dense), or an .onnx file with its sidecar .json. The folder holds:

        model.onnx    with any weights that it keeps beside it
        model.json    the preprocessing and all else that a program must know
        classes.txt   class names, one a line, in the order of the scores
        README.md     the model card: accuracy and latency with intervals and the host, from the benchmark that measured
                      this very file (found by its SHA-256), what it was made from, licences as far as they are known
        predict.py    classifies images with onnxruntime, numpy and pillow alone, in 30 lines at most
        SHA256SUMS    for sha256sum -c

    The same file gives the same bytes, the zip too. A folder that is not empty is refused, and nothing is left
    half-written.

        sievit pack --output digits-int8 --zip
    """
    from .deploy.packing import require_room

    session, place = session_of(context), written_store(store)
    folder = output.expanduser().absolute()
    archive = folder.with_name(f"{folder.name}.zip") if zip_ else None
    require_room(folder, archive)
    product = products.find(model, place, session.stages)
    session.console.result(packed(product, place, folder, archive), draw)


def packed(product: Product, store: Store, folder: Path, archive: Path | None) -> dict[str, Any]:
    """Write the pack of a file and say what is in it. Raises InvalidInput for a file that cannot be handed over."""
    from .card import card
    from .deploy.bundle import open_bundle
    from .deploy.packing import write_pack
    from .deploy.sidecar import sidecar_path
    from .deploy.standalone import program

    bundle = open_bundle(product.path)
    assert bundle.sidecar is not None  # it is required
    if taken := {products.MODEL, SIDECAR, CLASSES, CARD, PROGRAM, "SHA256SUMS"}.intersection(bundle.weights):
        raise InvalidInput(
            f"{product.path} keeps weights in a file named {min(taken)}, which a pack has another use for",
            "save the weights under another name",
        )
    facts = _facts(product, bundle, store)
    contents: dict[str, bytes | Path] = {
        products.MODEL: product.path,
        **{name: product.path.parent / name for name in bundle.weights},
        SIDECAR: sidecar_path(product.path),
        CLASSES: _lines(facts.classes),
        CARD: card(facts).encode(),
        PROGRAM: program(bundle.sidecar, bundle.signature.dtype, bundle.signature.shape[0]).encode(),
    }
    write_pack(folder, contents, archive, root=f"{facts.name}-{facts.sha256[:8]}")
    return {
        "folder": str(folder),
        "zip": str(archive) if archive else None,
        "model": product.artifact.ref if product.artifact else str(product.path),
        "sha256": facts.sha256,
        "measured": facts.measured.ref if facts.measured else None,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }


def _lines(classes: Sequence[str]) -> bytes:
    if broken := next((name for name in classes if "".join(name.splitlines()) != name), None):
        raise InvalidInput(
            f"the class name {broken!r} holds a line break, and {CLASSES} has a class a line", "rename that class"
        )
    return "".join(f"{name}\n" for name in classes).encode()


def _facts(product: Product, bundle: Bundle, store: Store) -> Facts:
    from .card import Facts

    sidecar, artifact = bundle.sidecar, product.artifact
    assert sidecar is not None
    made: Mapping[str, Any] = artifact.manifest if artifact else {}
    lineage = list(_lineage(artifact, store)) if artifact else _stated(sidecar.source)
    # A pipeline that adopts a file has a model block too, of defaults, which that file has nothing to do with.
    adopted = any(each.get("stage") == adopt.STAGE.name for each in lineage)
    model = {} if adopted else made.get("model") or {}
    return Facts(
        name=f"{made['pipeline']}-{made['arm']}" if made else product.path.stem,
        sha256=bundle.sha256,
        size=bundle.bytes,
        signature=bundle.signature.text(),
        opset=bundle.opset,
        precision=sidecar.precision,
        parameters=sidecar.parameters,
        macs=sidecar.macs,
        classes=sidecar.classes,
        preprocessing=asdict(sidecar.preprocessing),
        files={
            products.MODEL: "the network",
            **dict.fromkeys(bundle.weights, "its weights"),
            SIDECAR: "names of input and output, preprocessing, class names, digest of the network",
            CLASSES: "class names, in the order of the scores",
            PROGRAM: "classifies images",
            "SHA256SUMS": "checksums of all of these",
        },
        measured=measured(store, bundle.sha256, made.get("arm")),
        lineage=lineage,
        model=model,
        data=_public((made.get("data") or {}).get("source")),
        weights_licence=_licence(model),
        scores=sidecar.scores,
    )


def _public(source: str | None) -> str | None:
    """The name of a data set; of a folder or tar its last part alone, since where it lies is nobody else's business."""
    if source is None or source.startswith(("builtin:", "torch/", "hfds/")):
        return source
    return Path(source).name


def _stated(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a sidecar says that its file was made from."""
    return [source] if all(isinstance(source.get(name), str) for name in ("stage", "key", "digest")) else []


def measured(store: Store, sha256: str, arm: str | None) -> Measured | None:
    """The newest benchmark that measured a file of this digest, None where there is none. A file that several arms
    have in common has a row of each; its own arm's are taken where they are there.
    """
    from .card import Measured

    for artifact in sorted(store.artifacts("benchmark"), key=lambda each: str(each.manifest["created"]), reverse=True):
        rows = [row for row in artifact.metrics.get("rows", ()) if row.get("sha256") == sha256]
        if rows:
            owner = arm if arm in {row["arm"] for row in rows} else rows[0]["arm"]
            own = [row for row in rows if row["arm"] == owner]
            settings = {(row["provider"], row["batch"], row["threads"], row.get("io")): row for row in own}
            created = str(artifact.manifest["created"])
            return Measured(artifact.ref, artifact.key, created, list(settings.values()), artifact.metrics)
    return None


def _lineage(artifact: Artifact, store: Store) -> Iterator[dict[str, Any]]:
    """What it was made from, nearest first, each once; what gc has removed still has its name."""
    waiting: list[dict[str, Any]] = [
        {name: artifact.manifest[name] for name in ("stage", "key", "digest", "arm", "entry")}
    ]
    seen: set[str] = set()
    while waiting:
        each = waiting.pop(0)
        if each["key"] in seen:
            continue
        seen.add(each["key"])
        yield each
        known = store.find(each["stage"], each["key"])
        inputs = known.manifest["inputs"].values() if known else ()
        waiting += [one for given in inputs for one in (given if isinstance(given, list) else [given])]


def _licence(model: Mapping[str, Any]) -> str | None:
    """The licence that timm states of pretrained weights; None where it states none, or the weights are no such."""
    if not model.get("pretrained") or model.get("weights"):
        return None
    from timm.models import get_pretrained_cfg

    try:
        known = get_pretrained_cfg(model["name"])
    except RuntimeError:  # no such tag
        return None
    return getattr(known, "license", None) or None


def draw(document: dict[str, Any]) -> RenderableType:
    """The folder, what is in it, and what to do with it."""
    from rich.console import Group

    from sievit.pipeline.drawing import line, table
    from sievit.pipeline.report.numbers import size

    rows = [(name, size(bytes_)) for name, bytes_ in document["files"].items()]
    measurement = f"measured by {document['measured']}" if document["measured"] else "not measured: the card says so"
    parts: list[RenderableType] = [
        line(f"packed {document['model']} ({measurement})", "green"),
        table("file", "size", rows=rows, right={"size"}),
        line(f"in {document['folder']}"),
    ]
    return Group(*parts, *([line(f"and {document['zip']}")] if document["zip"] else []))
