"""Running one stage function: what it is given, what is written down about it, and how its failures are told.

The rules: a failure leaves checkpoints and nothing else; everything that goes wrong becomes one readable error that
names arm and entry; nothing is swallowed.
"""

from __future__ import annotations

import errno
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import host, records
from .energy import Meter
from .errors import STAGES_FAULT, InputError, Interrupted, SievitError, Terminated
from .manifest import FIGURES, canonical
from .plan import part_of
from .progress import Notebook
from .resolve import Inputs
from .stage import Context, Figure, Part
from .team import job, spent

if TYPE_CHECKING:
    from .plan import Node, Plan
    from .progress import Display
    from .spec import ModelConfig
    from .stage import Config, Stage
    from .store import Artifact, Draft
    from .team import Team
    from .track import Tracking

_FIGURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stop(BaseException):
    """SIGTERM came. No Exception, so that no stage's `except Exception` can take it for a failure of its own."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind the main thread as Ctrl-C does, so that locks and temporary folders are left in order.

    Interrupted, Terminated: the signal came outside of any stage.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise Stop

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    hint = "run the same command again: finished stages are kept"
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("stopped between two stages", hint=hint) from error
    except Stop as error:
        raise Terminated("stopped between two stages by SIGTERM", hint=hint) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@dataclass
class Setting:
    """What all stages of a run share."""

    plan: Plan
    device: str
    display: Display
    invalid_input: tuple[type[Exception], ...]
    command: Sequence[str]
    team: Team
    tracking: Tracking

    @cached_property
    def command_line(self) -> str:
        return host.command_line(self.command)

    @cached_property
    def git(self) -> dict[str, Any] | None:
        return host.git(self.plan.spec.base)


def execute(
    node: Node,
    inputs: Inputs,
    material: dict[str, Any],
    draft: Draft,
    setting: Setting,
    obtain: Callable[[Node, Inputs], tuple[Artifact, bool]],
) -> Artifact:
    """Run the stage function in a draft and commit what it leaves. obtain: the artifact of a part of the work, which
    reads these inputs, and whether it was there.
    """
    notebook, launch, team = Notebook(setting.display), setting.plan.spec.launch, setting.team
    parts = Inputs()
    peaks: list[float] = []

    def part(
        stage: Stage, config: Config, *, role: str, model: ModelConfig | None = None, reads: Sequence[str] = ()
    ) -> Part:
        peaks.append(host.peak_memory_mb())  # making a part starts the figure anew
        entry = replace(node.entry, name=part_of(node.entry.name, role), uses=stage.name, needs=(), config=config)
        given = Inputs({one: inputs.single[one] for one in reads if one in inputs.single})
        artifact, cached = obtain(replace(node, stage=stage, entry=entry, inputs=(), model=model or node.model), given)
        parts.single[role] = artifact
        found_done.append(cached)
        setting.team.there(artifact, made=not cached)
        return Part(artifact, made=not cached)

    context = Context(
        config=node.entry.config,
        data=node.data,
        model=node.model,
        seed=node.seed,
        device=setting.device,
        arm=node.arm,
        entry=node.entry.name,
        base=setting.plan.spec.base,
        out=draft.out,
        work=draft.work,
        inputs=inputs.single,
        many=[one for ones in inputs.many.values() for one in ones],
        references=inputs.texts,
        progress=setting.tracking.watched(notebook, f"{node.arm}/{node.entry.name}"),
        part=part,
        sharding=launch.sharding,
    )
    found_done = [any(draft.work.iterdir())]  # of the work: by an attempt before, or a part that was there
    started, clock, cpu = records.now(), time.monotonic(), host.cpu_seconds()
    host.reset_peak_memory()
    with readable(node, setting, draft):
        told = partial(job, node, inputs, draft.work, context.base, setting.device, launch.sharding)
        with Meter(setting.device) as meter:
            with team.at_work(node.stage, told, setting.device, _resume(node, setting)) as reports:
                node.stage.run(context)
            joules = meter.joules() or {}
        own = {"cpu_seconds": host.cpu_seconds() - cpu, "peak_memory_mb": max([host.peak_memory_mb(), *peaks])}
        took = spent(reports, own)
        figures = _write_figures(context.figures, draft.out)
        return draft.commit(
            {
                "created": records.now(),
                "code_version": node.stage.version,
                "writes": node.stage.writes,
                "key_material": material,
                "config": node.entry.config.model_dump(mode="json"),
                "seed": node.seed,
                "data": node.data.model_dump(mode="json"),
                "model": node.model.model_dump(mode="json"),
                "device": setting.device,
                "inputs": inputs.as_json() | parts.as_json(),
                "references": inputs.texts,
                "pipeline": setting.plan.spec.name,
                "arm": node.arm,
                "entry": node.entry.name,
                "metrics": _plain(context.metrics, "metrics"),
                "ledger": _plain(context.ledger, "ledger"),
                "notes": notebook.notes,
                "figures": figures,
                "libraries": host.libraries(),
                "git": setting.git,
                "host": host.facts(),
                "command": setting.command_line,
                "started": started,
                "seconds": round(time.monotonic() - clock, 3),
                "whole": not any(found_done),  # whether the seconds are those of all its work
                "cpu_seconds": took["cpu_seconds"],
                "peak_memory_mb": own["peak_memory_mb"],
                "energy_cpu_j": joules.get("cpu"),
                "energy_gpu_j": joules.get("gpu"),
                "processes": {
                    "count": team.size if node.stage.shares else 1,
                    "nodes": team.nodes if node.stage.shares else 1,
                    "sharding": launch.sharding if node.stage.shares and team.size > 1 else None,
                    "peak_memory_mb": took["memory_mb"],
                },
            }
        )


def _write_figures(figures: Sequence[Figure], out: Path) -> list[dict[str, str]]:
    """Write the pictures and describe them for the manifest."""
    described: list[dict[str, str]] = []
    for figure in figures:
        file = f"{FIGURES}/{figure.name}.svg"
        if not _FIGURE_NAME.fullmatch(figure.name) or any(one["file"] == file for one in described):
            raise SievitError(
                f"the stage named a figure {figure.name!r}: names are plain file stems, each used once",
                hint=STAGES_FAULT,
            )
        path = out / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(figure.svg, encoding="utf-8")
        described.append({"file": file, "title": figure.title, "caption": figure.caption})
    return described


def _plain(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Refuse what JSON cannot hold before it is hidden in a manifest."""
    try:
        canonical(values)
    except (TypeError, ValueError) as error:
        raise SievitError(f"the stage's {name} are no plain JSON values: {error}", hint=STAGES_FAULT) from error
    return values


