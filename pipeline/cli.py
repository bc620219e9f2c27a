"""The command line: every verb of Sievit, on whatever stages the composition root hands over.

`cli_run` holds the commands on a whole pipeline, `cli_sweep` that on many of one, `cli_stage` those of single stages,
`cli_store` those that read the store. Nothing on this side imports a tensor library, so that help, plans and listings
answer at once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_run, cli_stage, cli_store, cli_sweep, completion, manual, options
from .console import Console
from .errors import InputError, Interrupted, SievitError, UsageError
from .session import Session, input_error
from .team import Elsewhere, Team

if TYPE_CHECKING:
    from .stage import Stage

Load = Callable[[], Callable[..., None]]  # imports a command's module, and gives its function
BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended
LIBRARIES = ("torch", "timm", "torch-pruning", "onnx", "onnxruntime", "onnxruntime-gpu", "nncf")
OVERVIEW = """Sieve the data, the tokens and the weights of a vision transformer; ship what is left.

To begin with:
    sievit doctor   what works on this machine
    sievit init     look at your images and write a commented pipeline.yaml
    sievit plan     what would run, and why
    sievit run      run it; what is unchanged comes from artifacts/
    sievit prune    one stage alone, on what the stage before it made last

Exit codes: 0 done, 1 a stage failed, 2 wrong command line, 3 wrong pipeline or input, 4 damaged artifact, 5 locked,
6 gate missed, 130 Ctrl-C, 143 terminated."""


def build_app(
    stages: Sequence[Stage],
    invalid_input: tuple[type[Exception], ...] = (),
    *,
    console: Console | None = None,
    commands: Mapping[str, Callable[..., None]] = {},
    further: Mapping[str, Mapping[str, Load]] = {},
    alone: str | None = None,
    team: Team | None = None,
) -> typer.Typer:
    """The whole command line. `commands` stand in for the plain command of the stage that they are named after; others
    come after the stages'. further: task -> its commands by name, which come next, each to be loaded when it is needed.

    alone: the one command that will be called. Typer looks at the signature of every command that it is told of, so the
    others are left out; an unknown name leaves out none. team: the processes that run the command.
    """
    session = Session(tuple(stages), invalid_input, console or Console(), team or Team())
    app = typer.Typer(cls=manual.Group, context_settings={"obj": session}, rich_markup_mode=None, help=OVERVIEW)
    app.callback(invoke_without_command=True)(_sievit)
    found = list(_commands(stages, commands, further))
    for task, name, load, text in [each for each in found if each[1] == alone] or found:
        command = load()
        text = inspect.getdoc(command) or "" if text is None else text
        app.command(name, cls=manual.Command, help=text, rich_help_panel=task)(command)
    return app


def _commands(
    stages: Sequence[Stage],
    instead: Mapping[str, Callable[..., None]],
    further: Mapping[str, Mapping[str, Load]],
) -> Iterator[tuple[str, str, Load, str | None]]:
    """Task, name, what gives the function, and manual (None: the function's) of every command, in the order of the
    overview.
    """
    for command in (*cli_run.COMMANDS, cli_sweep.sweep):
        yield "Run", command.__name__, partial(_itself, command), None
    for stage in stages:
        plain = partial(cli_stage.stage_command, stage)
        own = partial(_itself, instead[stage.name]) if stage.name in instead else plain
        yield "Stages", stage.name, own, stage.manual
    for name, command in instead.items():
        if name not in {stage.name for stage in stages}:
            yield "Stages", name, partial(_itself, command), None
    for task, loads in further.items():
        for name, load in loads.items():
            yield task, name, load, None
    for task, several in cli_store.COMMANDS.items():
        for command in several:
            yield task, command.__name__, partial(_itself, command), None


def _itself(command: Callable[..., None]) -> Callable[..., None]:
    return command


def execute(
    stages: Sequence[Stage],
    invalid_input: tuple[type[Exception], ...],
    arguments: Sequence[str],
    *,
    commands: Mapping[str, Callable[..., None]] = {},
    further: Mapping[str, Mapping[str, Load]] = {},
    team: Team | None = None,
) -> int:
    """Run one command line and return its exit code. The one place where errors become text."""
    console = Console(json="--json" in arguments, events="--json-lines" in arguments, debug="--debug" in arguments)
    _open_streams()
    try:
        alone = completion.command_of() if completion.asked() else arguments[0] if arguments else None
        app = build_app(
            stages, invalid_input, console=console, commands=commands, further=further, alone=alone, team=team
        )
        if completion.asked():
            return completion.answer(lambda: typer.main.get_command(app).main(args=[], prog_name="sievit"))
        code = _invoke(app, invalid_input, arguments, console)
        sys.stdout.flush()
    except (OSError, SystemExit) as error:
        # Typer and rich turn a reader that went away into exit code 1; a shell expects 141, and silence.
        left = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)
        if isinstance(error, SystemExit) and not left:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not complain
        if left:
            return BROKEN_PIPE
        console.json = console.events = False  # there is no stdout for a document
        hint = "free some space, or write elsewhere"
        return console.close(SievitError(f"the output cannot be written: {error}", hint=hint))
    return code


def _open_streams() -> None:
    """There is a stdout, even after `>&-`, and a terminal that lacks × or – still gets the rest of the line."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _invoke(
    app: typer.Typer, invalid_input: tuple[type[Exception], ...], arguments: Sequence[str], console: Console
) -> int:
    try:
        command = typer.main.get_command(app)
        code = command.main(args=list(arguments), prog_name="sievit", standalone_mode=False)
    except Elsewhere as ran:
        return ran.code
    except SievitError as error:
        return console.close(error)
    except typer.TyperException as error:  # a wrong option, command or value
        return console.close(_usage(error))
    except typer.Abort:
        return console.close(Interrupted("nothing was done", hint="run the same command again"))
    except invalid_input as error:
        return console.close(input_error(error))
    except OSError as error:
        if error.filename is None:  # not about a file: stdout
            raise
        hint = "see that it is there and that this user may read and write it"
        return console.close(InputError(error.strerror or str(error), where=str(error.filename), hint=hint))
    except Exception as error:
        hint = "" if console.debug else "--debug shows the traceback; please report it"
        unexpected = SievitError(f"unexpected {type(error).__name__}: {error}", hint=hint)
        unexpected.__cause__ = error
        return console.close(unexpected)
    if code == Interrupted.exit_code:  # Typer's answer to Ctrl-C
        return console.close(Interrupted("stopped by Ctrl-C", hint="run the same command again"))
    return code or console.close()


def _usage(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "sievit"
    message = error.format_message()
    # What a shell makes of --set prune.target={macs: 0.5} without quotes.
    quoted = "quote a value with spaces: --set 'prune.target={macs: 0.5}'; " if "unexpected extra" in message else ""
    return UsageError(message, hint=f"{quoted}{path} --help")


def _sievit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="versions of Sievit and its libraries")] = False,
    json: options.Json = False,
) -> None:
    if version:
        context.obj.console.result(_versions(), _draw_versions)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _versions() -> dict[str, Any]:
    """From the installed distributions' records; nothing is imported."""
    import platform

    from . import host

    return {"python": platform.python_version(), **{name: host.version(name) for name in ("sievit", *LIBRARIES)}}


def _draw_versions(versions: Mapping[str, Any]) -> str:
    own, *others = ("sievit", *LIBRARIES)
    rest = "\n".join(f"  {name} {versions[name]}" for name in ("python", *others) if versions[name])
    return f"sievit {versions[own] or 'not installed'}\n{rest}"
