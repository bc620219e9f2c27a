"""Flips: which test images a final file loses and wins is counted right, and which of them are shown follows a rule."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from PIL import Image
from scipy.stats import binom

from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.flips import PAIRS, SHOWN, SIDE, by_class, counted, pairs_of, shown, thumbnail
from sievit.stages.deploy.predict import answers
from sievit.stages.deploy.variants import Variant

CLASSES = [f"class {number}" for number in range(7)]


@pytest.fixture
def three() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 7, 300)
    dense, final = (np.where(rng.random(300) < share, labels, rng.integers(-1, 7, 300)) for share in (0.8, 0.6))
    return labels, dense, final


def test_counts_are_those_of_looking_at_one_image_after_the_other(
    three: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    slow = {"lost": 0, "won": 0, "wrong_otherwise": 0, "alike": 0}
    for label, one, other in zip(*three, strict=True):
        if one == other:
            slow["alike"] += 1
        elif one == label:
            slow["lost"] += 1
        elif other == label:
            slow["won"] += 1
        else:
            slow["wrong_otherwise"] += 1
    found = counted(*three)
    assert {name: found[name] for name in slow if name != "alike"} == {n: c for n, c in slow.items() if n != "alike"}
    assert found["agreement"] == slow["alike"] / 300
    assert min(slow.values()) > 0
    # McNemar: of the flips, as few as the fewer ones go one way by chance, doubled for both ways.
    fewer, flips = min(slow["lost"], slow["won"]), slow["lost"] + slow["won"]
    assert found["p"] == pytest.approx(min(1.0, 2 * binom.cdf(fewer, flips, 0.5)))


def test_pairs_of_classes_add_up_to_all_images_that_are_answered_otherwise(
    three: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    labels, dense, final = three
    lines, further = by_class(labels, dense, final, CLASSES)
    assert len(lines) == PAIRS
    assert sum(line["images"] for line in lines) + further["images"] == int((dense != final).sum())
    names = [*CLASSES, "no number"]  # a score that is no number is answer -1, the last
    for line in lines:
        met = [i for i in range(300) if (names[dense[i]], names[final[i]]) == (line["dense"], line["final"])]
        assert line["images"] == len(met)
        assert line["lost"] == sum(bool(dense[i] == labels[i]) for i in met)
        assert line["won"] == sum(bool(final[i] == labels[i]) for i in met)
    assert all(before["images"] >= after["images"] for before, after in itertools.pairwise(lines))


@pytest.mark.parametrize(
    ("lost", "won", "expected"), [(100, 100, (12, 12)), (3, 100, (3, 21)), (100, 2, (22, 2)), (5, 4, (5, 4))]
)
def test_half_of_the_places_go_to_each_side_and_none_stays_empty_while_there_are_flips(
    lost: int, won: int, expected: tuple[int, int]
) -> None:
    labels = np.zeros(300, np.int64)
    dense, final = labels.copy(), labels.copy()
    rng = np.random.default_rng(0)
    places = rng.permutation(300)
    final[places[:lost]] = 1
    dense[places[lost : lost + won]] = 1
    found = shown(labels, dense, final)
    assert len(found) == len(set(found)) == sum(expected) <= SHOWN
    first, second = found[: expected[0]], found[expected[0] :]
    assert first == sorted(first) and second == sorted(second)
    assert {int(final[i]) for i in first} == {1} and {int(dense[i]) for i in second} == {1}


def test_shown_images_are_spread_over_the_whole_test_split() -> None:
    labels = np.zeros(240, np.int64)
    found = shown(labels, labels, np.ones(240, np.int64))
    assert found == list(range(0, 240, 10))


def test_a_score_that_is_no_number_is_an_answer_that_is_never_right() -> None:
    scored = np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]], np.float32)
    assert answers(scored).tolist() == [1, -1, -1]


def test_a_thumbnail_is_a_small_picture_of_the_same_image() -> None:
    large = np.zeros((300, 300, 3), np.uint8)
    large[:, 150:, 0] = 250
    for pixels, side in ((large, SIDE), (large[:20, 140:160], 20)):
        picture = Image.open(io.BytesIO(thumbnail(pixels)))
        assert (picture.format, picture.size) == ("JPEG", (side, side))
        left, right = (np.asarray(picture)[side // 2, place] for place in (2, side - 3))
        assert left.max() < 25 and right[0] > 220 and right[1:].max() < 25
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    assert SHOWN * len(thumbnail(noise)) < 400_000  # what no picture can exceed


def test_every_final_file_is_laid_beside_the_dense_one_of_its_seed(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    tiny_onnx.sidecar(path)
    bundle = open_bundle(path)

    def file(arm: str, *, seed: int, final: bool = True) -> Variant:
        return Variant(f"{arm}@seed{seed}", "export", final, bundle, arm, seed)

    all_: list[Any] = [file(arm, seed=seed) for seed in (1, 2) for arm in ("main", "dense", "random")]
    found = pairs_of([*all_, file("main", seed=1, final=False)], all_[1])
    assert [(pair.dense.arm, pair.final.arm) for pair in found] == [
        (f"dense@seed{seed}", f"{arm}@seed{seed}") for arm in ("main", "random") for seed in (1, 2)
    ]
    alone = [file("main", seed=1), file("main", seed=1, final=False)]
    assert [(p.dense, p.final) for p in pairs_of(alone, alone[1])] == [(alone[1], alone[0])]
    assert pairs_of(alone[:1], alone[0]) == []
