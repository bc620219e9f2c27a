"""What a report says: facts collected from one run record and the manifests it names, before any layout.

Nothing is computed that the manifests do not hold, apart from sums over the stages of an arm and ratios to the
baseline. What is missing stays None (or ""), with the reason beside it where there is one.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .controls import Control, controls
from .ledger import Cost, collect_costs
from .reading import dig, listing, mapping, number, text
from .steps import Shelf, Step, collect_steps, shown_command


@dataclass(frozen=True, slots=True)
class Row:
    """One file measured in one setting."""

    arm: str
    entry: str
    variant: str
    final: bool
    baseline: bool
    provider: str
    batch: float | None
    threads: float | None
    verdict: str
    values: Mapping[str, Any]

    def get(self, name: str) -> float | None:
        return number(self.values, name)

    def unsaid(self, percentile: str) -> str:
        """Why a percentile (p90, p95, p99) is missing."""
        return text(self.values, f"{percentile}_unsaid") or "not recorded"

    @property
    def label(self) -> str:
        return " ".join(word for word in (self.arm, self.variant.upper()) if word)

    @property
    def load(self) -> str:
        """batch 1, 1 thread"""
        parts = [] if self.batch is None else [f"batch {self.batch:g}"]
        if self.threads is not None:
            parts.append(f"{self.threads:g} thread{'' if self.threads == 1 else 's'}")
        where = text(self.values, "io")  # on a graphics card: with or without the copies there and back
        if where not in ("", "host"):
            parts.append({"device": "data on the device", "copy": "with copies"}.get(where, where))
        return ", ".join(parts)

    @property
    def setting(self) -> str:
        """cpu, batch 1, 1 thread"""
        return ", ".join(part for part in (self.provider, self.load) if part)


@dataclass(frozen=True, slots=True)
class Gate:
    name: str
    bound: float
    measured: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a report shows, in no layout."""

    pipeline: str
    run: str
    state: str
    started: str
    finished: str
    command: str
    version: str
    setup: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    arms: tuple[str, ...]
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    measurement: Step | None
    baseline_arm: str
    gates: tuple[Gate, ...]
    costs: tuple[Cost, ...]
    controls: tuple[Control, ...]
    host: tuple[tuple[str, str], ...]
    spec_text: str

    @property
    def way(self) -> tuple[str, ...]:
        """The stages of the first arm, in their order."""
        first = self.arms[0] if self.arms else ""
        own = [step for step in self.steps if not step.across_arms]
        return tuple(entry for step in own for arm, entry in step.places if arm == first)

    @property
    def shipped(self) -> Row | None:
        """The main arm's final file in the first setting: what verdict and gates speak of."""
        return self._first(lambda row: row.arm == "main" and row.final)

    @property
    def baseline(self) -> Row | None:
        """The baseline's file in the setting of `shipped`; None when it is the shipped file itself."""
        found = self._first(lambda row: row.baseline)
        return None if found is None or found is self.shipped else found

    @property
    def first_setting(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.setting == self.rows[0].setting)

    def _first(self, wanted: Any) -> Row | None:
        return next((row for row in self.first_setting if wanted(row)), None) if self.rows else None

    @property
    def test_images(self) -> float | None:
        """How many images the top-1 of the rows is of."""
        return next((images for row in self.rows if (images := row.get("test_images")) is not None), None)

    @property
    def unfinished(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.state not in ("done", "cached"))

    @property
    def broken(self) -> Step | None:
        """Where the run stopped: the failed node, else the one that was running or is next."""
        ranked = sorted(
            self.unfinished,
            key=lambda s: (
                ("failed", "interrupted", "running").index(s.state)
                if s.state in ("failed", "interrupted", "running")
                else 3
            ),
        )
        return ranked[0] if ranked else None


def collect(record: Mapping[str, Any], store: Shelf, spec_text: str = "") -> Facts:
    """Read the manifests of every node of the run. Never raises for what is missing: the report says it instead."""
    steps = collect_steps(record, store)
    manifests = [step.manifest for step in steps if step.manifest]
    measurement = next((step for step in steps if listing(step.metrics, "rows")), None)
    arms = _arms(record, steps)
    rows, compared_with = _rows(measurement)
    baseline_arm = "dense" if "dense" in arms else compared_with
    return Facts(
        pipeline=text(record, "pipeline") or text(record, "spec", "name") or "unnamed",
        run=text(record, "id"),
        state=text(record, "state") or "unknown",
        started=text(record, "started"),
        finished=text(record, "finished"),
        command=shown_command(dig(record, "command")) or f"sievit run {shlex.quote(_file_name(record))}",
        version=next((text(m, "libraries", "sievit") for m in manifests if text(m, "libraries", "sievit")), ""),
        setup=_setup(record, manifests),
        classes=next((names for m in manifests if (names := _classes(m))), ()),
        arms=arms,
        steps=steps,
        rows=rows,
        measurement=measurement,
        baseline_arm=baseline_arm,
        gates=_gates(record, measurement),
        costs=collect_costs(arms, steps, baseline_arm),
        controls=controls(record, _across(steps)),
        host=_host(measurement, manifests),
        spec_text=spec_text or _recorded_spec(record),
    )


def _across(steps: Sequence[Step]) -> set[tuple[str, str]]:
    """Arm and entry of the stages that stand once for all arms."""
    return {place for step in steps if step.across_arms for place in step.places}


