"""Candidates of a cut as the files that would be served: how large they are, and how fast beside the dense network's.

No pipeline file names this module; the search for a target measures by it. A candidate is exported with random weights,
since its shape alone counts, and timed in ONNX Runtime beside the dense file, each in a process of its own, interleaved
(deploy/latency.py). What was measured is written down at once, so that a search that is killed goes on with the same
numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from .deploy.providers import Provider
from .vision.notes import write_whole
from .vision.recipe import Settings

if TYPE_CHECKING:
    from sievit.pipeline.stage import Context

    from .deploy.latency import Setting, Subject
    from .vision.architecture import Architecture, SwinArchitecture

    Record = Architecture | SwinArchitecture

OPSET = 20


class Serving(Settings):
    """How the file is going to be served, and how long a candidate is timed."""

    provider: Provider = Field("cpu", description="ONNX Runtime execution provider")
    batch: int = Field(1, ge=1, le=4096, description="images at once")
    threads: int = Field(1, ge=1, le=1024, description="threads of one operator, pinned to as many cores")
    seconds: float = Field(
        1.5, gt=0, le=3600, description="timed calls of each of the two files, seconds, over three sessions"
    )


class Files:
    """The dense network and candidates as files; every shape is exported and timed once."""

    def __init__(self, ctx: Context, dense: Record, serving: Serving) -> None:
        self._ctx, self._dense, self._serving = ctx, dense, serving
        self._ledger = ctx.work / "candidates.json"
        self._known: dict[str, dict[str, float]] = {}
        if self._ledger.is_file():
            self._known = json.loads(self._ledger.read_text(encoding="utf-8"))

    def megabytes(self, architecture: Record) -> float:
        """Size of the exported file, MB."""
        return self._look_up("size", architecture, self._size)["size_mb"]

    def timing(self, architecture: Record) -> dict[str, float]:
        """A candidate beside the dense file: p50_ms, dense_p50_ms, speedup with its interval, and noise, the ratio that
        the dense file shows against itself.
        """
        return self._look_up("time", architecture, self._time)

    def _look_up(
        self, what: str, architecture: Record, measure: Callable[[Record], dict[str, float]]
    ) -> dict[str, float]:
        name = f"{what}-{name_of(architecture)}"
        if name not in self._known:
            self._known[name] = measure(architecture)
            write_whole(self._ledger, self._known)
        return self._known[name]

    def _size(self, architecture: Record) -> dict[str, float]:
        from .deploy.bundle import bytes_of

        return {"size_mb": bytes_of(self._path(architecture)) / 1e6}

    def _time(self, architecture: Record) -> dict[str, float]:
        from sievit.pipeline.errors import SievitError

        from .deploy.child import ChildFailed
        from .deploy.comparison import noise_floors
        from .deploy.latency import Plan, measure
        from .deploy.statistics import percentile_interval, ratio_interval

        setting = setting_of(self._serving)
        dense, candidate = (
            subject_of(name, self._path(record), record)
            for name, record in (("dense", self._dense), ("candidate", architecture))
        )
        plan = Plan(self._serving.seconds, sessions=3, warm_up_s=0.5, seed=self._ctx.seed)
        try:
            results = measure([dense, candidate], [setting], plan, self._ctx.progress)
        except ChildFailed as error:
            raise SievitError(
                f"a candidate could not be timed: {error}", hint="see the log; it may be the host"
            ) from error
        slots = results["candidate", setting].slots
        ratio = ratio_interval(results["dense", setting].slots, slots)
        return {
            "p50_ms": percentile_interval(slots, 50).value,
            "dense_p50_ms": percentile_interval(results["dense", setting].slots, 50).value,
            "speedup": ratio.value,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
            "noise": noise_floors(results, "dense", [setting])[setting].factor,
        }

    def _path(self, architecture: Record) -> Path:
        """The file of a shape, exported when it is not there yet."""
        from .vision.onnx_export import export_shape

        path = self._ctx.work / f"{name_of(architecture)}.onnx"
        if not path.is_file():
            with self._ctx.progress.task("exporting a candidate", 1) as task:
                temporary = path.with_suffix(".part")
                export_shape(architecture, temporary, OPSET)
                temporary.replace(path)
                task.advance()
        return path


def setting_of(serving: Serving) -> Setting:
    from .deploy.latency import Setting
    from .deploy.sessions import GRAPHICS

    io = "device" if serving.provider in GRAPHICS else "host"
    return Setting(serving.provider, serving.threads, serving.batch, io)


def subject_of(name: str, path: Path, architecture: Record) -> Subject:
    from .deploy.latency import Subject

    side = architecture.image_size
    return Subject(name, path, "input", "float32", (3, side, side))


def name_of(architecture: Record) -> str:
    """A short name of a shape, the same in every run."""
    text = json.dumps(architecture.as_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
