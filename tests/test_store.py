"""The store: atomic, immutable, verified when read, one writer a key, versions that are never given out twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sievit.pipeline import collect as gc
from sievit.pipeline import keys, locks, records
from sievit.pipeline import manifest as manifests
from sievit.pipeline.commit import Disk
from sievit.pipeline.errors import InputError, IntegrityError, LockedError, SievitError
from sievit.pipeline.store import Artifact, Store

A, B, C = "3fa9c1d20b7e", "3fb000000000", "000000000012"


def fields(**more: Any) -> dict[str, Any]:
    return {"key_material": {}, "inputs": {}, "metrics": {}, "ledger": {}, **more}


def make(
    store: Store, key: str = A, stage: str = "train", files: Mapping[str, bytes] | None = None, **more: Any
) -> Artifact:
    with store.draft(stage, key) as draft:
        for name, content in (files or {"weights.bin": b"w" * 1000, "notes/a.txt": b"a"}).items():
            path = draft.out / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return draft.commit(fields(**more))


def writable(path: Path) -> Path:
    path.chmod(0o644)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


# ---- what a commit leaves


def test_an_artifact_is_found_with_what_was_put_in(store: Store) -> None:
    made = make(store, metrics={"top1": 0.5}, ledger={"images": 7})
    found = store.find("train", A)
    assert found is not None
    assert (found.ref, found.key, found.version, found.kind_of_stage) == ("train@1", A, 1, "train")
    assert found.metrics == {"top1": 0.5} and found.ledger == {"images": 7}
    assert found.file("notes/a.txt").read_bytes() == b"a"
    assert found.digest == made.digest
    assert store.find("train", B) is None and store.find("prune", A) is None


def test_the_manifest_names_every_file_with_its_size_and_hash(store: Store) -> None:
    manifest = make(store, files={"x": b"xyz"}).manifest
    assert manifest["files"] == {"x": {"sha256": hashlib.sha256(b"xyz").hexdigest(), "bytes": 3}}


def test_the_digest_is_that_of_names_and_contents_alone(store: Store) -> None:
    first = make(store, A, files={"x": b"1", "y": b"2"}, metrics={"seconds": 1.0})
    same = make(store, B, files={"y": b"2", "x": b"1"}, metrics={"seconds": 9.0})
    with_figure = make(store, C, files={"x": b"1", "y": b"2", "figures/f.svg": b"<svg/>"})
    renamed = make(store, "a" * 12, files={"x": b"2", "y": b"1"})
    assert first.digest == same.digest == with_figure.digest != renamed.digest


def test_the_files_of_an_artifact_cannot_be_written(store: Store) -> None:
    artifact = make(store)
    for path in artifact.root.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o444, path


def test_a_file_that_is_not_there_is_named_with_those_that_are(store: Store) -> None:
    with pytest.raises(InputError) as caught:
        make(store).file("model.onnx")
    assert "model.onnx" in caught.value.message and "weights.bin" in caught.value.hint


def test_every_operation_of_a_commit_is_synced_before_the_next_one_relies_on_it(tmp_path: Path) -> None:
    log: list[tuple[str, str]] = []
    store = Store(tmp_path / "a", disk=Disk(step=lambda operation, path: log.append((operation, path.name))))
    make(store, files={"one": b"1", "two": b"2"})
    final = log[[operation for operation, _ in log].index("replace") + 2 :]  # after the version counter
    temporary = final[-3][1]
    assert temporary.startswith(f".tmp-{A}-")
    assert log[:5] == [("sync", "a"), ("sync", "one"), ("protect", "one"), ("sync", "two"), ("protect", "two")]
    assert final == [
        ("create", "manifest.json"),
        ("write", "manifest.json"),
        ("sync", "manifest.json"),
        ("protect", "manifest.json"),
        ("sync", temporary),
        ("rename", A),
        ("sync", "train"),
    ]


@pytest.mark.parametrize("content", [{}, {"figures/f.svg": b"<svg/>"}])
def test_a_stage_that_leaves_no_payload_is_an_error(store: Store, content: dict[str, bytes]) -> None:
    with pytest.raises(SievitError, match="without leaving a file"), store.draft("train", A) as draft:
        for name, data in content.items():
            (draft.out / name).parent.mkdir()
            (draft.out / name).write_bytes(data)
        draft.commit(fields())
    assert store.find("train", A) is None and not list((store.root / "train").glob(".tmp-*"))


def test_links_and_pipes_are_not_kept(store: Store, tmp_path: Path) -> None:
    for place in (lambda path: path.symlink_to(tmp_path), lambda path: os.mkfifo(path)):
        with pytest.raises(SievitError, match="only plain files"), store.draft("train", A) as draft:
            (draft.out / "x").write_bytes(b"x")
            place(draft.out / "y")
            draft.commit(fields())


def test_a_stage_may_not_write_the_manifest(store: Store) -> None:
    with pytest.raises(SievitError, match="needs for itself"):
        make(store, files={"manifest.json": b"{}"})


def test_what_was_not_committed_is_removed_but_not_its_checkpoints(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.draft("train", A) as draft:
        (draft.out / "x").write_bytes(b"x")
        (draft.work / "checkpoint").write_bytes(b"c")
        raise ZeroDivisionError
    assert [path.name for path in (store.root / "train").iterdir()] == [f".work-{A}"]
    with store.draft("train", A) as draft:
        assert (draft.work / "checkpoint").read_bytes() == b"c"
        (draft.out / "x").write_bytes(b"x")
        draft.commit(fields())
    assert not draft.work.exists() and not draft.out.exists()


def test_a_forced_artifact_takes_the_place_of_the_old_one(store: Store) -> None:
    make(store, files={"x": b"old"})
    make(store, files={"x": b"new"})
    assert [a.ref for a in store.artifacts()] == ["train@2"]
    assert store.resolve("train").file("x").read_bytes() == b"new"
    assert sorted(path.name for path in (store.root / "train").iterdir()) == [".version", A]


# ---- versions and references


def test_versions_go_on_after_everything_was_removed(store: Store) -> None:
    assert [make(store, key).version for key in (A, B)] == [1, 2]
    shutil.rmtree(store.folder("train", A))
    shutil.rmtree(store.folder("train", B))
    assert make(store, C).version == 3


def test_versions_survive_the_loss_of_the_counter(store: Store) -> None:
    make(store, A), make(store, B)
    for damage in (b"", b"junk\xff"):
        (store.root / "train" / ".version").write_bytes(damage)
        assert store.next_version("train") == 3
    (store.root / "train" / ".version").unlink()
    assert store.next_version("train") == 3


def test_every_way_to_name_an_artifact(store: Store) -> None:
    make(store, A), make(store, B), make(store, C)
    for ref, version in {
        "train": 3,
        "train@latest": 3,
        "train@2": 2,
        "train@3fa": 1,
        f"train@{B}": 2,
    }.items():
        assert store.resolve(ref).version == version, ref
    # C begins with a digit; digits alone are a version all the same, or whether train@0 exists would be chance.
    assert C[0].isdigit()
    with pytest.raises(InputError, match=f"there is no train@{C[0]}"):
        store.resolve(f"train@{C[0]}")


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "@",
        "train@",
        "../train",
        "train@../x",
        "train@3FA9",
        "/etc@1",
        "train@1@2",
        "tr\x00ain",
        "train@-1",
        "TRAIN",
    ],
)
def test_what_is_no_reference_is_refused(store: Store, ref: str) -> None:
    make(store)
    with pytest.raises(InputError, match="no artifact reference"):
        store.resolve(ref)


def test_a_reference_to_nothing_names_the_nearest(store: Store) -> None:
    make(store, A), make(store, B)
    expected = {
        "trian@1": "did you mean 'train'?",
        "train@9": "there are train@1, train@2",
        "train@3fa9c1d20b7f": f"did you mean train@{A}?",
    }
    for ref, hint in expected.items():
        with pytest.raises(InputError) as caught:
            store.resolve(ref)
        assert hint in caught.value.hint, ref
    with pytest.raises(InputError, match="ambiguous") as caught:
        store.resolve("train@3f")
    assert A in caught.value.hint and B in caught.value.hint


# ---- verification


def damage_bit(root: Path) -> None:
    path = writable(root / "weights.bin")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def damage_truncate(root: Path) -> None:
    writable(root / "weights.bin").write_bytes(b"")


def damage_delete(root: Path) -> None:
    (root / "weights.bin").unlink()


def damage_add(root: Path) -> None:
    (root / "notes" / "more.txt").write_bytes(b"")


def damage_link(root: Path) -> None:
    copy = root.parent / "copy.bin"
    shutil.move(root / "weights.bin", copy)
    (root / "weights.bin").symlink_to(copy)


def damage_link_folder(root: Path) -> None:
    shutil.move(root / "notes", root.parent / "notes")
    (root / "notes").symlink_to(root.parent / "notes")


def damage_pipe(root: Path) -> None:
    (root / "weights.bin").unlink()
    os.mkfifo(root / "weights.bin")


def damage_root_link(root: Path) -> None:
    shutil.move(root, root.parent / "elsewhere")
    root.symlink_to(root.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_bit, "weights.bin has SHA-256"),
        (damage_truncate, "weights.bin has 0 bytes, expected 1000"),
        (damage_delete, "weights.bin is missing"),
        (damage_add, "notes/more.txt is not one of its files"),
        (damage_link, "weights.bin is a symbolic link"),
        (damage_link_folder, "notes is a symbolic link"),
        (damage_pipe, "weights.bin is not a plain file"),
        (damage_root_link, "its folder is a symbolic link"),
    ],
)
def test_any_damage_is_found_and_named(store: Store, damage: Any, said: str) -> None:
    artifact = make(store)
    store.verify(artifact)
    damage(artifact.root)
    with pytest.raises(IntegrityError) as caught:
        store.verify(artifact)
    assert said in caught.value.message
    assert "train@1" in caught.value.message and "gc --damaged" in caught.value.hint and caught.value.exit_code == 4


def test_a_changed_byte_is_told_with_the_expected_and_the_found_hash(store: Store) -> None:
    artifact = make(store)
    expected = hashlib.sha256(b"w" * 1000).hexdigest()
    damage_bit(artifact.root)
    found = hashlib.sha256((artifact.root / "weights.bin").read_bytes()).hexdigest()
    with pytest.raises(IntegrityError) as caught:
        store.verify(artifact)
    assert (
        caught.value.message == f"train@1 is not what was stored: weights.bin has SHA-256 {found}, expected {expected}"
    )


def edited(artifact: Artifact, change: Any) -> bytes:
    manifest = json.loads((artifact.root / "manifest.json").read_bytes())
    change(manifest)
    return json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        (b"", "cannot be read"),
        (b'{"schema": 1', "cannot be read"),
        (b"[]", "holds no JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"schema": 1, "schema": 1}', "'schema' stands twice"),
        (b'{"schema": NaN}', "NaN is no number"),
        (b'{"schema": -Infinity}', "-Infinity is no number"),
        (b'{"schema": 1e999}', "no finite number"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"schema": 1}', "its own digest does not fit"),
        (b'{"schema": 2, "anything": "at all"}', "written by a newer Sievit"),
        (lambda m: m.update(seed=2), "its own digest does not fit"),
        (lambda m: m["metrics"].update(top1=0.99), "its own digest does not fit"),
        (lambda m: m.pop("manifest_sha256"), "its own digest does not fit"),
        (lambda m: m.update(manifests.sealed(m | {"key": B})), f"is that of train@{B}"),
        (lambda m: m.update(manifests.sealed(m | {"files": {"../x": {"sha256": "", "bytes": 0}}})), "leads out"),
        (lambda m: m.update(manifests.sealed(m | {"files": {"/x": {"sha256": "", "bytes": 0}}})), "leads out"),
        (lambda m: m.update(manifests.sealed(m | {"files": {"x": 1}})), "incomplete"),
        (lambda m: m.update(manifests.sealed(m | {"version": "7"})), "'version' is missing or of another type"),
    ],
)
def test_a_manifest_that_is_not_the_written_one_is_refused(store: Store, content: Any, said: str) -> None:
    artifact = make(store)
    path = writable(artifact.root / "manifest.json")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(edited(artifact, content) if callable(content) else content)
    with pytest.raises(IntegrityError) as caught:
        store.find("train", A)
    assert said in caught.value.message
    assert store.artifacts() == [] and [path for path, _ in store.unreadable()] == [artifact.root]


def test_a_manifest_with_another_one_s_digest_is_refused_although_it_fits_itself(store: Store) -> None:
    artifact = make(store)
    path = writable(artifact.root / "manifest.json")
    path.write_bytes(edited(artifact, lambda m: m.update(manifests.sealed(m | {"seed": 2}))))
    with pytest.raises(IntegrityError, match="replaced since it was read"):
        store.verify(artifact)


# ---- locks


HOLD = """
    import sys, time
    from pathlib import Path
    from sievit.pipeline import locks
    with locks.hold(Path(sys.argv[1]), "the thing"):
        print("held", flush=True)
        time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_held_key_names_its_holder_and_is_free_when_that_is_killed(store: Store) -> None:
    lock = store.lock_path(f"train-{A}")
    child = start(HOLD, str(lock))
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(LockedError) as caught, store.draft("train", A):
            pytest.fail("two hold one key")
        assert caught.value.exit_code == 5
        assert f"train@{A} is held by process {child.pid} on " in caught.value.message
        assert ", since 2" in caught.value.message
        began = time.monotonic()
        told: list[str] = []
        with pytest.raises(LockedError), store.draft("train", A, wait_s=0.3, waiting=told.append):
            pytest.fail("two hold one key")
        assert time.monotonic() - began >= 0.3 and len(told) == 1
    finally:
        child.kill()
        child.wait()
    with store.draft("train", A, wait_s=5):
        pass


