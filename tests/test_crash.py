"""Killed processes: no half artifact is ever seen, and the next run ends with the bytes of an undisturbed one.

The kills are real. Delays are drawn anew in each test run; a failure prints the seed that they came from.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import PIPELINE

from sievit.pipeline import collect as gc
from sievit.pipeline.commit import Disk
from sievit.pipeline.store import Store

KEY = "3fa9c1d20b7e"
KILLS = 30

# A pipeline whose payloads are large enough for a kill to fall into writing, syncing, hashing and renaming.
RUNNER = """
    import hashlib, sys
    from dataclasses import replace
    from pathlib import Path
    from fakes import STAGES
    from sievit.pipeline.plan import make_plan
    from sievit.pipeline.progress import Silent
    from sievit.pipeline.runner import Manner, run
    from sievit.pipeline.spec import load_pipeline
    from sievit.pipeline.store import Store

    def larger(fake):
        def stage(ctx):
            fake(ctx)
            seed = (ctx.out / "payload.txt").read_bytes()
            for number in range(4):
                seed = hashlib.sha256(seed).digest()
                (ctx.out / f"part{number}.bin").write_bytes(seed * 8192)
        return stage

    stages = tuple(replace(stage, run=larger(stage.run)) for stage in STAGES)
    path = Path(sys.argv[1])
    plan = make_plan(load_pipeline(path, stages, ["train.pause=0.003"]), stages)
    print("ready", flush=True)
    record = run(plan, Store(Path(sys.argv[2])), Manner(Silent(), command=[]))
    print("nothing" if record.did_nothing else "done", flush=True)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def digests(store: Store) -> dict[str, str]:
    return {f"{a.kind_of_stage}/{a.key}": a.digest for a in store.artifacts()}


def check_that_all_is_whole(store: Store) -> None:
    """Every visible artifact holds against its manifest, and no two have one version."""
    assert store.unreadable() == []
    for artifact in store.artifacts():
        store.verify(artifact)
    refs = [artifact.ref for artifact in store.artifacts()]
    assert len(set(refs)) == len(refs)
    for path in store.runs.glob("*/run.json"):
        json.loads(path.read_bytes())


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    sys.stderr.write(f"delays drawn with seed {seed}\n")
    delays = random.Random(seed)
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)
    undisturbed = Store(tmp_path / "undisturbed")
    assert start(RUNNER, str(path), str(undisturbed.root)).wait(timeout=60) == 0
    expected = digests(undisturbed)
    assert len(expected) == 17

    killed = cycle = resumed = 0
    while killed < KILLS:
        cycle += 1
        store = Store(tmp_path / f"killed{cycle}")
        while True:
            process = start(RUNNER, str(path), str(store.root))
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            if killed < KILLS:
                time.sleep(delays.uniform(0, 0.3))
                process.kill()
            said = process.communicate(timeout=60)[0]
            check_that_all_is_whole(store)
            assert digests(store).items() <= expected.items()
            if process.returncode == 0:  # "nothing": the kill before came between the last commit and the last word
                assert said in ("done\n", "nothing\n")
                break
            assert process.returncode == -9, said
            killed += 1
        assert digests(store) == expected
        resumed += sum(artifact.metrics["resumed_at"] > 0 for artifact in store.artifacts("train"))
        gc.collect(store)
        assert [p for p in store.root.glob("*/.*") if p.name.startswith((".tmp-", ".old-", ".work-"))] == []
        again = start(RUNNER, str(path), str(store.root))
        assert again.communicate(timeout=60)[0] == "ready\nnothing\n"
    assert killed >= KILLS and resumed > 0


def commit(store: Store, content: bytes) -> None:
    with store.draft("train", KEY) as draft:
        (draft.out / "weights.bin").write_bytes(content * 1000)
        (draft.out / "sub").mkdir()
        (draft.out / "sub" / "more.json").write_bytes(content)
        (draft.work / "checkpoint").write_bytes(b"c")
        draft.commit({"key_material": {}, "inputs": {}, "metrics": {}, "ledger": {}})


def in_a_process_that_ends_at(operation: int, work: Callable[[Store], None], root: Path) -> bool:
    """Do `work` in a forked process that ends, with no clean-up, before the given operation. True: it ended there."""
    process = os.fork()
    if process == 0:
        left = iter(range(operation))

        def step(name: str, path: Path) -> None:
            if next(left, None) is None:
                os._exit(9)

        try:
            work(Store(root, disk=Disk(step=step)))
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), f"operation {operation}: exit code {code}"
    return code == 9


@pytest.mark.parametrize("replaces", [False, True])
def test_an_end_at_any_file_operation_of_a_commit_leaves_the_old_state_or_the_new(
    tmp_path: Path, replaces: bool
) -> None:
    whole = Store(tmp_path / "whole")
    commit(whole, b"old")
    old = whole.resolve("train").digest
    commit(whole, b"new")
    new = whole.resolve("train").digest
    seen: list[str | None] = []
    operation = 0
    while True:
        root = tmp_path / str(operation)
        store = Store(root)
        if replaces:
            commit(store, b"old")
        ended = in_a_process_that_ends_at(operation, lambda store: commit(store, b"new"), root)
        check_that_all_is_whole(store)
        with store.draft("train", KEY):  # the next run takes the lock first, which puts back what was moved aside
            found = store.find("train", KEY)
        assert found is None or found.digest in (old, new)
        assert not replaces or found is not None, "the old artifact is gone and the new one is not there"
        assert not list((root / "train").glob(".tmp-*")) and not list((root / "train").glob(".old-*"))
        seen.append(found.digest if found else None)
        version = found.version if found else 0
        commit(store, b"new")
        assert store.resolve("train").digest == new and store.resolve("train").version > version
        check_that_all_is_whole(store)
        if not ended:
            break
        operation += 1
    before = old if replaces else None
    switched = seen.index(new)
    assert set(seen[:switched]) == {before} and set(seen[switched:]) == {new}
    assert operation > 15 and switched < operation, "ends fell before and after the moment of commit"


def replace_record(store: Store) -> None:
    store.disk.replace(store.root / "run.json", b"new")


def test_an_end_at_any_operation_of_a_record_leaves_the_old_record_or_the_new(tmp_path: Path) -> None:
    operation = 0
    while True:
        root = tmp_path / str(operation)
        root.mkdir()
        path = root / "run.json"
        Disk().replace(path, b"old")
        ended = in_a_process_that_ends_at(operation, replace_record, root)
        assert path.read_bytes() == (b"old" if ended and operation < 4 else b"new"), operation
        if not ended:
            break
        operation += 1
    assert operation == 5  # create, write, sync, replace, sync of the folder


def test_processes_at_once_never_get_one_version_twice(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from sievit.pipeline.store import Store
        store = Store(Path(sys.argv[1]))
        sys.stdin.readline()
        print(*[store.next_version("train") for _ in range(15)])
    """
    store = Store(tmp_path)
    (tmp_path / "train").mkdir()
    store.next_version("train")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) for _ in range(3)]
    given = [int(n) for said in [p.communicate("go\n", timeout=60)[0] for p in processes] for n in said.split()]
    assert sorted(given) == list(range(2, 47))


def test_a_kill_between_number_and_commit_skips_the_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.draft("train", KEY):
        store.next_version("train")
        raise ZeroDivisionError
    commit(store, b"x")
    assert store.resolve("train").ref == "train@2"
