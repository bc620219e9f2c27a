"""Which artifact a person means: one rule for every command that takes a reference.

train, train@latest    the newest of a stage
train@7, train@3fa9    by its version, or by the beginning of its key
dense/train            what a stage of an arm has left in the newest whole run that has it: one that was broken off,
                       or a single stage, does not take its place; where no run is whole, in the newest that made it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import records
from .diagnostics import nearest
from .errors import InputError

if TYPE_CHECKING:
    from .records import NodeRecord, RunRecord
    from .store import Artifact, Store

MOST = 8  # places that a hint names
FORMS = "a reference is STAGE, STAGE@latest, STAGE@VERSION, STAGE@KEY or ARM/STAGE"


def resolve(ref: str, store: Store) -> Artifact:
    """The artifact that a reference names. InputError: it names nothing or two things."""
    if "/" in ref:
        return _of_an_arm(ref, store)
    try:
        return store.resolve(ref)
    except InputError as error:
        if of_arm := [place for place in places(store) if place.startswith(f"{ref}/")]:
            raise InputError(
                f"{ref!r} is an arm", hint=f"name one of its stages: {', '.join(of_arm)}; {FORMS}"
            ) from None
        if store.stages():
            near = None if "did you mean" in error.hint else nearest(ref, places(store))
            error.hint = "; ".join([*([f"did you mean {near!r}?"] if near else []), error.hint, FORMS])
        raise


def places(store: Store) -> list[str]:
    """Every ARM/STAGE that a run in the store has, those of the newest run first."""
    runs = reversed(records.all_runs(store))
    return list(dict.fromkeys(f"{node.arm}/{node.entry}" for run in runs for node in run.nodes))


def newest_run_with(store: Store, needed: Callable[[RunRecord], Sequence[NodeRecord]]) -> RunRecord | None:
    """The run worked on last of those that have made all that is needed of them; one of which nothing is needed is
    passed over.
    """
    for run in reversed(records.all_runs(store)):
        nodes = needed(run)
        if nodes and all(made(node, store) is not None for node in nodes):
            return run
    return None


def made(node: NodeRecord, store: Store) -> Artifact | None:
    """What a node of a run has left; None when it is not finished, or is not in the store any more."""
    return store.find(node.stage, node.key) if node.finished is not None and node.key is not None else None


def _of_an_arm(ref: str, store: Store) -> Artifact:
    def there(run: RunRecord) -> list[NodeRecord]:
        return [node for node in run.nodes if f"{node.arm}/{node.entry}" == ref]

    run = newest_run_with(store, lambda run: run.nodes if there(run) else []) or newest_run_with(store, there)
    if run is None:
        raise _nothing_at(ref, store)
    artifact = made(there(run)[0], store)
    assert artifact is not None  # newest_run_with has seen it
    return artifact


def _nothing_at(ref: str, store: Store) -> InputError:
    known = places(store)
    if ref in known:
        hint = f"`sievit run --until {ref.rpartition('/')[2]}` makes it"
        return InputError(f"no run has made {ref} yet, or gc has removed it", where=str(store.runs), hint=hint)
    if not known:
        hint = "no run is in the store: `sievit run` makes one"
    else:
        near = nearest(ref, known)
        entry = ref.rpartition("/")[2]
        alike = [name for name in known if name.endswith(f"/{entry}")]
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join((alike or known)[:MOST])}"
    return InputError(f"no run has a stage {ref!r}", where=str(store.runs), hint=f"{hint}; {FORMS}")
