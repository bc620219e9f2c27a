"""`sievit sweep`: the command, and how its result is drawn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Document, results_only
from .errors import Interrupted, SievitError, SpecError, Terminated, UsageError
from .session import DEFAULT_PIPELINE, Session, session_of, store_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .plan import Plan
    from .progress import Display
    from .records import RunRecord
    from .search_space import Tried
    from .store import Store
    from .sweep import Question, Sweep, Trial

TRIALS = 20  # of a search that is not told how many

Grid = Annotated[
    list[str],
    typer.Option(
        "--grid",
        metavar="FIELD=A,B",
        help="try all combinations of these values; repeatable",
        default_factory=list,
        show_default=False,
    ),
]
Search = Annotated[
    list[str],
    typer.Option(
        "--search",
        metavar="FIELD=LOW..HIGH",
        help="let Optuna choose from a range (:log behind it: logarithmic) or from A,B,C; repeatable",
        default_factory=list,
        show_default=False,
    ),
]
Objective = Annotated[
    list[str],
    typer.Option(
        "--objective",
        metavar="NAME",
        help="top1, speedup, bytes, macs or parameters of the shipped file; repeatable; default: top1 and speedup",
        default_factory=list,
        show_default=False,
    ),
]
Trials = Annotated[
    int | None,
    typer.Option("--trials", metavar="N", min=1, help=f"how many a search makes, all processes together; {TRIALS}"),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="of the suggestions of a search; 0")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        envvar="SIEVIT_STORAGE",
        help="database for the trials of a search; default: a journal file in the store",
    ),
]


def sweep(
    context: typer.Context,
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    grid: Grid,
    search: Search,
    objective: Objective,
    trials: Trials = None,
    seed: Seed = None,
    storage: Storage = None,
    set_: options.Set,
    store: options.StoreFolder = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run the pipeline under many settings, and say which are worth having.

    Any field that --set knows can be swept. A trial is an ordinary run, so trials share what the store has, and a later
    `sievit run` with the same --set finds everything done. The same command goes on where a sweep was stopped, and may
    be started in several processes or on several machines that share the store: each takes trials that nobody has. A
    trial that fails is kept with its reason.

        sievit sweep --grid prune.target.macs=0.3,0.5,0.7 --grid quantize=null,{}
        sievit sweep --search finetune.lr=1e-4..1e-2:log --search prune.importance=taylor,l1 --trials 30

    Of several objectives the Pareto front is shown. Differences inside the intervals of the benchmark, widened by its
    A/A noise, are none. --search needs Optuna: pip install 'sievit[sweep]'.
    """
    from .execute import stoppable
    from .sweep import Sweep

    session, place = session_of(context), store_of(store, pipeline)
    began = time.monotonic()

    def display() -> Display:
        """A new one for each trial: one that a failure has ended is not asked to begin again."""
        return session.display(quiet)

    question = _question(session, pipeline, set_, grid, search, objective, trials, seed, storage, place, display())
    with stoppable():
        under_way = Sweep(question, place)

        def attempt(trial: Trial) -> None:
            _say(session, quiet, f"trial {trial.number}: {_settings(trial.settings)}")
            with results_only():
                _attempt(session, trial, question, pipeline, place, display())

        def ended(trial: Trial) -> None:
            if trial.error:
                display().warn(f"trial {trial.number} failed: {trial.error}")
            _write_report(under_way)

        try:
            under_way.work(attempt, ended)
        except (Interrupted, Terminated) as stopped:
            stopped.hint = "run the same sweep again: what has ended is kept, and this trial goes on where it was"
            _say(session, quiet, f"the sweep so far: {_write_report(under_way)[1]}")
            raise
    document, _ = _write_report(under_way)
    session.console.result({**document, "seconds": round(time.monotonic() - began, 3)}, draw)
    failed = [trial for trial in document["trials"] if trial["state"] == "failed"]
    if failed and len(failed) == len(document["trials"]):
        raise SievitError(
            f"every trial failed; the first: {failed[0]['error']}",
            where=document["report"],
            hint="mend the cause; `sievit run` with the --set of a trial shows it alone",
        )


def _question(
    session: Session,
    pipeline: Path,
    overrides: list[str],
    grid: list[str],
    search: list[str],
    objective: list[str],
    trials: int | None,
    seed: int | None,
    storage: str | None,
    place: Store,
    display: Display,
) -> Question:
    """What is asked, every option and every value at the ends of the ranges checked before anything runs."""
    from .objectives import chosen
    from .resolve import Facts
    from .search_space import grid_of, search_of
    from .sweep import Question
    from .track import Tracking

    if bool(grid) == bool(search):
        what = "--grid and --search exclude each other" if grid else "nothing is swept"
        raise UsageError(
            what, hint="such as --grid prune.target.macs=0.3,0.5,0.7; a --search takes lists of values too"
        )
    if grid and (trials is not None or seed is not None):
        raise UsageError("--trials and --seed go with --search", hint="a grid is run whole")
    objectives = chosen(objective)
    space = grid_of(grid) if grid else search_of(search)
    plan = session.plan(pipeline, overrides)
    _require_measurement(plan)
    if session.team.starts(plan.spec.launch):
        hint = "--set launch=null, and start the sweep in several processes"
        raise UsageError("a sweep runs each trial in one process, and launch asks for more", hint=hint)
    Tracking(plan.spec, display.warn)  # refuses a tracker that is not installed
    _check(session, pipeline, overrides, space)
    return Question(
        pipeline=plan.spec.name,
        path=str(pipeline),
        recipe=Facts(plan, place, display).recipe(),
        overrides=tuple(overrides),
        space=space,
        grid=bool(grid),
        objectives=objectives,
        seed=seed or 0,
        trials=trials or TRIALS,
        url=storage if search else None,
    )


