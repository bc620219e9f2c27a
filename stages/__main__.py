"""The composition root, the one place that knows both the engine and the stages: `sievit`, `python -m sievit.stages`.

`STAGES` is the only registry. A new stage is one line here.
"""

from __future__ import annotations

import gc

gc.disable()  # what the imports make stays: looking through it for garbage is a tenth of what a listing takes
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sievit.pipeline.cli import Load, execute
from sievit.pipeline.cli_stage import Asked, run_part, run_stage, with_stage_options
from sievit.pipeline.console import results_only
from sievit.pipeline.errors import Interrupted, SievitError, Terminated, UsageError
from sievit.pipeline.session import session_of
from sievit.pipeline.settings import LaunchConfig
from sievit.pipeline.team import Team, follow

from . import adopt, benchmark, export, finetune, matrix, prune, quantize, sensitivity, ticket, train
from .deploy.providers import Provider
from .importances import Importance, Judging
from .methods import InvalidInput

if TYPE_CHECKING:
    from sievit.pipeline.stage import Config

gc.enable()

STAGES = (
    ticket.STAGE,
    train.STAGE,
    prune.STAGE,
    finetune.STAGE,
    export.STAGE,
    adopt.STAGE,
    quantize.STAGE,
    benchmark.STAGE,
    matrix.STAGE,
)

PROVIDERS = get_args(Provider)
IMPORTANCES = get_args(Importance)
SILENCE_S: float = benchmark.BenchmarkConfig.model_fields["timeout"].default
ON_FILES = "On ONNX files, without a pipeline"


def _on_files(name: str, metavar: str, text: str, *, least: int | None = None) -> Any:
    """An option of `sievit benchmark --onnx` that may be given several times."""
    return typer.Option(
        name,
        metavar=metavar,
        help=f"{text}; repeatable",
        default_factory=list,
        show_default=False,
        rich_help_panel=ON_FILES,
        min=least,
    )


def measure(
    context: typer.Context,
    asked: Asked,
    *,
    onnx: Annotated[list[Path], _on_files("--onnx", "FILE", "a file to measure")],
    provider: Annotated[list[str], _on_files("--provider", "|".join(PROVIDERS), "default cpu")],
    batch: Annotated[list[int], _on_files("--batch", "N", "images at once; default 1", least=1)],
    threads: Annotated[list[int], _on_files("--threads", "N", "CPU threads; default 1", least=1)],
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help=f"after which a file that does not answer is given up; default {SILENCE_S:g}",
            rich_help_panel=ON_FILES,
            min=1,
        ),
    ] = None,
) -> None:
    session = session_of(context)
    if onnx:
        from sievit.pipeline import views

        if asked.overrides or asked.inputs or asked.force or asked.folder is not None or asked.arm != "main":
            raise UsageError(
                "--set, --arm, --input, --force and --store do not go with --onnx",
                hint="a file is measured by itself: --provider, --batch and --threads say how",
            )

        if unknown := [name for name in provider if name not in PROVIDERS]:
            raise UsageError(f"there is no provider {unknown[0]!r}", hint=f"providers: {', '.join(PROVIDERS)}")
        with results_only():
            measured = benchmark.benchmark_files(
                onnx,
                tuple(provider) or ("cpu",),
                tuple(batch) or (1,),
                tuple(threads) or (1,),
                progress=session.display(asked.quiet),
                timeout_s=timeout or SILENCE_S,
            )
        session.console.result(measured, views.measurement)
        return
    if provider or batch or threads or timeout is not None:
        raise UsageError(
            "--provider, --batch, --threads and --timeout go with --onnx",
            hint="in a pipeline: --set 'benchmark.providers=[cpu]' --set 'benchmark.batch_sizes=[1, 8]'",
        )
    run_stage(session, benchmark.STAGE, asked)


