"""`sievit predict`: classify images with a packed model, as `predict.py` in the pack does, and without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sievit.pipeline import completion, options
from sievit.pipeline.errors import InputError, SievitError
from sievit.pipeline.session import session_of, written_store

from . import products
from .methods import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from .deploy.scorer import Score
    from .deploy.sidecar import Sidecar

AT_ONCE = 32  # images in memory

Answer = dict[str, Any]


def predict(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="a packed folder, an .onnx file, an artifact or an arm",
            autocompletion=completion.arms_and_refs,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="files, and folders of them")],
    *,
    top: Annotated[int, typer.Option("--top", metavar="K", min=1, help="how many classes of each image")] = 5,
    store: options.StoreFolder = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="a JSON document a line, one an image", rich_help_panel=options.OUTPUT),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Classify images with a packed model: the likeliest classes and their probabilities.

    MODEL is a folder that `sievit pack` made, an .onnx file with its sidecar .json, an artifact (quantize@3) or an arm
    (main: its last file in the newest whole run). Probabilities are the softmax of the scores; a file that ends in a
    softmax or sigmoid of its own gives them itself. Of a folder all images below it are taken, by their names' endings.
    What cannot be read is told, and the other images are answered; the exit code is then 3.

        sievit predict digits-int8 photo.jpg more/ --top 3
        sievit predict quantize@latest photos/ --json
    """
    from .deploy.bundle import open_bundle, weight_files
    from .deploy.child import ChildFailed
    from .deploy.packing import check_pack
    from .deploy.scorer import scorer
    from .deploy.sidecar import sidecar_path

    session = session_of(context)
    console = session.console
    console.by_line = True
    product = products.find(model, written_store(store), session.stages)
    sidecar = open_bundle(product.path).sidecar
    check_pack(product.path.parent, [product.path.name, sidecar_path(product.path).name, *weight_files(product.path)])
    assert sidecar is not None
    answers: list[Answer] = []
    try:
        with scorer(product.path) as score:
            for answer in answered(listed(images), sidecar, score, top):
                if "error" in answer:
                    console.say(f"error: {answer['image']}: {answer['error']['message']}")
                console.piece(answer)
                answers.append(answer)
    except ChildFailed as error:
        raise SievitError(str(error), where=str(product.path), hint="export the model again, or try another") from error
    if not console.json and any("classes" in answer for answer in answers):
        console.result({"images": answers}, draw)
    if failed := sum("error" in answer for answer in answers):
        raise InputError(
            f"{failed} of {len(answers)} could not be classified", hint="mend or leave out what is named above"
        )


def listed(images: Iterable[Path]) -> Iterator[Path | Answer]:
    """The files, those of folders in order of their names; in place of what cannot be listed, what is wrong with it."""
    from .vision.decode import ENDINGS

    for path in images:
        if not path.is_dir():
            yield path
            continue
        closed: list[OSError] = []
        found = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path, onerror=closed.append)
            for name in names
            if name.lower().endswith(ENDINGS)
        )
        yield from found
        for error in closed:
            yield _wrong(Path(error.filename), f"the folder cannot be read ({error.strerror})")
        if not found and not closed:
            yield _wrong(path, f"the folder holds no image (looked for {', '.join(ENDINGS)})")


def answered(paths: Iterable[Path | Answer], sidecar: Sidecar, score: Score, top: int) -> Iterator[Answer]:
    """An answer for each path, in their order: image and classes, or image and error."""
    waiting: list[Answer | tuple[Path, NDArray[np.uint8]]] = []
    for path in paths:
        waiting.append(_pixels(path, sidecar) if isinstance(path, Path) else path)
        if len(waiting) == AT_ONCE:
            yield from _scored(waiting, sidecar, score, top)
            waiting = []
    yield from _scored(waiting, sidecar, score, top)


def _pixels(path: Path, sidecar: Sidecar) -> Answer | tuple[Path, NDArray[np.uint8]]:
    """The image in the network's size, or what is wrong with it."""
    import numpy as np

    from sievit.pipeline.settings import DataConfig

    from .deploy.preprocess import fit
    from .vision.decode import BadImage, picture

    if path.exists() and not path.is_file():
        return _wrong(path, "neither a file nor a folder")
    try:
        with path.open("rb") as file:
            pixels = np.asarray(picture(file, DataConfig.model_fields["max_megapixels"].default))
    except OSError as error:
        return _wrong(path, f"cannot be opened ({error.strerror})")
    except BadImage as error:
        return _wrong(path, str(error))
    return path, fit(pixels, sidecar.preprocessing)


def _scored(
    waiting: Sequence[Answer | tuple[Path, NDArray[np.uint8]]], sidecar: Sidecar, score: Score, top: int
) -> Iterator[Answer]:
    import numpy as np

    readable = [each[1] for each in waiting if isinstance(each, tuple)]
    found = iter(_checked(score(np.stack(readable)), sidecar) if readable else ())
    for each in waiting:
        yield _ranked(each[0], next(found), sidecar, top) if isinstance(each, tuple) else each


def _checked(scores: NDArray[np.float32], sidecar: Sidecar) -> NDArray[np.float32]:
    """Raises InvalidInput when the file leaves open how many scores it gives, and they are not one a class."""
    if scores.ndim != 2 or scores.shape[1] != len(sidecar.classes):
        shape = list(scores.shape[1:])
        raise InvalidInput(
            f"the model gives scores of shape {shape} for an image, its sidecar names {len(sidecar.classes)} classes",
            "take both from the same artifact",
        )
    return scores


def _ranked(path: Path, scores: NDArray[np.float32], sidecar: Sidecar, top: int) -> Answer:
    import numpy as np

    from .deploy.predict import probabilities

    if not np.isfinite(scores).all():
        return _wrong(path, "the network's scores for it are no numbers (overflow)")
    (shares,) = probabilities(scores[None], sidecar.scores)
    best = np.argsort(-shares, kind="stable")[:top]
    return {
        "image": str(path),
        "classes": [
            {"class": sidecar.classes[place], "index": int(place), "probability": float(shares[place])}
            for place in best
        ],
    }


def _wrong(path: Path, message: str) -> Answer:
    return {"image": str(path), "error": {"code": InputError.exit_code, "message": message}}


def draw(document: dict[str, Any]) -> RenderableType:
    """The images that were answered, a line a class."""
    from sievit.pipeline.drawing import table
    from sievit.pipeline.report.numbers import percent

    rows = [
        ("" if place else answer["image"], each["class"], percent(each["probability"]))
        for answer in document["images"]
        for place, each in enumerate(answer.get("classes", ()))
    ]
    return table("image", "class", "probability", rows=rows, right={"probability"})
