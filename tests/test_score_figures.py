"""Pictures of a choice: right about what was kept, and whole whatever the classes are called."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_vision import data, image_folder

from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.score_figures import cuts, pictures
from sievit.stages.vision.scoring import Examples, choose


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=30)
    return load_splits(data(str(folder)), Path()).train


def words(svg: str) -> str:
    """The text of a picture; it must be XML."""
    return " ".join(text for element in ElementTree.fromstring(svg).iter() if (text := element.text) and text.strip())


@pytest.mark.parametrize("method", ["el2n", "moderate", "ccs"])
def test_scores_extremes_and_classes_are_shown(train: Images, method: str) -> None:
    scores = np.random.default_rng(0).random(len(train)).astype(np.float32)
    settings = Examples(method=method, keep=0.4)  # type: ignore[arg-type]
    kept = choose(settings, scores, train, seed=0)
    drawn = {picture.name: picture for picture in pictures(settings, train, scores, kept)}
    assert list(drawn) == ["scores", "scores-highest", "scores-lowest", "kept-by-class"]
    order = np.argsort(-scores, kind="stable")
    for name, where in (("scores-highest", order[:16]), ("scores-lowest", order[::-1][:16])):
        told = re.findall(r"(ant|bee) ([0-9.e-]+)", words(drawn[name].svg))
        assert told == [(train.classes[train.labels[i]], f"{scores[i]:.3g}") for i in where]
    assert f"{len(kept)} of {len(train)} images kept by {method}" in drawn["scores"].caption


def test_a_random_choice_has_no_scores_to_show_and_a_whole_one_nothing(train: Images) -> None:
    scores = np.random.default_rng(0).random(len(train)).astype(np.float32)
    settings = Examples(method="random", keep=0.5)
    kept = choose(settings, scores, train, seed=0)
    assert [picture.name for picture in pictures(settings, train, scores, kept)] == ["kept-by-class"]
    assert list(pictures(Examples(), train, scores, np.arange(len(train)))) == []


def test_class_names_cannot_break_a_picture(train: Images) -> None:
    names = ("<script>alert(1)</script>", "$\\alpha_$ & \x07\x00 bell")
    odd = replace(train, listing=replace(train.listing, classes=names))
    scores = np.random.default_rng(0).random(len(odd)).astype(np.float32)
    settings = Examples(method="el2n", keep=0.5)
    for picture in pictures(settings, odd, scores, choose(settings, scores, odd, seed=0)):
        assert "script" not in {
            element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture.svg).iter()
        }
        assert not re.search(r"[\x00-\x08]", picture.svg + picture.caption)
        if picture.name != "scores":
            assert "<script>alert(1)</s" in words(picture.svg)
            assert "$\\alpha_$ &" in words(picture.svg)


def test_cuts_are_where_the_kept_scores_of_a_class_end() -> None:
    scores = np.array([1.0, 2, 3, 4, 10, 20, 30, 40])
    classes = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    top = np.array([0, 0, 1, 1, 0, 1, 1, 1], bool)
    assert cuts(scores, top, classes).tolist() == [3, 20]
    middle = np.array([0, 1, 1, 0, 1, 1, 1, 1], bool)
    assert cuts(scores, middle, classes).tolist() == [2, 3]
    assert cuts(scores, top, classes * 0).tolist() == [3]
    nothing_of_one = np.array([0, 0, 0, 0, 0, 0, 1, 1], bool)
    assert cuts(scores, nothing_of_one, classes).tolist() == [30]
