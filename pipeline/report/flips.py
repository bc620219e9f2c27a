"""Flips: which test images a final file gets wrong that dense gets right, and the reverse; some of them as pictures.

A top-1 alone hides them: 98% before and after can be the same images, or others. From the metrics of the benchmark and
its flips.json; None for a benchmark that kept neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numbers import count, p_equals
from .payload import json_file, photograph
from .reading import mapping, number, objects, text
from .steps import Step

MOST = 24  # pictures; a benchmark keeps no more
MOST_PAIRS = 10  # of classes, the commonest; the others are added up


@dataclass(frozen=True, slots=True)
class Pairing:
    """One final file beside the dense one."""

    name: str
    against: str
    images: float | None
    lost: float | None
    won: float | None
    otherwise: float | None
    agreement: float | None
    p: float | None

    @property
    def sentence(self) -> str:
        """What the counts say, and no more than McNemar's test lets them."""
        if self.lost is None or self.won is None or self.p is None:
            return f"{self.name} against {self.against}: not recorded."
        if not self.lost and not self.won:
            return f"{self.name} and {self.against} get the very same test images right."
        verdict = (
            "these may be chance"
            if self.p >= 0.05
            else "more than chance: it is the worse one"
            if self.lost > self.won
            else "more than chance: it is the better one"
        )
        return (
            f"Of {count(self.images)} test images, {self.name} loses {count(self.lost)} that {self.against} gets "
            f"right, and wins {count(self.won)} that it gets wrong (McNemar's {p_equals(self.p)}; {verdict})."
        )


@dataclass(frozen=True, slots=True)
class Photograph:
    """One flipped image. flip: lost or won."""

    uri: str
    name: str
    truth: str
    dense: str
    final: str
    flip: str


@dataclass(frozen=True, slots=True)
class Flips:
    """All pairings; of the first, that of the shipped file, also pairs of classes and pictures."""

    pairings: tuple[Pairing, ...]
    classes: tuple[tuple[str, str, float | None, float | None, float | None], ...]  # dense, final, images, lost, won
    further: str
    photographs: tuple[Photograph, ...]

    @property
    def lost(self) -> tuple[Photograph, ...]:
        return tuple(one for one in self.photographs if one.flip == "lost")

    @property
    def won(self) -> tuple[Photograph, ...]:
        return tuple(one for one in self.photographs if one.flip == "won")


def flips(measurement: Step | None) -> Flips | None:
    """What the benchmark keeps of them."""
    if measurement is None or not (lines := objects(measurement.metrics, "flips")):
        return None
    kept = json_file(measurement.root, "flips.json")
    first = next(iter(objects(kept, "files")), {})
    pairs = objects(first, "pairs")
    return Flips(
        tuple(map(_pairing, lines)),
        tuple(
            (text(p, "dense"), text(p, "final"), number(p, "images"), number(p, "lost"), number(p, "won"))
            for p in pairs[:MOST_PAIRS]
        ),
        _further(pairs[MOST_PAIRS:], mapping(first, "further")),
        tuple(_photograph(one, measurement) for one in objects(kept, "shown")[:MOST]),
    )


def _pairing(line: Mapping[str, Any]) -> Pairing:
    return Pairing(
        name=file_name(line),
        against=file_name(mapping(line, "against")),
        images=number(line, "images"),
        lost=number(line, "lost"),
        won=number(line, "won"),
        otherwise=number(line, "wrong_otherwise"),
        agreement=number(line, "agreement"),
        p=number(line, "p"),
    )


def file_name(line: object) -> str:
    """main INT8"""
    return " ".join(word for word in (text(line, "arm"), text(line, "variant").upper()) if word) or "a file"


def _photograph(one: Mapping[str, Any], measurement: Step) -> Photograph:
    return Photograph(
        photograph(measurement.root, text(one, "file")),
        *(text(one, name) for name in ("name", "truth", "dense", "final", "flip")),
    )


def _further(left: Sequence[Mapping[str, Any]], rest: Mapping[str, Any]) -> str:
    """What stands in no line of the table: pairs that are too rare for it, and those that the file does not name."""
    pairs = len(left) + (number(rest, "pairs") or 0)
    images = sum(number(pair, "images") or 0 for pair in left) + (number(rest, "images") or 0)
    return f"{count(images)} images more in {count(pairs)} further pairs." if pairs else ""
