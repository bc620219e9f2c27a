"""The forms in which a float file can be served: float or 8-bit by one of three schemes, attention plain or as one
operator, and some of its layers left float. Each is a file, made once and kept in the work folder.

    static    pairs of QuantizeLinear and DequantizeLinear, ranges recorded on calibration images (nncf)
    dynamic   integer products, the activations' range taken anew in each call (ONNX Runtime)
    weights   weights stored in 8 bits and multiplied in float (ONNX Runtime): a quarter of the size, no faster

    plain     attention as the exporter writes it
    fused     products, softmax and transpositions as one operator
    whole     the layer that makes queries, keys and values too; in 8 bits with the dynamic scheme
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import onnx

from .attention_fusion import fuse_attention, fuse_projection
from .bundle import weight_files
from .child import Child
from .isa import instruction_sets
from .quantized_graph import fold_scales, make_unsigned, name_nodes, unquantize
from .sessions import GRAPHICS

Scheme = Literal["static", "dynamic", "weights", "half"]  # half: FP16, which export makes
Attention = Literal["plain", "fused", "whole"]

# With one of these, sums of products of 8-bit numbers are exact.
DOT_PRODUCTS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}


@dataclass(frozen=True, slots=True)
class Form:
    """scheme None: float. alpha: SmoothQuant's strength, None: without. kept_float: names of linear layers."""

    scheme: Scheme | None
    attention: Attention = "plain"
    alpha: float | None = None
    kept_float: frozenset[str] = frozenset()

    @property
    def eight_bit(self) -> bool:
        """Whether its layers are stored in 8 bits."""
        return self.scheme in ("static", "dynamic", "weights")

    def text(self) -> str:
        """As it is shown: "dynamic, attention whole"."""
        words: list[str] = [self.scheme or "float"]
        words += [] if self.alpha is None else [f"SmoothQuant {self.alpha:g}"]
        words += [] if self.attention == "plain" else [f"attention {self.attention}"]
        words += [f"{len(self.kept_float)} layers float"] if self.kept_float else []
        return ", ".join(words)


def record_ranges(
    source: Path,
    target: Path,
    pixels: Path,
    alpha: float | None,
    bits: int,
    timeout_s: float,
    *,
    symmetric: bool = False,
) -> Path:
    """Write `target`, the static form as nncf leaves it, from ranges that it records on images; returns its path.

    pixels: .npy of uint8 [n, size, size, 3]. alpha: SmoothQuant's strength, None: without. bits: of the weights.
    symmetric: zero points of activations are 0. Raises: ChildFailed when the quantizer crashes, takes longer than
    timeout_s or refuses the graph.
    """
    files = {"source": str(source.absolute()), "target": str(target.absolute()), "pixels": str(pixels.absolute())}
    with Child("quantizer", "quantizer", limited=False) as child:
        command = {"do": "static", **files, "alpha": alpha, "bits": bits, "symmetric": symmetric}
        child.ask(command, timeout_s)
    return target


def ranges_on(pixels: Path, source: Path, folder: Path, bits: int, timeout_s: float) -> Callable[[float | None], Path]:
    """For a `Workshop` without a store: `record_ranges` on these images, kept in `folder`, once for each strength."""

    def ranges(alpha: float | None) -> Path:
        target = folder / f"ranges-{alpha}.onnx"
        return target if target.is_file() else record_ranges(source, target, pixels, alpha, bits, timeout_s)

    return ranges


def weight_bits(provider: str = "cpu") -> Literal[7, 8]:
    """8, or 7 on a processor that adds products of 8-bit numbers in pairs of 16 bits, where they saturate."""
    if provider in GRAPHICS:
        return 8
    have = set(instruction_sets())
    return 8 if have & DOT_PRODUCTS or not have & {"avx2", "avx512f"} else 7


class Workshop:
    """Makes the forms of one source; close it, or use it as a context manager.

    timeout_s: of a quantizer's answer. ranges: SmoothQuant's strength -> the file that `record_ranges` writes.
    """

    def __init__(
        self, source: Path, folder: Path, bits: int, timeout_s: float, ranges: Callable[[float | None], Path]
    ) -> None:
        self._source = source
        self._folder = folder
        self._ranges = ranges
        self._bits = bits
        self._timeout_s = timeout_s
        self._child: Child | None = None

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def make(self, form: Form) -> Path | None:
        """The file of a form; None where nothing of the graph could take it.

        Raises: ChildFailed when a quantizer crashes, hangs or refuses the graph.
        """
        target = self._path(form)
        if target.is_file():
            return target
        match form.scheme:
            case None:
                if weight_files(self._source):
                    return None  # more than a file of its own can hold
                model = onnx.load(self._source)
                done = fuse_attention(model) if form.attention == "fused" else bool(fuse_projection(model))
            case "static":
                model, done = onnx.load(self._ranges(form.alpha)), True
                unquantize(model, self._named_source(), form.kept_float)
                fold_scales(model)
                make_unsigned(model)
            case "dynamic":
                base, kept = self._source, set(form.kept_float)
                if form.attention == "whole":
                    fused = self._named_source()
                    taken = fuse_projection(fused)
                    if not taken:
                        return None
                    base = self._folder / "whole.onnx"
                    onnx.save(fused, base)
                    kept = {taken.get(name, name) for name in kept}
                unfused = self._folder / f"unfused-{target.name}"
                made = self._asked("dynamic", unfused, source=base, bits=self._bits, kept_float=sorted(kept))
                model, done = onnx.load(made), True
            case "half":
                raise ValueError("half precision is made by export")
            case "weights":
                model, done = onnx.load(self._asked("weights", self._folder / "weights-raw.onnx")), True
        if form.scheme is not None and form.attention == "fused":
            done = bool(fuse_attention(model))
        if not done:
            return None
        partial = target.with_suffix(".partial")
        onnx.save(model, partial)
        return _whole(partial, target)

    def _path(self, form: Form) -> Path:
        if form == Form(None):
            return self._source
        words: list[str] = [form.scheme or "float", form.attention]
        words += [] if form.alpha is None else [f"{form.alpha:g}"]
        words += [f"{len(form.kept_float)}-{_digest(form.kept_float)}"] if form.kept_float else []
        return self._folder / f"{'-'.join(words)}.onnx"

    def _named_source(self) -> onnx.ModelProto:
        model = onnx.load(self._source)
        name_nodes(model)
        return model

    def _asked(self, do: str, target: Path, source: Path | None = None, **more: object) -> Path:
        """What a quantizer in a process of its own writes."""
        if target.is_file():
            return target
        partial = target.with_suffix(".partial")
        command = {"do": do, "source": str((source or self._source).absolute()), "target": str(partial.absolute())}
        self._child = self._child or Child("quantizer", "quantizer", limited=False)
        self._child.ask(command | more, self._timeout_s)
        return _whole(partial, target)


def _whole(partial: Path, target: Path) -> Path:
    """Give a file its name once it is on the disk: a resumed run takes what has the name for finished."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return partial.replace(target)


def _digest(names: Collection[str]) -> str:
    return sha256("\n".join(sorted(names)).encode()).hexdigest()[:8]
