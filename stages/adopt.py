"""Take an ONNX file from elsewhere: checked, described and proven to answer, so that `quantize`, `benchmark`, `pack`
and `compare` work on it as on a file of our own.

    stages:
      adopt:     {file: vit.onnx}
      quantize:  {}
      benchmark: {}

What must be known beside the file is its preprocessing: `data.mean` and `data.std` state it, unless the file takes
uint8 pixels or `sidecar` names the .json that Sievit wrote beside it. Pictures are made by the data set's rule: shorter
side to `data.image_size`, the centre cut out. Its scores must stand in the order of the data's classes (folders by
name). `labels` gives them other names, one a line. Whether they are logits or probabilities already is read from the
operator that the file ends with (Softmax, LogSoftmax, Sigmoid); model.json says it to all who show probabilities.
Where a file has several outputs, `output` names the one that holds the scores, and the others are left out. Operators
that stand out of order are put in order. Otherwise the file stays as it is, byte for byte.

Whatever decides about the result is named in the settings (`file`, `sidecar`, `weights`, `labels`): the key stands for
what these files hold, wherever they lie.

Nothing of the file runs in this process. A child with a time limit classifies the calibration split; a file that
crashes, loops or answers with numbers that are none is refused. Top-1 near chance is told as a warning: then the mean,
the std or the order of the classes is not the file's.

reads    the file, its sidecar, files that hold its weights; the calibration split
writes   model.onnx, model.json (input, preprocessing, scores, classes, precision, size, MACs, digests), its weights as
         they lie

    sievit run pipeline.yaml --until adopt
    sievit adopt pipeline.yaml --set adopt.file=vit.onnx
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from sievit.pipeline.errors import SievitError
from sievit.pipeline.stage import Config, Context, Preflight, Stage

from .methods import InvalidInput

if TYPE_CHECKING:
    from .deploy.bundle import Bundle
    from .deploy.sidecar import Preprocessing
    from .vision.dataset import Images

Text = Annotated[str, Field(min_length=1)]
LARGEST_LABELS = 10_000_000  # bytes
OURS = ("model.onnx", "model.json")


class AdoptConfig(Config):
    """Which file, and what goes with it."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"timeout"})

    file: Text = Field(description="the .onnx file; paths are meant from the folder of pipeline.yaml")
    weights: tuple[Text, ...] = Field(
        default=(), description="the files that hold its weights, where they lie beside it and not in it"
    )
    sidecar: Text | None = Field(
        default=None, description="the .json that Sievit wrote beside a file of its own, where there is one"
    )
    labels: Text | None = Field(
        default=None, description="text file with a name a line, in the order of the scores; null: the data's classes"
    )
    output: Text | None = Field(
        default=None, description="which of its outputs holds the scores; null: the first, and others go with it"
    )
    timeout: float = Field(default=300.0, ge=1, le=86_400, description="seconds after which a silent process is ended")


def run(ctx: Context) -> None:
    """Check, copy, describe, try; see the module's docstring."""
    from .deploy.bundle import open_bundle, write_sidecar
    from .deploy.graph_macs import graph_macs
    from .deploy.variants import Variant
    from .vision.dataset import load_split

    config: AdoptConfig = ctx.config
    bundle = _opened(config, ctx.base, ctx.data)
    preprocessing = _preprocessing(bundle, ctx.data)
    images = load_split(ctx.data.model_dump(), ctx.base, "calibration")
    names = _names(config, ctx.base, bundle, images.classes)
    path = ctx.out / "model.onnx"
    with ctx.progress.task(f"adopting {bundle.path.name}", 2) as task:
        _copied(bundle, path, config.output)
        for name in _beside(config, ctx.base, bundle):
            (ctx.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path.parent / name, ctx.out / name)
        size = preprocessing.size
        channels = len(preprocessing.mean)
        image = (size, size, channels) if bundle.signature.layout == "NHWC" else (channels, size, size)
        macs = graph_macs(path, image)
        made = open_bundle(path, sidecar_required=False)
        write_sidecar(
            path,
            preprocessing=preprocessing.as_json(),
            classes=names,
            precision=Variant("", "", True, bundle).precision,
            parameters=made.parameters,
            macs=macs,
            source={"file": bundle.path.name, "sha256": bundle.sha256},
            scores=None if bundle.sidecar is None else bundle.sidecar.scores,
        )
        task.advance()
        found = _tried(path, images, config.timeout)
        task.advance()
    ctx.metrics |= {
        "file": bundle.path.name,
        "sha256": bundle.sha256,
        "signature": made.signature.text(),
        "opset": made.opset,
        "nodes": dict(made.nodes),
        "bytes": made.bytes,
        "parameters": made.parameters,
        "macs": macs,
        "top1": found.top1,
        "judged_on": {"split": "calibration", "images": found.images},
    }
    chance = 1 / len(names)
    if found.low <= chance:
        ctx.progress.warn(
            f"{bundle.path.name} is right on {found.top1:.1%} of {found.images} calibration images, by chance it were "
            f"{chance:.1%}: are data.mean, data.std and the order of the classes its own?"
        )


