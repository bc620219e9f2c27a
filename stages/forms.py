"""The files that quantize chooses from: made, judged on the calibration split, and mended where they lose too much."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .methods import InvalidInput
from .ranges import FormFailed, RangesConfig, recorded
from .vision.notes import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sievit.pipeline.stage import Context

    from .deploy.bundle import Bundle
    from .deploy.eight_bit import Form, Workshop
    from .deploy.predict import Accuracy

# Half way: nncf's own 0.95 costs more accuracy than the outliers it removes (docs: onnx-details, outlier stress test).
SMOOTH = 0.5
ROUNDING = 1e-9  # 0.93 - 0.92 is 0.010000000000000009, which is no more than 0.01


class Asked(Protocol):
    """What of quantize's settings decides which files are made; its manual says what they mean."""

    @property
    def weight_bits(self) -> Literal["auto", 7, 8]: ...

    @property
    def fuse_attention(self) -> bool: ...

    @property
    def max_drop(self) -> float: ...

    @property
    def revert_seconds(self) -> float: ...

    @property
    def calibration_images(self) -> int: ...

    @property
    def smooth_quant(self) -> Literal["auto", "off"] | float: ...

    @property
    def min_speedup(self) -> float | None: ...

    @property
    def provider(self) -> str: ...

    @property
    def timeout(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may become the product. left_float: the half blocks that stayed float for accuracy's sake."""

    path: Path
    form: Form
    graph: dict[str, Any]  # quantized_nodes, float_nodes, astray
    accuracy: Accuracy
    left_float: tuple[str, ...] = ()


class Forge:
    """Makes the files of one run and judges their accuracy on the calibration split. before: the float file's."""

    def __init__(self, ctx: Context, config: Asked, source: Bundle) -> None:
        import onnx

        from .deploy.eight_bit import Form, Workshop, weight_bits
        from .deploy.quantized_graph import linear_layers, name_nodes
        from .vision.dataset import load_split

        bits, provider = config.weight_bits, config.provider
        self.bits: Literal[7, 8] = weight_bits(provider) if bits == "auto" else bits
        self.sensitivity: dict[str, dict[str, float]] = {}
        self._ctx, self._config, self._source = ctx, config, source
        self._judge = load_split(ctx.data.model_dump(), ctx.base, "calibration")
        asked = partial(
            RangesConfig,
            images=config.calibration_images,
            bits=self.bits,
            symmetric=provider == "tensorrt",
            timeout=config.timeout,
        )
        self._workshop: Workshop = Workshop(
            source.path,
            ctx.work,
            self.bits,
            config.timeout,
            lambda alpha: recorded(ctx, asked(alpha=alpha)),
        )
        model = onnx.load(source.path)
        name_nodes(model)
        self._layers = linear_layers(model)
        self.expected = self._scores(source.path)
        self.before = self._accuracy(self.expected)
        self._float = Form(None)

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        self._workshop.__exit__()

    def scheme(self, scheme: Literal["static", "dynamic", "weights"]) -> Candidate:
        """The first file of this scheme that is good enough, else the most accurate one. Raises FormFailed."""
        from .deploy.eight_bit import Form

        alphas: list[float | None] = [None]
        if scheme == "static":
            match self._config.smooth_quant:
                case "auto":
                    alphas = [None, SMOOTH]
                case float() as strength:
                    alphas = [strength]
        made: list[Candidate] = []
        for alpha in alphas:
            made.append(self._candidate(Form(scheme, alpha=alpha)))
            if reason_against(self._config, self.before, made[-1]) is None:
                return made[-1]
        best = max(made, key=lambda candidate: (not candidate.graph["astray"], candidate.accuracy.top1))
        if scheme == "weights" or best.graph["astray"]:
            return best
        return self._spared(best) if self._config.revert_seconds else best

    def fused(self, good: Sequence[Candidate]) -> list[Candidate]:
        """Those, and the float file, with attention as one operator: what of it the graphs can take."""
        if not self._config.fuse_attention or self._config.provider != "cpu" or self._config.min_speedup is None:
            return []
        made = []
        for candidate in [None, *good]:
            form = self._float if candidate is None else candidate.form
            left = () if candidate is None else candidate.left_float
            kinds: list[Literal["fused", "whole"]] = ["fused", "whole"] if form.scheme == "dynamic" else ["fused"]
            for kind in kinds:
                try:
                    path = self._file(replace(form, attention=kind))
                    if path is not None:
                        made.append(self._judged(path, replace(form, attention=kind), left))
                except FormFailed as error:
                    self._ctx.progress.warn(f"attention {kind} is left out: {error.message}")
        return [one for one in made if reason_against(self._config, self.before, one) is None]

    def half(self) -> list[Candidate]:
        """The half-precision file that export made, if it made one and it is good enough."""
        from .deploy.eight_bit import Form

        path = self._source.path.with_name("fp16.onnx")
        if not path.is_file() or self._config.min_speedup is None:
            return []
        made = self._judged(path, Form("half"), ())
        return [made] if reason_against(self._config, self.before, made) is None else []

    def _spared(self, full: Candidate) -> Candidate:
        """As few half blocks float as bring a scheme within the drop, those first that 8 bits hurt most."""
        from .deploy.block_sensitivity import divergence, fewest, rank
        from .deploy.predict import log_probabilities

        everything = {layer.node for layer in self._layers}
        groups = list(dict.fromkeys(layer.group for layer in self._layers))
        layers = {group: {layer.node for layer in self._layers if layer.group == group} for group in groups}
        alone = {}
        label = f"what 8 bits cost each block ({full.form.scheme})"
        with self._ctx.progress.task(label, len(groups)) as task:
            for group in groups:
                path = self._file(replace(full.form, kept_float=frozenset(everything - layers[group])))
                assert path is not None
                alone[group] = path
                task.advance()

        assert self._source.sidecar is not None
        kind = self._source.sidecar.scores

        def cost(group: str, start: int, stop: int) -> NDArray[np.float64]:
            found = self._scores(alone[group], start, stop)
            return divergence(*(log_probabilities(one, kind) for one in (self.expected[start:stop], found)))

        images = min(len(self._judge), self._config.calibration_images)
        noted = self._ctx.work / f"sensitivity-{full.form.scheme}.json"
        if not noted.is_file():  # a resumed run has other images in its time, and might leave other blocks float
            write_whole(noted, rank(groups, cost, images, self._config.revert_seconds))
        costs: dict[str, float] = json.loads(noted.read_text(encoding="utf-8"))
        self.sensitivity[str(full.form.scheme)] = costs
        tried: dict[int, Candidate] = {}

        def passes(left: Sequence[str]) -> bool:
            kept = frozenset().union(*(layers[group] for group in left))
            tried[len(left)] = self._candidate(replace(full.form, kept_float=kept), tuple(left))
            return reason_against(self._config, self.before, tried[len(left)]) is None

        found = fewest(costs, passes)
        return full if found is None else tried[len(found)]

    def _candidate(self, form: Form, left_float: tuple[str, ...] = ()) -> Candidate:
        path = self._file(form)
        assert path is not None  # only fused forms can be missing
        return self._judged(path, form, left_float)

    def _judged(self, path: Path, form: Form, left_float: tuple[str, ...]) -> Candidate:
        import onnx

        from .deploy.quantized_graph import describe

        try:
            accuracy = self._accuracy(self._scores(path))
        except InvalidInput as error:  # the runtime does not load it
            raise FormFailed(error, self._source.path) from error
        return Candidate(path, form, describe(onnx.load(path)), accuracy, left_float)

    def _file(self, form: Form) -> Path | None:
        """Make the file of a form, with its sidecar."""
        from .deploy.bundle import write_sidecar
        from .deploy.child import ChildFailed

        with self._ctx.progress.task(form.text(), 1) as task:
            try:
                path = self._workshop.make(form)
            except ChildFailed as error:
                raise FormFailed(error, self._source.path) from error
            task.advance()
        if path is None or path == self._source.path:
            return path
        sidecar, artifact = self._source.sidecar, self._ctx.inputs["onnx"]
        assert sidecar is not None
        write_sidecar(
            path,
            preprocessing=sidecar.raw["preprocessing"],
            classes=sidecar.classes,
            precision="fp32" if form.scheme is None else "int8",
            parameters=sidecar.parameters,
            macs=sidecar.macs,
            source={"stage": artifact.kind_of_stage, "key": artifact.key, "digest": artifact.digest},
            scores=sidecar.scores,
        )
        return path

    def _scores(self, path: Path, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        import numpy as np

        from .deploy.isa import usable_cores
        from .deploy.predict import scores

        count = (len(self._judge) if stop is None else stop) - start
        with self._ctx.progress.task(f"accuracy of {path.name}", count) as task:
            return scores(
                path,
                lambda first, last: self._judge.pixels(np.arange(start + first, start + last)),
                count,
                provider=self._config.provider,
                threads=len(usable_cores()),
                done=task.advance,
            )

    def _accuracy(self, scored: NDArray[np.float32]) -> Accuracy:
        from .deploy.predict import accuracy

        return accuracy(scored, self._judge.labels)


def reason_against(config: Asked, before: Accuracy, made: Candidate) -> str | None:
    """Why a file cannot be the product, whatever its speed; None if it can."""
    if made.graph["astray"]:
        names = ", ".join(f"{count} {name}" for name, count in made.graph["astray"].items())
        return f"more than linear layers became 8-bit ({names})"
    if made.form.eight_bit and not made.graph["quantized_nodes"] + made.graph["weight_only_nodes"]:
        return "no linear layer became 8-bit"
    drop = before.top1 - made.accuracy.top1
    if drop - config.max_drop > ROUNDING:
        told = f"{100 * drop:.1f} points of top-1 on the calibration split"
        return f"{'INT8' if made.form.eight_bit else 'the file'} loses {told}, {100 * config.max_drop:.1f} are allowed"
    return None