def _arms(record: Mapping[str, Any], steps: Sequence[Step]) -> tuple[str, ...]:
    across = _across(steps)
    places = ((text(node, "arm"), text(node, "entry") or text(node, "stage")) for node in listing(record, "nodes"))
    return tuple(dict.fromkeys(arm for arm, entry in places if arm and (arm, entry) not in across))


# ---- measurement and gates --------------------------------------------------------------------------------------


def _rows(measurement: Step | None) -> tuple[tuple[Row, ...], str]:
    """The rows, those of the first configured setting first; and the arm of the baseline."""
    if measurement is None:
        return (), ""
    base = mapping(measurement.metrics, "baseline")
    rows = [
        Row(
            arm=text(row, "arm"),
            entry=text(row, "entry"),
            variant=text(row, "variant"),
            final=dig(row, "final") is True,
            baseline=bool(base)
            and text(row, "arm") == text(base, "arm")
            and text(row, "entry") == text(base, "entry")
            and text(row, "variant") in ("", text(base, "variant") or "fp32"),
            provider=text(row, "provider"),
            batch=number(row, "batch"),
            threads=number(row, "threads"),
            verdict=text(row, "verdict"),
            values=row,
        )
        for row in listing(measurement.metrics, "rows")
        if isinstance(row, Mapping)
    ]
    config = mapping(measurement.manifest, "config")
    first = [next(iter(listing(config, name)), None) for name in ("providers", "batch_sizes", "threads")]

    def order(row: Row) -> bool:
        return not all(
            want is None or have == want
            for want, have in zip(first, (row.provider, row.batch, row.threads), strict=True)
        )

    return tuple(sorted(rows, key=order)), text(base, "arm")


def _gates(record: Mapping[str, Any], measurement: Step | None) -> tuple[Gate, ...]:
    """Judged gates from the run record; stated ones that nobody judged, from the pipeline, as not measured."""
    measured = mapping(measurement.metrics if measurement else {}, "gates")
    gates = []
    for name in ("accuracy_drop", "speedup"):
        judged = mapping(record, "gates", name)
        bound = number(judged, "bound")
        if bound is None:
            bound = number(record, "spec", "gates", name)
        if bound is None:
            continue
        value = number(judged, "measured")
        if value is None:
            value = number(measured, name)
        met = dig(judged, "passed")
        if not isinstance(met, bool):
            met = None if value is None else (value <= bound if name == "accuracy_drop" else value >= bound)
        gates.append(Gate(name, bound, value, met))
    return tuple(gates)


# ---- header and host --------------------------------------------------------------------------------------------


def _setup(record: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Model, data, seed and device in words."""
    sources: list[Any] = [mapping(record, "spec"), *manifests]

    def first(*paths: tuple[str, ...]) -> str:
        return next((found for source in sources for path in paths if (found := text(source, *path))), "")

    seeds = listing(record, "spec", "seeds")
    pixels = first(("data", "image_size"), ("data", "config", "image_size"))
    named = not manifests or any("model" in mapping(each, "key_material") for each in manifests)
    found = {
        # A pipeline that adopts a file has a model block of defaults, which no stage reads.
        "Model": first(("model", "name"), ("model", "config", "name")) if named else "",
        "Data": first(("data", "source"), ("data", "config", "source")),
        "Image size": f"{pixels} px" if pixels else "",
        "Seed" if len(seeds) < 2 else "Seeds": ", ".join(map(text, seeds)) or first(("seed",)),
        "Device": first(("device",)),
    }
    return tuple((name, value) for name, value in found.items() if value)


def _classes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    named = listing(manifest, "metrics", "classes") or listing(manifest, "data", "classes")
    return tuple(text(name) for name in named)


def _host(measurement: Step | None, manifests: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Host facts of the measurement, else of the newest stage; then versions and git commit."""
    source = measurement.manifest if measurement else (manifests[-1] if manifests else {})
    facts = _flat(mapping(measurement.metrics if measurement else {}, "host") or mapping(source, "host"))
    facts += _flat(mapping(source, "libraries"))
    git = dig(source, "git")
    if git:
        facts += _flat(git, ("git",)) if isinstance(git, Mapping) else [("git", text(git))]
    return tuple(facts)


def _flat(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Nested facts as pairs of words; empty ones are left out."""
    pairs: list[tuple[str, str]] = []
    for name, one in value.items():
        path = (*above, str(name).replace("_", " "))
        if isinstance(one, Mapping):
            pairs += _flat(one, path)
        elif isinstance(one, bool):
            pairs.append((" ".join(path), "yes" if one else "no"))
        elif isinstance(one, list | tuple) and one:
            words = [
                "; ".join(f"{k} {v}" for k, v in _flat(item)) if isinstance(item, Mapping) else str(item)
                for item in one
            ]
            pairs.append((" ".join(path), ", ".join(words)))
        elif one is not None and one not in ("", [], ()):
            pairs.append((" ".join(path), str(one)))
    return pairs


def _file_name(record: Mapping[str, Any]) -> str:
    return Path(text(record, "path")).name or "pipeline.yaml"


def _recorded_spec(record: Mapping[str, Any]) -> str:
    spec = dig(record, "spec")
    written = text(spec, "text") or text(spec)
    if written or not spec:
        return written
    import yaml

    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=100)