def test_a_forked_worker_that_outlives_the_engine_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from pathlib import Path
        from sievit.pipeline import locks
        with locks.hold(Path(sys.argv[1]), "the thing"):
            worker = os.fork()
            if worker == 0:
                os.close(1)
                time.sleep(60)
            time.sleep(0.2)
            print(worker, flush=True)
            time.sleep(60)
    """
    child = start(code, str(tmp_path / "lock"))
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    try:
        with pytest.raises(LockedError), locks.hold(tmp_path / "lock", "the thing"):
            pytest.fail("the worker's birth released the engine's lock")
        child.kill()
        child.wait()
        with locks.hold(tmp_path / "lock", "the thing", wait_s=5):
            os.kill(worker, 0)  # it is alive
    finally:
        os.kill(worker, 9)


def test_a_lock_file_that_gc_removed_in_between_excludes_nobody_from_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.hold(path, "the thing"):
        path.unlink()
        with locks.hold(path, "the thing"), pytest.raises(LockedError), locks.hold(path, "the thing"):
            pytest.fail("two hold one lock")


# ---- a store that cannot take anything


def test_a_full_disk_is_refused_before_any_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 49 * 2**20))
    with pytest.raises(InputError, match="only 49 MiB are free"):
        store.require_space()


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "artifacts", Path("/proc/artifacts")):
        with pytest.raises(InputError, match="cannot be written"):
            Store(root).require_space()


def test_a_new_store_hides_itself_from_git(store: Store) -> None:
    store.require_space()
    assert (store.root / ".gitignore").read_text() == "*\n"


# ---- gc


def named_by_a_run(store: Store, *artifacts: Artifact, name: str = "a", whole: bool = True) -> records.RunRecord:
    nodes = [records.NodeRecord("main", a.kind_of_stage, a.kind_of_stage, "done", a.ref, a.key) for a in artifacts]
    if not whole:
        nodes.append(records.NodeRecord("main", "export", "export"))
    time.sleep(0.002)  # runs are told apart by the millisecond
    record = records.RunRecord(name * 12, "digits", "p.yaml", records.now(), records.now(), "complete", nodes)
    record.save(store)
    return record


def test_gc_keeps_what_runs_name_their_ancestors_and_the_newest(store: Store) -> None:
    ancestor = make(store, "a" * 12)
    loose, newest = make(store, "b" * 12), make(store, "c" * 12)
    inputs = {"model": {"stage": "train", "key": ancestor.key}, "onnx": [{"stage": "train", "key": ancestor.key}]}
    named = make(store, "d" * 12, stage="prune", inputs=inputs)
    named_by_a_run(store, named)
    would = gc.collect(store, keep_last=1, dry_run=True)
    assert [removal.path for removal in would] == [loose.root] and loose.root.exists()
    assert would[0].bytes == sum(p.stat().st_size for p in loose.root.rglob("*") if p.is_file())
    assert gc.collect(store, keep_last=1) == would
    assert {a.ref for a in store.artifacts()} == {ancestor.ref, newest.ref, named.ref}
    assert gc.collect(store, keep_last=1) == []


def test_gc_keeps_the_newest_whole_run_and_what_was_begun_since(store: Store) -> None:
    artifacts = [make(store, digit * 12) for digit in "1234"]
    for artifact, name, whole in zip(artifacts, "abcd", (True, False, True, False), strict=True):
        named_by_a_run(store, artifact, name=name, whole=whole)
    assert {r.path.name for r in gc.collect(store, keep_last=2, dry_run=True)} == set()
    removed = gc.collect(store, keep_last=1)
    assert {(r.kind, r.path.name) for r in removed} == {
        ("unused", "1" * 12),
        ("unused", "2" * 12),
        ("run", "a" * 12),
        ("run", "b" * 12),
    }
    assert [run.id[0] for run in records.all_runs(store)] == ["c", "d"]
    named_by_a_run(store, name="e").pipeline = "another"
    assert {r.kind for r in gc.collect(store, keep_last=0)} == {"unused", "run"} and store.artifacts() == []


def test_gc_without_a_wish_removes_no_artifact(store: Store) -> None:
    make(store), make(store, B)
    assert gc.collect(store) == [] and len(store.artifacts()) == 2


def test_gc_removes_what_is_damaged_and_nothing_else(store: Store) -> None:
    whole, bad_file, bad_manifest, newer = (make(store, key) for key in (A, B, C, "f" * 12))
    damage_bit(bad_file.root)
    writable(bad_manifest.root / "manifest.json").write_text("{}")
    writable(newer.root / "manifest.json").write_text('{"schema": 99}')
    removed = gc.collect(store, damaged=True)
    assert {removal.path for removal in removed} == {bad_file.root, bad_manifest.root}
    assert whole.root.exists() and newer.root.exists()
    assert make(store, B).version == 5


def test_gc_sweeps_leftovers_and_keeps_checkpoints_unless_told(store: Store) -> None:
    make(store)
    folder = store.root / "train"
    (folder / f".tmp-{B}-1234").mkdir()
    (folder / f".work-{A}").mkdir()
    (folder / f".work-{B}").mkdir()
    assert [r.path.name for r in gc.collect(store)] == [f".tmp-{B}-1234", f".work-{A}"]
    assert [r.kind for r in gc.collect(store, checkpoints=True)] == ["checkpoints"]
    assert sorted(path.name for path in folder.iterdir()) == [".version", A]


def test_gc_refuses_while_a_run_uses_the_store(store: Store) -> None:
    with store.in_use(), store.in_use(), pytest.raises(LockedError, match="the store is held by process"):
        gc.collect(store)
    gc.collect(store)


# ---- keys


def test_a_key_does_not_depend_on_the_order_of_fields() -> None:
    assert keys.key_of({"a": 1, "b": {"c": 2.0, "d": None}}) == keys.key_of({"b": {"d": None, "c": 2.0}, "a": 1})
    assert keys.key_of({"a": 1}) != keys.key_of({"a": 2}) != keys.key_of({"b": 2})
    assert len(keys.key_of({})) == 12 and int(keys.key_of({}), 16) >= 0


def test_explain_names_the_fields_that_differ_from_the_nearest(store: Store) -> None:
    old = {
        "config": {"keep": 0.8, "weights": None, "list": [1, 2]},
        "inputs": {"onnx": [{"arm": "main", "digest": "x"}]},
    }
    far = {"config": {"keep": 0.1, "weights": {"m": 2}, "list": []}, "inputs": {}, "device": "cuda"}
    make(store, A, key_material=old), make(store, B, key_material=far)
    new = {
        "config": {"keep": 0.7, "weights": {"m": 1}, "list": [1, 3]},
        "inputs": {"onnx": [{"arm": "main", "digest": "y"}]},
        "seed": 1,
    }
    assert keys.explain(new, store.artifacts()) == [
        ("config.keep", 0.8, 0.7),
        ("config.weights", None, {"m": 1}),
        ("config.list", [1, 2], [1, 3]),
        ("inputs.onnx[0].digest", "x", "y"),
        ("seed", None, 1),
    ]
    found = keys.nearest(new, store.artifacts())
    assert found is not None and found[0].ref == "train@1"
    assert keys.explain(old, store.artifacts()) == [] == keys.explain(old, [])


def test_of_equally_near_artifacts_the_newest_is_explained(store: Store) -> None:
    make(store, A, key_material={"seed": 1}), make(store, B, key_material={"seed": 2})
    assert keys.explain({"seed": 3}, store.artifacts()) == [("seed", 2, 3)]
