"""What every command starts from: the stages there are, the console, a pipeline file and its store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from .console import Console
from .diagnostics import located, suggest
from .errors import InputError, UsageError
from .team import Elsewhere, Team

if TYPE_CHECKING:
    from .diagnostics import Source, Span
    from .plan import Plan
    from .progress import Display
    from .spec import PipelineSpec
    from .stage import Stage
    from .store import Store

DEFAULT_PIPELINE = Path("pipeline.yaml")
DEFAULT_STORE = Path("artifacts")


@dataclass(frozen=True)
class Session:
    """One command line. invalid_input: what stages raise when what the user gave them is wrong. team: the processes
    that run it.
    """

    stages: tuple[Stage, ...]
    invalid_input: tuple[type[Exception], ...]
    console: Console
    team: Team = field(default_factory=Team)

    def plan(self, pipeline: Path, overrides: Sequence[str | Source] = ()) -> Plan:
        """The validated plan of a pipeline file. SpecError when it or an override is wrong; nothing is written."""
        from .plan import make_plan
        from .preflight import check_settings
        from .spec import load_pipeline

        spec = _of_processes(load_pipeline(pipeline, self.stages, overrides), self.team)
        plan = make_plan(spec, self.stages)
        check_settings(plan, self.invalid_input)
        return plan

    def display(self, quiet: bool) -> Display:
        """Where the progress of this command is told."""
        if self.console.events:
            from .events import Events

            return Events(self.console.event)
        from .progress import choose

        return choose(quiet=quiet, silent=self.console.json)

    def start(self, plan: Plan) -> NoReturn:
        """Run this command in the processes that a pipeline asks for. Raises: Elsewhere, when they have ended."""
        from . import host

        spec = plan.spec
        try:
            code = self.team.start(spec.launch, host.device(spec.device))
        except self.invalid_input as error:
            raise located(str(error), _launch_of(spec), str(getattr(error, "hint", ""))) from error
        raise Elsewhere(code)


def _of_processes(spec: PipelineSpec, team: Team) -> PipelineSpec:
    """The pipeline as the processes run it that are there already. SpecError: it asks for another number."""
    launch = spec.launch
    if team.size == 1 or launch.total == team.size:
        return spec
    if launch.total == 1:
        there = {"processes": team.size // team.nodes, "nodes": team.nodes}
        return replace(spec, launch=launch.model_copy(update=there))
    raise located(
        f"launch asks for {launch.total} processes, and {team.size} were started",
        _launch_of(spec),
        "start as many as it says, or leave processes and nodes out to take those that there are",
    )


def _launch_of(spec: PipelineSpec) -> Span:
    node = spec.root.mapping["launch"]
    return node.keys.get("processes", spec.root.keys["launch"])


def session_of(context: typer.Context) -> Session:
    """The session that `build_app` put into Typer's context."""
    session = context.obj
    assert isinstance(session, Session)
    return session


def store_of(folder: Path | None, pipeline: Path | None = None) -> Store:
    """The store: the folder named by --store or SIEVIT_STORE, else `artifacts` beside the pipeline file."""
    from .store import Store

    return Store(folder or (pipeline.parent if pipeline else Path()) / DEFAULT_STORE)


def written_store(folder: Path | None) -> Store:
    """The store that a command reads. InputError: a folder was named and is not there, which is hardly meant so."""
    if folder is not None and not folder.is_dir():
        raise InputError("there is no such store", where=str(folder), hint=f"`sievit run --store {folder}` makes one")
    return store_of(folder)


def require_arm(plan: Plan, arm: str | None) -> None:
    """UsageError, naming the nearest, when the pipeline has no such arm."""
    if arm is not None and arm not in plan.spec.arms:
        raise UsageError(f"the pipeline has no arm {arm!r}", hint=suggest(arm, plan.spec.arms, kind="arms"))


def input_error(error: Exception) -> InputError:
    """What a stage or a library of ours raised about an input, as the engine prints it."""
    return InputError(str(error), hint=str(getattr(error, "hint", "")))
