"""A file to measure with its name: which arm and stage made it, what it is, and how it is fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods import InvalidInput
from .bundle import Bundle
from .graph_macs import graph_macs
from .latency import Subject


@dataclass(frozen=True, slots=True)
class Variant:
    """A row's identity: one file of one arm. family: the arm's name without the seed."""

    arm: str
    entry: str
    final: bool
    bundle: Bundle
    family: str = ""
    seed: int | None = None

    @property
    def precision(self) -> str:
        sidecar = self.bundle.sidecar
        return self.bundle.precision if sidecar is None else sidecar.precision

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.arm, self.entry, self.precision) if part)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None: any."""
        return self.bundle.signature.shape[0]

    def subject(self, batch: int) -> Subject:
        """What is timed. Raises InvalidInput for a batch that the file does not take."""
        bundle = self.bundle
        return Subject(self.name, bundle.path, bundle.signature.input, bundle.signature.dtype, image(bundle, batch))

    @property
    def macs(self) -> int | None:
        """For one image, as the sidecar states them, else counted in the graph; None: not known."""
        if self.bundle.sidecar is not None:
            return self.bundle.sidecar.macs
        return graph_macs(self.bundle.path, image(self.bundle, self.fixed_batch or 1))

    def short(self) -> dict[str, Any]:
        """Its names, for tables beside the rows."""
        return {"arm": self.arm, "entry": self.entry, "variant": self.precision, "final": self.final}

    def whole(self) -> dict[str, Any]:
        """What is known of the file before it runs, for a row."""
        bundle, sidecar = self.bundle, self.bundle.sidecar
        return {
            "arm": self.arm,
            "family": self.family,
            "seed": self.seed,
            "entry": self.entry,
            "variant": self.precision,
            "final": self.final,
            "file": bundle.path.name,
            "sha256": bundle.sha256,
            "bytes": bundle.bytes,
            "parameters": sidecar.parameters if sidecar else bundle.parameters,
            "macs": self.macs,
            "top1": None,
            "top1_low": None,
            "top1_high": None,
            "test_images": None,
        }


def require_batches(variants: Sequence[Variant], batches: Sequence[int]) -> None:
    """Refuse a batch size that one of the files does not take, before any is measured. Raises InvalidInput."""
    for variant in variants:
        for batch in batches:
            image(variant.bundle, batch)


def distinct(variants: Sequence[Variant]) -> list[Variant]:
    """Files of equal content once, the first of them."""
    files = {variant.bundle.sha256: variant for variant in reversed(variants)}
    return [variant for variant in variants if files[variant.bundle.sha256] is variant]


def image(bundle: Bundle, batch: int) -> tuple[int, int, int]:
    """The input's dimensions after the batch, in the file's order; what it leaves open comes from the sidecar. Raises
    InvalidInput.
    """
    shape = list(bundle.signature.shape)
    if bundle.sidecar is not None:
        stated = [None, *bundle.sidecar.image]
        shape = [have if have is not None else other for have, other in zip(shape, stated, strict=True)]
    fixed, *sizes = shape
    first, second, third = sizes
    if first is None or second is None or third is None:
        raise InvalidInput(
            f"{bundle.path} leaves its image size open: {bundle.signature.text()}",
            "give it a sidecar .json, or export it with a fixed size",
        )
    if fixed not in (None, batch):
        raise InvalidInput(
            f"{bundle.path} takes batches of {fixed} only, not of {batch}: {bundle.signature.text()}",
            "ask for that batch size, or export with a dynamic batch",
        )
    return first, second, third
