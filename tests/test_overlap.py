"""What two choices have in common, against sets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import STAGES

from sievit.pipeline.cli_store import compared
from sievit.pipeline.store import Artifact
from sievit.stages import ticket
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.overlap import by_chance, jaccard, patch_jaccard
from sievit.stages.vision.overlap import overlap

DATA = {"images": 20, "image_size": 32, "labels": "ab"}


def tickets(folder: Path, kept: list[int], *, ranks: np.ndarray | None = None, keep: int = 16, **data: Any) -> Path:
    """A tickets artifact of 20 images and a grid of 4 x 4, as far as it is compared."""
    folder.mkdir()
    patches = {"grid": [4, 4], "kept_per_image": keep, "of": 16}
    record = {"data": {"train": {**DATA, **data}}, "examples": {"of": 20}, "patches": patches}
    (folder / "tickets.json").write_text(json.dumps(record))
    np.save(folder / "kept.npy", np.array(kept))
    if ranks is not None:
        np.save(folder / "ranks.npy", ranks)
    return folder


def shuffled(seed: int) -> np.ndarray:
    return np.stack([np.random.default_rng([seed, i]).permutation(16) for i in range(20)]).astype(np.uint8)


def test_jaccard_is_that_of_sets() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        left, right = (set(rng.sample(range(30), rng.randint(1, 30))) for _ in range(2))
        expected = len(left & right) / len(left | right)
        assert jaccard(np.array(sorted(left)), np.array(sorted(right))) == pytest.approx(expected)


def test_patch_jaccard_is_the_mean_over_images_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = shuffled(1), shuffled(2)
    each = []
    for one, other in zip(left, right, strict=True):
        a, b = set(np.flatnonzero(one < 10)), set(np.flatnonzero(other < 6))
        each.append(len(a & b) / len(a | b))
    assert patch_jaccard(left, 10, right, 6) == pytest.approx(np.mean(each))
    monkeypatch.setattr("sievit.stages.methods.overlap.ROWS", 7)
    assert patch_jaccard(left, 10, right, 6) == pytest.approx(np.mean(each))


def test_chance_is_what_random_choices_have_in_common() -> None:
    rng = random.Random(0)
    shared = either = 0
    for _ in range(3000):
        left, right = set(rng.sample(range(40), 10)), set(rng.sample(range(40), 20))
        shared, either = shared + len(left & right), either + len(left | right)
    assert by_chance(10, 20, 40) == pytest.approx(shared / either, rel=0.02)


def test_equal_tickets_share_everything_and_what_is_compared_is_named(tmp_path: Path) -> None:
    one = tickets(tmp_path / "a", [1, 4, 7], ranks=shuffled(1), keep=8)
    other = tickets(tmp_path / "b", [1, 4, 9, 11], ranks=shuffled(2), keep=8)
    assert overlap(one, one)["images_jaccard"] == overlap(one, one)["patches_mean_jaccard"] == 1
    found = overlap(one, other)
    assert (found["images_in_both"], found["images_in_either"], found["images_jaccard"]) == (2, 5, 0.4)
    assert found["patches_mean_jaccard"] == pytest.approx(patch_jaccard(shuffled(1), 8, shuffled(2), 8), abs=1e-4)
    assert found["patches_of"] == "20 training images"


def test_whole_images_have_no_patches_to_compare(tmp_path: Path) -> None:
    one = tickets(tmp_path / "a", [1, 4, 7], ranks=shuffled(1), keep=8)
    assert set(overlap(one, tickets(tmp_path / "b", [1]))) == {
        "images_in_both", "images_in_either", "images_jaccard", "images_jaccard_by_chance",
    }  # fmt: skip


def test_choices_from_other_data_are_not_compared_and_the_numbers_that_disagree_are_told(tmp_path: Path) -> None:
    found = overlap(tickets(tmp_path / "a", [1]), tickets(tmp_path / "b", [1], images=19, labels="cd"))
    assert found == {
        "images": "not compared: chosen from 20 images of 32 px (labels ab), and from 19 images of 32 px (labels cd)"
    }


def test_what_are_no_tickets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tickets.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not a readable tickets artifact"):
        overlap(tmp_path, tmp_path)


def test_diff_asks_the_stage_once_its_files_are_verified(tmp_path: Path) -> None:
    manifest = {"config": {}, "inputs": {}, "metrics": {}, "files": {}}
    one, other = (
        Artifact(tickets(tmp_path / name, kept), "ticket", name * 12, version, manifest)
        for name, kept, version in (("a", [1, 2], 1), ("b", [2, 3], 2))
    )
    verified: list[str] = []
    document = compared(one, other, (ticket.STAGE,), lambda artifact: verified.append(artifact.ref))
    assert document["common"]["images_jaccard"] == pytest.approx(1 / 3, abs=1e-4)
    assert verified == ["ticket@1", "ticket@2"]
    assert compared(one, other, STAGES, lambda artifact: None)["common"] == {}