@contextmanager
def readable(node: Node, setting: Setting, draft: Draft) -> Iterator[None]:
    """Turn whatever a stage raises into the error that its user reads, with arm and entry in it."""
    at, resume = f"{node.arm}/{node.entry.name}", _resume(node, setting)
    try:
        yield
    except SievitError as error:
        if not error.where.startswith(at):
            error.where = f"{at}: {error.where}" if error.where else at
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped in {at}", where=at, hint=resume) from error
    except Stop as error:
        raise Terminated(f"stopped in {at} by SIGTERM", where=at, hint=resume) from error
    except setting.invalid_input as error:
        raise InputError(str(error), where=at, hint=str(getattr(error, "hint", ""))) from error
    except MemoryError as error:
        hint = "give it a smaller batch or image size, or more memory; " + resume
        raise SievitError(f"{at} ran out of memory", where=at, hint=hint) from error
    except Exception as error:
        if _disk_is_full(error):
            raise SievitError(_no_space(draft), where=at, hint=f"free some space, then {resume}") from error
        kind = type(error).__name__
        raise SievitError(f"{at} failed with {kind}: {error}", where=at, hint=STAGES_FAULT) from error


def _resume(node: Node, setting: Setting) -> str:
    again = (
        f"run the same command again (`{setting.command_line}`)" if setting.command else "run the same command again"
    )
    at = f"{node.arm}/{node.entry.name}"
    others = (
        "other stages are made anew, as --force says" if "--force" in setting.command else "finished stages are kept"
    )
    return f"{again}: {others}, and {at} goes on from its last checkpoint"


def _disk_is_full(error: Exception) -> bool:
    """torch and safetensors wrap the system's error in ones of their own, of which only the text is left."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return "No space left on device" in str(error)


def _no_space(draft: Draft) -> str:
    free = shutil.disk_usage(draft.out).free
    written = sum(p.stat().st_size for folder in (draft.out, draft.work) for p in folder.rglob("*") if p.is_file())
    return f"the disk is full: {free} bytes are free, and the {written} bytes written so far are not all that is needed"