def _opened(config: AdoptConfig, base: Path, data: Any) -> Bundle:
    """The checked file, of the data's image size. Raises InvalidInput with the setting that is wrong."""
    from .deploy.bundle import open_bundle
    from .deploy.sidecar import sidecar_path

    path = base / Path(config.file).expanduser()
    beside = sidecar_path(path)
    named = None if config.sidecar is None else base / Path(config.sidecar).expanduser()
    if named is None and beside.is_file():  # unnamed, a change of it would go unseen
        raise InvalidInput(
            f"{beside} lies beside the file",
            f"set sidecar: {Path(config.file).with_suffix(beside.suffix)}, or take it away if it is none",
            field="file",
        )
    if named is not None and named.resolve() != beside.resolve():
        raise InvalidInput(f"{named} is not {beside.name} beside the file", "put it there", field="sidecar")
    bundle = open_bundle(path, sidecar_required=named is not None, output=config.output)
    if bundle.sidecar is not None and bundle.sidecar.preprocessing.size != data.image_size:
        raise InvalidInput(
            f"{sidecar_path(path)} asks for pictures of {bundle.sidecar.preprocessing.size} px, data.image_size is "
            f"{data.image_size}",
            f"set data.image_size to {bundle.sidecar.preprocessing.size}",
            field="data.image_size",
        )
    shape = bundle.signature.shape
    sides = shape[1:3] if bundle.signature.layout == "NHWC" else shape[2:4]
    if any(side not in (None, data.image_size) for side in sides):
        raise InvalidInput(
            f"{path} takes {bundle.signature.text()}, data.image_size is {data.image_size}",
            "set data.image_size as the file has it; pictures are square",
            field="data.image_size",
        )
    return bundle


def _copied(bundle: Bundle, target: Path, output: str | None) -> None:
    """The file as it is, unless its operators are out of order or one of several outputs is asked for: then that one
    alone, and what leads to it.
    """
    import onnx

    from .deploy.attention_fusion import remove_unread
    from .deploy.bundle import load_checked

    model = load_checked(bundle.path)
    if output is not None:
        for value in [value for value in model.graph.output if value.name != output]:
            model.graph.output.remove(value)
        remove_unread(model)
    if model == onnx.load(bundle.path, load_external_data=False):
        shutil.copyfile(bundle.path, target)
    else:
        target.write_bytes(model.SerializeToString(deterministic=True))


def _preprocessing(bundle: Bundle, data: Any) -> Preprocessing:
    """What the sidecar says, else what the data block says; never a guess."""
    from .deploy.sidecar import Preprocessing
    from .vision.decode import PICTURE

    stated = {name: getattr(data, name) for name in ("mean", "std") if getattr(data, name) is not None}
    if bundle.sidecar is not None:
        found = bundle.sidecar.preprocessing
        asked = {name: found.as_json()[name] for name in PICTURE}
        if asked != PICTURE:
            raise InvalidInput(
                f"the sidecar of {bundle.path} makes pictures by {asked}, the data by {PICTURE}",
                "a file is measured on pictures as it was trained on; export it with the data set's rule",
                field="file",
            )
        for name, value in stated.items():
            if tuple(value) != getattr(found, name):
                raise InvalidInput(
                    f"data.{name} is {list(value)}, the sidecar of {bundle.path} says {list(getattr(found, name))}",
                    f"leave data.{name} out: the sidecar is the file's own",
                    field=f"data.{name}",
                )
        return found
    layout, shape = bundle.signature.layout, bundle.signature.shape
    channels = (shape[3] if layout == "NHWC" else shape[1]) or 3
    if bundle.signature.dtype == "uint8":  # it takes the bytes and does the rest itself
        return Preprocessing(data.image_size, mean=(0.0,) * channels, std=(1.0,) * channels, **PICTURE)
    for name in ("mean", "std"):
        if name not in stated:
            raise InvalidInput(
                f"{bundle.path} has no sidecar, and data.{name} is not stated: how its pictures are normalised is not "
                "known",
                "state data.mean and data.std as it was trained with, such as [0.485, 0.456, 0.406] and "
                "[0.229, 0.224, 0.225]",
                field=f"data.{name}",
            )
    mean, std = (tuple(stated[name][:channels]) for name in ("mean", "std"))
    if channels == 1 and len({*stated["mean"]}) + len({*stated["std"]}) > 2:
        raise InvalidInput(
            f"{bundle.path} takes one channel, data.mean and data.std differ between channels",
            "state the same number three times",
            field="data.mean",
        )
    return Preprocessing(data.image_size, mean=mean, std=std, **PICTURE)


