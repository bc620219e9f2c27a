"""Run records: what one pipeline, in one state of its settings, has led to so far.

`artifacts/runs/<run id>/run.json` is written anew after each node. The id stands for the recipe (settings, data, code
and package versions), so running again, going on after a kill, or running one stage alone adds to the same record. A
record only points at artifacts; losing it loses no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import locks
from . import manifest as manifests
from .errors import GateError, InputError, IntegrityError

if TYPE_CHECKING:
    from .store import Store

NAME = "run.json"
_ROUNDING = 1e-9  # 0.93 - 0.92 is 0.010000000000000009, which does not miss a bound of 0.01

NodeState = Literal["waiting", "running", "cached", "done", "failed"]
RunState = Literal["running", "complete", "failed", "interrupted"]


@dataclass
class NodeRecord:
    """How far one entry of one arm got. `finished` is None as long as it has no artifact."""

    arm: str
    entry: str
    stage: str
    state: NodeState = "waiting"
    ref: str | None = None
    key: str | None = None
    seconds: float = 0.0
    finished: str | None = None
    error: str | None = None


@dataclass
class RunRecord:
    """One run. Times are ISO 8601, UTC."""

    id: str
    pipeline: str
    path: str
    started: str
    finished: str | None
    state: RunState
    nodes: list[NodeRecord]
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    command: str = ""  # as it could be typed again
    # Nodes that this process worked on; what it did not touch is taken over from the record on the disk.
    touched: set[tuple[str, str]] = field(default_factory=set)

    def node(self, arm: str, entry: str) -> NodeRecord:
        """The record of one node; KeyError if the pipeline has none of that name."""
        for node in self.nodes:
            if (node.arm, node.entry) == (arm, entry):
                return node
        raise KeyError((arm, entry))

    @property
    def did_nothing(self) -> bool:
        """Everything that was asked for was there already."""
        worked_on = [node for node in self.nodes if (node.arm, node.entry) in self.touched]
        return self.state == "complete" and all(node.state == "cached" for node in worked_on)

    def as_json(self) -> dict[str, Any]:
        """The content of run.json."""
        fields = asdict(self)
        del fields["touched"]
        return {"schema": manifests.SCHEMA, **fields}

    def save(self, store: Store) -> None:
        """Write the record, keeping what other processes wrote about nodes that this one did not touch."""
        folder = store.runs / self.id
        folder.mkdir(parents=True, exist_ok=True)
        with locks.hold(store.lock_path(f"run-{self.id}"), f"the record of run {self.id}", wait_s=60):
            before = _read(folder / NAME)
            if before is not None:
                self._adopt(before, store)
            store.disk.replace(folder / NAME, manifests.as_text(self.as_json()))

    def _adopt(self, before: RunRecord, store: Store) -> None:
        known = {(node.arm, node.entry): node for node in before.nodes}
        for place, node in enumerate(self.nodes):
            at = (node.arm, node.entry)
            old = known.get(at)
            if old is None or at in self.touched or old.state not in ("cached", "done"):
                continue
            if old.key is not None and store.folder(old.stage, old.key).is_dir():
                self.nodes[place] = old
        if not self.gates:
            self.gates = before.gates


def now() -> str:
    """The time, ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def load(store: Store, run_id: str) -> RunRecord:
    """The record of a run id or the unique beginning of one. InputError: there is none, or several."""
    hits = [path for path in _folders(store) if path.name.startswith(run_id)] if run_id else []
    if len(hits) != 1:
        known = ", ".join(path.name for path in _folders(store)) or "none so far"
        why = "is ambiguous" if hits else "does not exist"
        raise InputError(f"the run {run_id!r} {why}", where=str(store.runs), hint=f"runs: {known}")
    record = _read(hits[0] / NAME)
    if record is None:
        raise IntegrityError(
            f"the record of run {hits[0].name} is damaged or of a newer Sievit",
            where=str(hits[0] / NAME),
            hint="run the pipeline again",
        )
    return record


def all_runs(store: Store) -> list[RunRecord]:
    """All readable records, the one that was worked on last at the end."""
    records = [record for path in _folders(store) if (record := _read(path / NAME)) is not None]
    return sorted(records, key=lambda record: record.finished or record.started)


def newest(store: Store, pipeline: str | None = None) -> RunRecord | None:
    """The record worked on last, of a pipeline of that name or of any."""
    records = [record for record in all_runs(store) if pipeline is None or record.pipeline == pipeline]
    return records[-1] if records else None


def judge(gates: Mapping[str, float | None], measured: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Measured values beside their bounds. `accuracy_drop` is an upper bound, `speedup` a lower one. A bound for
    which there is no measurement is missed: what nobody measured was not kept."""
    judged: dict[str, dict[str, Any]] = {}
    for name, bound in gates.items():
        if bound is None:
            continue
        value = measured.get(name)
        if value is None:
            passed = False
        elif name == "accuracy_drop":
            passed = value <= bound + _ROUNDING
        else:
            passed = value >= bound - _ROUNDING
        judged[name] = {"measured": value, "bound": bound, "passed": passed}
    return judged


def missed_gates(record: RunRecord) -> GateError | None:
    """The error for the gates that a run missed, None if it passed them all."""
    missed = [(name, gate) for name, gate in record.gates.items() if not gate["passed"]]
    if not missed:
        return None
    texts = [
        f"{name} was not measured"
        if gate["measured"] is None
        else f"{name} is {gate['measured']:.4g}, the bound is {gate['bound']:.4g}"
        for name, gate in missed
    ]
    return GateError(
        "; ".join(texts),
        where=record.path,
        hint="the artifacts are kept; change the settings, or the bounds under `gates`",
    )


def _folders(store: Store) -> Iterator[Path]:
    return iter(sorted(path.parent for path in store.runs.glob(f"*/{NAME}")))


def _read(path: Path) -> RunRecord | None:
    """A record from the disk; None when it is absent, damaged or of another schema: it is then written anew."""
    try:
        fields = manifests.read_json(path, NAME)
        if fields.pop("schema") != manifests.SCHEMA:
            return None
        nodes = [NodeRecord(**node) for node in fields.pop("nodes")]
        return RunRecord(nodes=nodes, **fields)
    except (FileNotFoundError, IntegrityError, KeyError, TypeError):
        return None
