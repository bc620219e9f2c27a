"""Runs told to TensorBoard or MLflow, for those who watch several of them there. Off unless `track:` asks for it.

A tracker is told of a run when its first stage starts to work: the values of tasks as they come, a second apart at
least; at the end the metrics of each stage, the gates and the report. A run in which all was there tells it nothing.
Nothing that a tracker does changes a result or a key, and one that fails is left out with a warning: hours of training
are worth more than who watched them. MLflow's telemetry is switched off.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .diagnostics import located
from .stage import Progress, Task

if TYPE_CHECKING:
    from .records import RunRecord
    from .spec import PipelineSpec
    from .store import Store

EVERY_S = 1.0
EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # field of `track:` -> the package, and extra, it needs


class Tracker(Protocol):
    """Where one run is told to. Any exception is a failure of the tracker, never of the run."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """A value as it comes: main/train/loss after so many steps of the task."""

    def final(self, values: Mapping[str, float]) -> None:
        """What the stages measured, and the gates."""

    def report(self, html: Path, markdown: Path) -> None:
        """The pages of the report."""

    def close(self, state: str) -> None:
        """The run has ended: complete, failed or interrupted."""


class Tracking:
    """The trackers of a pipeline, each opened when there is something to tell.

    SpecError: one that the file asks for is not installed.
    """

    def __init__(self, spec: PipelineSpec, warn: Callable[[str], None]) -> None:
        self._spec = spec
        self._warn = warn
        self._run = ""
        self._open: dict[str, Tracker] = {}
        self._left: set[str] = set()
        for name in self._asked():
            if importlib.util.find_spec(EXTRAS[name]) is None:
                span = spec.root.mapping["track"].keys[name]
                raise located(
                    f"track.{name} needs {EXTRAS[name]}", span, f"pip install 'sievit[{name}]', or leave it out"
                )

    def _asked(self) -> list[str]:
        return [name for name in EXTRAS if getattr(self._spec.track, name) is not None]

    @contextmanager
    def run(self, record: RunRecord, store: Store) -> Iterator[None]:
        """The length of a run; at its end what its stages measured is told, if any of them worked."""
        self._run = record.id
        try:
            yield
        finally:
            if self._open:
                values = final_values(record, store)
                self._each(lambda tracker: tracker.final(values))
                self._each(lambda tracker: tracker.close(record.state))
                self._open.clear()

    def watched(self, progress: Progress, place: str) -> Progress:
        """The progress of a stage that starts to work; place: arm/entry."""
        if not self._asked():
            return progress
        self._open_all(progress.warn)
        return _Watched(progress, place, self.scalar)

    def scalar(self, name: str, value: float, step: int, warn: Callable[[str], None]) -> None:
        """Tell a value. warn: where a failure is told, such as the notes of the stage at work."""
        self._each(lambda tracker: tracker.scalar(name, value, step), warn)

    def report(self, record: RunRecord, html: Path, markdown: Path) -> None:
        """Hand over the pages of a run in which something was made."""
        if record.did_nothing:
            return
        self._run = record.id
        self._open_all(self._warn)
        self._each(lambda tracker: tracker.report(html, markdown))
        self._each(lambda tracker: tracker.close(record.state))

    def _open_all(self, warn: Callable[[str], None]) -> None:
        for name in self._asked():
            if name not in self._open and name not in self._left:
                self._try(name, lambda: None, warn)

    def _each(self, tell: Callable[[Tracker], None], warn: Callable[[str], None] | None = None) -> None:
        for name in list(self._open):
            self._try(name, lambda name=name: tell(self._open[name]), warn or self._warn)  # type: ignore[misc]

    def _try(self, name: str, tell: Callable[[], None], warn: Callable[[str], None]) -> None:
        try:
            if name not in self._open:
                self._open[name] = opened(name, self._spec, self._run)
            tell()
        except Exception as error:
            self._open.pop(name, None)
            self._left.add(name)
            warn(f"track.{name} is left out from here on: {type(error).__name__}: {error}")


class _Watched:
    """Shows a stage's progress and tells its values."""

    def __init__(
        self, progress: Progress, place: str, tell: Callable[[str, float, int, Callable[[str], None]], None]
    ) -> None:
        self._progress = progress
        self._place = place
        self._tell = tell

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        entry = self._place.partition("/")[2]
        name = self._place if label == entry else f"{self._place}/{label}"
        with self._progress.task(label, total) as shown:
            task = _WatchedTask(shown, lambda values, step: self._values(name, values, step))
            yield task
            task.close()

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        self._progress.warn(text)

    def _values(self, name: str, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            if math.isfinite(value):
                self._tell(f"{name}/{key}", float(value), step, self._progress.warn)


class _WatchedTask:
    """Passes steps on, and the newest values at most once a second and at the end."""

    def __init__(self, shown: Task, tell: Callable[[Mapping[str, float], int], None]) -> None:
        self._shown = shown
        self._tell = tell
        self._done = 0
        self._values: dict[str, float] = {}
        self._told_at = -math.inf

    def advance(self, steps: int = 1, **values: float) -> None:
        self._shown.advance(steps, **values)
        self._done += steps
        self._values.update(values)
        if values and time.monotonic() - self._told_at >= EVERY_S:
            self.close()

    def close(self) -> None:
        """Tell what has not been told."""
        if self._values:
            self._tell(self._values, self._done)
            self._values, self._told_at = {}, time.monotonic()


def final_values(record: RunRecord, store: Store) -> dict[str, float]:
    """Every number that the stages of a run measured, as arm/entry/metric/..., and the measured side of each gate.

    Rows of tables are left to the report.
    """
    found: dict[str, float] = {}
    for node in record.nodes:
        artifact = store.find(node.stage, node.key) if node.key and node.state in ("done", "cached") else None
        if artifact is not None:
            found |= _numbers(artifact.metrics, f"{node.arm}/{node.entry}")
    for name, gate in record.gates.items():
        if gate["measured"] is not None:
            found[f"gates/{name}"] = float(gate["measured"])
        found[f"gates/{name}/passed"] = float(gate["passed"])
    return found


def _numbers(values: Mapping[str, Any], path: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{path}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{path}/{key}"] = float(value)
    return found


def opened(name: str, spec: PipelineSpec, run: str) -> Tracker:
    """A tracker for one run."""
    if name == "tensorboard":
        return TensorBoard(spec.base / Path(str(spec.track.tensorboard)).expanduser() / f"{spec.name}-{run}")
    return MLflow(str(spec.track.mlflow), spec.base, spec.name, run)


class TensorBoard:
    """Event files in a folder of the run; `tensorboard --logdir` shows it beside others."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, tag=name, simple_value=value)

    def final(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.scalar(f"final/{name}", value, 0)
        self._writer.flush()

    def report(self, html: Path, markdown: Path) -> None:
        """Its Markdown as a text; TensorBoard shows no pages of others."""
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.read_bytes()], tensor_shape=one)
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(0, tag="report", metadata=plugin, tensor=tensor)

    def close(self, state: str) -> None:
        self._writer.close()

    def _add(self, step: int, **value: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(**value)])))


class MLflow:
    """A run of MLflow for each run of ours, found again by the tag sievit.run, in an experiment named as the pipeline.

    A server that does not answer is given up after some seconds, unless MLflow's own variables say otherwise.
    """

    def __init__(self, uri: str, base: Path, experiment: str, run: str) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["DO_NOT_TRACK"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient

        database = re.fullmatch(r"sqlite:///([^/].*)", uri)  # a path from the folder of pipeline.yaml
        if database:
            uri = f"sqlite:///{(base / database[1]).absolute()}"
        self._client = MlflowClient(tracking_uri=uri)
        there = self._client.get_experiment_by_name(experiment)
        # Without a server MLflow would put files below the current folder, whichever it is.
        files = (base / "mlartifacts" / experiment).absolute().as_uri() if uri.startswith("sqlite:") else None
        number = there.experiment_id if there else self._client.create_experiment(experiment, artifact_location=files)
        runs = self._client.search_runs([number], filter_string=f"tags.`sievit.run` = '{run}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(number, run_name=run, tags={"sievit.run": run}).info.run_id

    def scalar(self, name: str, value: float, step: int) -> None:
        self._client.log_metric(self._run, _plain(name), value, step=step)

    def final(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_plain(f"final/{name}"), value, now, 0) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # the most that a batch may hold
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def report(self, html: Path, markdown: Path) -> None:
        for page in (html, markdown):
            self._client.log_artifact(self._run, str(page))

    def close(self, state: str) -> None:
        ends = {"complete": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._run, status=ends.get(state, "FAILED"))


def _plain(name: str) -> str:
    """A name as MLflow takes it: main@seed1 has a sign that it refuses."""
    return re.sub(r"[^\w./ -]", "-", name, flags=re.ASCII)