def _names(config: AdoptConfig, base: Path, bundle: Bundle, classes: Sequence[str]) -> Sequence[str]:
    """Of the scores, in their order. Raises InvalidInput where they are not as many as the data's classes."""
    names: Sequence[str] = classes if bundle.sidecar is None else bundle.sidecar.classes
    scores = bundle.signature.output_shape[-1] if bundle.signature.output_shape else None
    if scores is not None and scores != len(classes):
        told, outputs = "give it the data that it was trained for", bundle.signature.outputs
        if fitting := [name for name, shape in outputs.items() if len(shape) == 2 and shape[1] in (None, len(classes))]:
            told = f"its outputs are {', '.join(outputs)}; set output: {fitting[0]}"
        raise InvalidInput(
            f"{bundle.path} has {scores} scores an image, the data has {len(classes)} classes",
            told,
            field="file",
        )
    if config.labels is not None:
        names = _lines(base / Path(config.labels).expanduser())
    if len(names) != len(classes):
        where = config.labels or f"the sidecar of {bundle.path}"
        raise InvalidInput(
            f"{where} names {len(names)} classes, the data has {len(classes)}",
            "one name a line, in the order of the scores",
            field="labels" if config.labels else "file",
        )
    if bundle.sidecar is not None and config.labels is None and tuple(names) != tuple(classes):
        other = next(f"{a!r}, {b!r}" for a, b in zip(names, classes, strict=True) if a != b)
        raise InvalidInput(
            f"the sidecar of {bundle.path} and the data name classes otherwise, first {other}",
            "measure it on the data it was trained for; if only names differ, give them as `labels`",
            field="file",
        )
    return names


def _lines(path: Path) -> list[str]:
    """The names in a text file, without those lines at its end that are empty."""
    try:
        if path.stat().st_size > LARGEST_LABELS:
            raise InvalidInput(f"{path} has more than {LARGEST_LABELS:,} bytes: no list of names", field="labels")
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidInput(f"{path} cannot be read ({reason})", "one name a line, UTF-8", field="labels") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise InvalidInput(f"{path}: line {names.index('') + 1} is empty", "one name a line", field="labels")
    return names


def _beside(config: AdoptConfig, base: Path, bundle: Bundle) -> tuple[str, ...]:
    """Files with weights that go with it. They must be named in `weights`, else a change of theirs would go unseen."""
    found = bundle.weights
    named = {(base / Path(one).expanduser()).resolve() for one in config.weights}
    here = {(bundle.path.parent / name).resolve(): name for name in found}
    if named != set(here):
        told = ", ".join(str(Path(config.file).parent / name) for name in found)
        raise InvalidInput(
            f"{bundle.path} keeps its weights in " + (f"{len(found)} files beside it: {told}" if found else "itself"),
            f"set weights: [{told}]" if found else "leave weights out",
            field="weights",
        )
    if taken := set(found) & set(OURS):
        raise InvalidInput(f"a file with weights may not be called {min(taken)}", "rename it", field="weights")
    return found


def _tried(path: Path, images: Images, timeout_s: float) -> Any:
    """Accuracy on the calibration split, from a process of its own."""
    import numpy as np

    from .deploy.child import ChildFailed
    from .deploy.predict import accuracy
    from .deploy.scorer import scorer

    parts = []
    try:
        with scorer(path, first_s=timeout_s, each_s=0.0) as score:
            for start in range(0, len(images), 256):
                parts.append(score(images.pixels(np.arange(start, min(start + 256, len(images))))))
    except ChildFailed as error:
        raise SievitError(str(error), where=str(path), hint="export the model again, or try another") from error
    scored = np.concatenate(parts)
    if scored.ndim != 2 or scored.shape[1] != len(images.classes):
        raise InvalidInput(
            f"the file answers with scores of shape {list(scored.shape)}, expected "
            f"[{len(images)}, {len(images.classes)}]",
            "set output: to the one of its outputs that holds the scores of the data's classes",
            field="file",
        )
    if not np.isfinite(scored).all():
        bad = int((~np.isfinite(scored).all(axis=1)).sum())
        raise InvalidInput(
            f"the file answers {bad} of {len(images)} calibration images with scores that are no numbers",
            "are data.mean and data.std its own?",
            field="file",
        )
    return accuracy(scored, images.labels)


def _files(config: AdoptConfig) -> Mapping[str, Sequence[str]]:
    one = {"file": config.file, "sidecar": config.sidecar, "labels": config.labels}
    named = {name: (path,) for name, path in one.items() if path is not None}
    return named | ({"weights": config.weights} if config.weights else {})


def preflight(seen: Preflight) -> None:
    """Refuse a file that cannot be adopted before anything runs, as far as it can be seen without running it."""
    from .vision.sources import list_sources

    config: AdoptConfig = seen.config
    try:
        bundle = _opened(config, seen.base, seen.data)
        _preprocessing(bundle, seen.data)
        _beside(config, seen.base, bundle)
        listing, _ = list_sources(seen.data.model_dump(), seen.base)
        _names(config, seen.base, bundle, listing.classes)
    except InvalidInput as error:
        field = error.field or "file"
        error.field = field if field.startswith("data.") else seen.at(field)
        raise


STAGE = Stage(
    name="adopt",
    version=2,
    config=AdoptConfig,
    run=run,
    reads=(),
    writes="onnx",
    manual=__doc__,
    packages=("onnx", "onnxruntime"),
    uses=frozenset({"data"}),
    files=_files,
    preflight=preflight,
)