def measure_sensitivity(
    context: typer.Context,
    asked: Asked,
    *,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            metavar="S",
            help="how long cuts are tried; inf: until all are done; default: prune's, 120",
            min=0.001,
        ),
    ] = None,
    importance: Annotated[
        str | None, typer.Option("--importance", metavar="NAME", help=f"what goes first: {', '.join(IMPORTANCES)}")
    ] = None,
    fraction: Annotated[
        list[float],
        typer.Option(
            "--fraction",
            metavar="F",
            help="kept of an axis; repeatable; default: prune's, 0.75, 0.5 and 0.25",
            default_factory=list,
            show_default=False,
            min=0.05,
            max=0.95,
        ),
    ],
) -> None:
    """Measure what each axis of each block loses when it alone is cut.

    On the newest model that `prune` would read, or the pretrained one of the model block: heads, widths inside heads,
    MLP units, embedding channels and whole blocks are cut alone, without recovery, to several fractions, and accuracy
    and loss are looked at on the calibration split. What is not reached in time is told. Importance and the rest are
    those of the pipeline's prune, unless options say otherwise; `prune: {allocation: sensitivity}` cuts by it.

        sievit sensitivity --seconds 600 --fraction 0.5 --fraction 0.25
    """
    from sievit.pipeline import views

    if importance is not None and importance not in IMPORTANCES:
        raise UsageError(f"there is no importance {importance!r}", hint=f"importances: {', '.join(IMPORTANCES)}")
    fractions = tuple(sorted(set(fraction), reverse=True))
    config = partial(_sensitivity_config, importance=importance, seconds=seconds, fractions=fractions)
    session = session_of(context)
    document = run_part(session, sensitivity.STAGE, config, asked, of=prune.STAGE.name)
    session.console.result(document, views.sensitivity)


def _sensitivity_config(
    asking: Config | None, *, importance: str | None, seconds: float | None, fractions: tuple[float, ...]
) -> sensitivity.SensitivityConfig:
    """As the pipeline's prune has it, where options do not say otherwise."""
    judging, effort = Judging().model_dump(), sensitivity.Effort().model_dump()
    if isinstance(asking, prune.PruneConfig):
        judging, effort = asking.judging.model_dump(), asking.sensitivity.model_dump()
    if importance is not None:
        judging["importance"] = importance
    if seconds is not None:
        effort["seconds"] = None if seconds == inf else seconds
    if fractions:
        effort["fractions"] = fractions
    return sensitivity.SensitivityConfig(judging=Judging(**judging), effort=sensitivity.Effort(**effort))


COMMANDS: dict[str, Callable[..., None]] = {
    "benchmark": with_stage_options(measure),
    "sensitivity": with_stage_options(measure_sensitivity),
}


def _later(name: str) -> Load:
    """The command of the module of that name."""
    return lambda: vars(import_module(f".{name}", __package__))[name]


FURTHER = {
    task: {name: _later(name) for name in names}
    for task, names in {"Hand over": ("pack", "predict", "compare"), "Set up": ("init", "doctor")}.items()
}


def main() -> int:
    """The console script. Returns the exit code.

    Of several processes that torchrun has started the first is the engine, and the others follow it.
    """
    gc.freeze()
    arguments = sys.argv[1:]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return _command(arguments, Team(start=partial(_start, arguments)))
    if not arguments or arguments[0] not in ("run", *(stage.name for stage in STAGES)):
        return 0 if int(os.environ["RANK"]) else _command(arguments, Team())

    from .vision.team import Together

    with Together() as channel:
        if channel.rank:
            return follow(channel, STAGES, (InvalidInput,))
        team, code = Team(channel), SievitError.exit_code
        try:
            code = _command(arguments, team)
        finally:
            team.end(code)
        return code


def _command(arguments: list[str], team: Team) -> int:
    code = execute(STAGES, (InvalidInput,), arguments, commands=COMMANDS, further=FURTHER, team=team)
    if "torch" not in sys.modules:  # whose libraries want to be taken down in order
        gc.freeze()  # the interpreter looks for garbage once more when it ends
    return code


def _start(arguments: list[str], launch: LaunchConfig, device: str) -> int:
    """Run the command in as many processes, on torch's launcher."""
    from .vision.team import start

    code, unsaid = start(arguments, launch.processes, launch.nodes, launch.rendezvous, device)
    if unsaid:
        kind = {Interrupted.exit_code: Interrupted, Terminated.exit_code: Terminated}.get(code, SievitError)
        raise kind(unsaid, hint="run the same command again: it goes on from the last checkpoint")
    return code


if __name__ == "__main__":
    sys.exit(main())