def _require_measurement(plan: Plan) -> None:
    if not any(node.stage.writes == "measurement" for node in plan.nodes):
        raise SpecError(
            "a sweep compares what a benchmark measured, and the pipeline has none",
            where=str(plan.spec.path),
            hint="add 'benchmark: {}' under 'stages:'",
        )


def _check(session: Session, pipeline: Path, overrides: list[str], space: Mapping[str, Tried]) -> None:
    """Plan every value once, the other fields at their first. What only a combination contradicts fails as a trial.

    A mistake is shown in the option that was typed, under the value that is wrong.
    """
    first = {field: tried.places[0] for field, tried in space.items()}
    session.plan(pipeline, [*overrides, *first.values()])
    for field, tried in space.items():
        for place in tried.places[1:]:
            session.plan(pipeline, [*overrides, *{**first, field: place}.values()])


def _attempt(
    session: Session, trial: Trial, question: Question, pipeline: Path, place: Store, display: Display
) -> None:
    """One run, with its report; the manifests name the command that makes it alone."""
    from math import inf

    from . import runner, search_space
    from .objectives import measured
    from .report.page import write
    from .track import Tracking

    overrides = [*question.overrides, *search_space.overrides(trial.settings)]
    plan = session.plan(pipeline, overrides)
    command = ["sievit", "run", str(pipeline), *(word for text in overrides for word in ("--set", text))]
    manner = runner.Manner(display, session.invalid_input, wait_s=inf, command=command)
    record = runner.run(plan, place, manner)
    trial.run, trial.gates = record.id, record.gates
    pages = write(record.as_json(), place, spec_text=plan.spec.text)
    Tracking(plan.spec, display.warn).report(record, *pages)
    trial.values = {
        name: estimate.as_json()
        for name, estimate in measured(_measurement(record, plan, place), question.objectives).items()
    }


def _measurement(record: RunRecord, plan: Plan, store: Store) -> Mapping[str, Any]:
    """The metrics of the first benchmark."""
    node = next(node for node in plan.nodes if node.stage.writes == "measurement")
    line = record.node(node.arm, node.entry.name)
    return store.open(line.stage, str(line.key)).metrics


def _write_report(sweep: Sweep) -> tuple[Document, Path]:
    from .report.sweep_page import document_of, write

    document = document_of(sweep)
    page, _ = write(document, sweep.folder, sweep.store)
    return {**document, "report": str(page)}, page


def _say(session: Session, quiet: bool, text: str) -> None:
    if not quiet:
        session.console.say(text)


def _settings(settings: Mapping[str, Any], *, short: bool = False) -> str:
    """short: fields by their last names, where these are not alike."""
    from .search_space import overrides

    last = [field.rpartition(".")[2] for field in settings]
    if short and len(set(last)) == len(last):
        settings = dict(zip(last, settings.values(), strict=True))
    return ", ".join(overrides(settings))


def _run(trial: Document) -> str:
    return f"{trial['run']}{' (collected)' if trial['collected'] else ''}"


def draw(document: Document) -> RenderableType:
    """The front first, then the others, each with its settings and numbers."""
    from rich.console import Group

    from .drawing import line, table
    from .report.numbers import duration
    from .report.sweep_page import TITLES, estimate
    from .views import state

    objectives = document["objectives"]
    ordered = sorted(
        document["trials"], key=lambda trial: (not trial["front"], trial["state"] != "done", trial["number"])
    )
    rows = [
        (
            f"{'* ' if trial['front'] else '  '}{trial['number']}",
            state(trial["state"]) if trial["state"] != "done" else line(_run(trial)),
            *(estimate(trial, name) for name in objectives),
            _settings(trial["settings"], short=True) + (f"\n{trial['error']}" if trial["error"] else ""),
        )
        for trial in ordered
    ]
    titles = [TITLES[name] for name in objectives]
    count = sum(trial["front"] for trial in document["trials"])
    return Group(
        table("trial", "run", *titles, "settings", rows=rows, whole={"run", *titles}),
        line(""),
        line(f"* {document['front_says']}"),
        line(f"{document['state_says']}; {duration(document['seconds'])}; {count} worth having"),
        line(f"report: {document['report']}"),
    )
