"""The sidecar: model.json beside model.onnx, all that a user needs to classify images with that file.

It holds the names of input and output, the preprocessing, what the scores are, the class names and the SHA-256 of the
ONNX file. An ONNX file without its preprocessing loses points of accuracy that look like damage, so the two are
written, read and checked together. Reading needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..methods import InvalidInput

SCHEMA = 1
AGAIN = "mend it, or take the sidecar that `export` wrote beside the file"
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float16", "uint8")
RESIZES = ("nearest", "bilinear", "bicubic", "lanczos")
CROPS = ("none", "center")
Scores = Literal["logits", "probabilities", "log_probabilities"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a picture to the network's input: resize, crop, scale, subtract mean, divide by std."""

    size: int  # pixels, square
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: str = "bilinear"
    crop: str = "none"  # none: squeeze to the square; center: shorter side to size / crop_pct, then the middle
    crop_pct: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """As it stands in a sidecar."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @property
    def sha256(self) -> str:
        """Of the canonical JSON: equal preprocessings have equal digests, in whichever file they stand."""
        canonical = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of model.json, checked."""

    input: str
    output: str
    layout: str  # "NCHW" or "NHWC"
    dtype: str  # of the input: "float32", "float16", or "uint8" of a file that does scale, mean and std itself
    scores: Scores  # what the output holds
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    precision: str  # "fp32", "fp16" or "int8"
    parameters: int
    macs: int | None  # multiply-accumulates for one image; None: not known
    opset: int
    sha256: str
    source: Mapping[str, Any]
    raw: Mapping[str, Any]

    @property
    def image(self) -> tuple[int, int, int]:
        """The input's dimensions after the batch, as the layout orders them."""
        channels, size = len(self.preprocessing.mean), self.preprocessing.size
        return (size, size, channels) if self.layout == "NHWC" else (channels, size, size)


def sidecar_path(onnx_path: Path) -> Path:
    """model.onnx -> model.json."""
    return onnx_path.with_suffix(".json")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sidecar(onnx_path: Path, *, check_digest: bool = True) -> Sidecar:
    """The sidecar of an ONNX file. Raises InvalidInput when it is missing, malformed, or describes another file."""
    path = sidecar_path(onnx_path)
    if not path.is_file():
        raise InvalidInput(f"{onnx_path.name} has no sidecar {path.name}", "keep the .json that was written beside it")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}", "restore it from the artifact it came with") from None
    sidecar = _parse(raw, path)
    if check_digest and (found := sha256_of(onnx_path)) != sidecar.sha256:
        raise InvalidInput(
            f"{onnx_path} is not the file that {path.name} describes: SHA-256 {found[:12]}… instead of "
            f"{sidecar.sha256[:12]}…",
            "one of the two was changed or damaged: take both from the same artifact",
        )
    return sidecar


def _parse(raw: object, path: Path) -> Sidecar:
    fields = _Fields(raw, str(path))
    if (schema := fields.number("schema")) != SCHEMA:
        raise InvalidInput(f"{path}: schema {schema} is not known (expected {SCHEMA})", "update sievit")
    layout, dtype = fields.text("layout", "NCHW"), fields.text("dtype", "float32")
    if layout not in LAYOUTS or dtype not in DTYPES:
        raise InvalidInput(
            f"{path}: layout {layout!r} and dtype {dtype!r} are not known",
            f"layout is one of {', '.join(LAYOUTS)}, dtype one of {', '.join(DTYPES)}",
        )
    stated = fields.text("scores", "logits")  # sidecars from before this field mean logits
    scores: Scores | None = next((one for one in get_args(Scores) if one == stated), None)
    if scores is None:
        raise InvalidInput(f"{path}: scores {stated!r} are not known", f"one of {', '.join(get_args(Scores))}")
    preprocessing = parse_preprocessing(fields.value("preprocessing"), f"{path}: preprocessing")
    if fields.text("preprocessing_sha256", preprocessing.sha256) != preprocessing.sha256:
        raise InvalidInput(
            f"{path}: preprocessing is not what preprocessing_sha256 was taken of",
            "it was changed by hand: restore it from the artifact it came with",
        )
    return Sidecar(
        input=fields.text("input"),
        output=fields.text("output"),
        layout=layout,
        dtype=dtype,
        scores=scores,
        preprocessing=preprocessing,
        classes=tuple(str(name) for name in fields.items("classes")),
        precision=fields.text("precision"),
        parameters=int(fields.number("parameters")),
        macs=None if fields.fields.get("macs") is None else int(fields.number("macs")),
        opset=int(fields.number("opset")),
        sha256=fields.text("sha256"),
        source=fields.value("source", {}),
        raw=fields.fields,
    )


def parse_preprocessing(raw: object, where: str) -> Preprocessing:
    """Checked preprocessing; mean and std must have the same length, std must be positive. Raises InvalidInput."""
    fields = _Fields(raw, where)
    resize, crop = fields.text("resize", "bilinear"), fields.text("crop", "none")
    mean, std = _floats(fields, "mean"), _floats(fields, "std")
    size, crop_pct = int(fields.number("size")), float(fields.number("crop_pct", 1.0))
    if resize not in RESIZES:
        raise InvalidInput(f"{where}: resize {resize!r} is not one of {', '.join(RESIZES)}", AGAIN)
    if crop not in CROPS:
        raise InvalidInput(f"{where}: crop {crop!r} is not one of {', '.join(CROPS)}", AGAIN)
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise InvalidInput(f"{where}: mean and std need 1 or 3 numbers each, and std more than 0", AGAIN)
    if size < 1 or not 0 < crop_pct <= 1:
        raise InvalidInput(f"{where}: size must be at least 1 and crop_pct in (0, 1]", AGAIN)
    return Preprocessing(
        size=size,
        scale=float(fields.number("scale", 1 / 255)),
        mean=mean,
        std=std,
        resize=resize,
        crop=crop,
        crop_pct=crop_pct,
    )


def _floats(fields: _Fields, name: str) -> tuple[float, ...]:
    values = fields.items(name)
    if not all(_is_number(value) for value in values):
        raise InvalidInput(f"{fields.where}: {name} must be a list of finite numbers", AGAIN)
    return tuple(float(value) for value in values)


def _is_number(value: object) -> bool:
    """JSON has true among its numbers for Python, and NaN, Infinity and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class _Fields:
    """Typed access to a mapping read from JSON; every miss is an InvalidInput that names the field."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise InvalidInput(f"{where}: expected an object", AGAIN)
        self.fields: Mapping[str, Any] = raw
        self.where = where

    def value(self, name: str, default: Any = None) -> Any:
        found = self.fields.get(name, default)
        if found is None:
            raise InvalidInput(f"{self.where}: {name} is missing", AGAIN)
        return found

    def text(self, name: str, default: str | None = None) -> str:
        found = self.value(name, default)
        if not isinstance(found, str):
            raise InvalidInput(f"{self.where}: {name} must be a text", AGAIN)
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.value(name, default)
        if not _is_number(found):
            raise InvalidInput(f"{self.where}: {name} must be a finite number", AGAIN)
        return found  # type: ignore[no-any-return]

    def items(self, name: str) -> Sequence[Any]:
        found = self.value(name)
        if not isinstance(found, list | tuple):
            raise InvalidInput(f"{self.where}: {name} must be a list", AGAIN)
        return found
