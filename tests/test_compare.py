"""`sievit compare`: a gate may be passed only by what was measured, and it says what it compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from onnx import helper, numpy_helper
from scipy import stats
from shipped import DATA, DENSE, DIGITS, MAIN, Answer, Sievit, classifier, commit, measurement, row, sievit, store

from sievit.pipeline.errors import InputError, UsageError
from sievit.pipeline.store import Store
from sievit.stages import benchmark
from sievit.stages.conditions import ACCURACY, FIELDS, Condition, parse
from sievit.stages.deploy import scorer
from sievit.stages.deploy.predict import scores
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.dataset import load_split

__all__ = ["sievit", "store"]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the benchmark: 10 ms and 4 ms, without a p99. Holds the arguments of every call. Files are scored in
    this process, which is quicker.
    """
    calls: list[Any] = []

    def measured(files: Any, *arguments: Any) -> dict[str, Any]:
        calls.append((list(files), *arguments))
        baseline = row("0", p50_ms=10.0, speedup=1.0, speedup_low=1.0, speedup_high=1.0, verdict="baseline")
        return measurement([baseline, row("1", p50_ms=4.0)])

    @contextmanager
    def here(path: Path, provider: str) -> Iterator[Any]:
        yield lambda pixels: scores(path, pixels, provider=provider)

    monkeypatch.setattr(benchmark, "benchmark_files", measured)
    monkeypatch.setattr(scorer, "scorer", here)
    return calls


def fails(*conditions: str) -> list[str]:
    return [part for condition in conditions for part in ("--fail-if", condition)]


def right(seed: int) -> np.ndarray:
    """Which test digits the classifier of a seed has right, by the definition, in float64."""
    pre = tiny_onnx.PREPROCESSING
    images = load_split(DATA, Path(), "test")
    inputs = ((images.pixels().astype(np.float64) / 255 - pre["mean"]) / pre["std"]).transpose(0, 3, 1, 2)
    scores = inputs.reshape(len(images), -1) @ tiny_onnx.weights(classes=10, seed=seed).astype(np.float64)
    return scores.argmax(1) == images.labels


# ---- what is compared


def test_accuracy_is_that_of_the_test_images_of_the_pipeline_and_its_p_is_mcnemars(
    sievit: Sievit, store: Store, timed: list[Any]
) -> None:
    answer = sievit("compare", "dense", "main", "--json")
    assert (answer.code, answer.err) == (0, "")
    found, ours = answer.document["accuracy"], (right(0), right(1))
    only = [int((ours[0] & ~ours[1]).sum()), int((ours[1] & ~ours[0]).sum())]
    assert found["images"] == 120 == len(ours[0])
    assert found["top1"] == [ours[0].mean(), ours[1].mean()]
    assert [found["only_a"], found["only_b"]] == only and all(only)
    assert found["p"] == pytest.approx(stats.binomtest(only[0], sum(only), 0.5).pvalue)
    assert found["drop"] == pytest.approx(ours[0].mean() - ours[1].mean(), abs=1e-12)
    for top1, low, high in zip(found["top1"], found["top1_low"], found["top1_high"], strict=True):
        assert low < top1 < high


def test_both_files_are_timed_together_as_the_options_say(sievit: Sievit, store: Store, timed: list[Any]) -> None:
    sievit("compare", "dense", "main", "--batch", "4", "--threads", "2", "--seconds", "0.5")
    (files, providers, batches, threads, seconds, _) = timed[0]
    expected = [store.open("export", DENSE).file("model.onnx"), store.open("quantize", MAIN).file("model.onnx")]
    assert [path.absolute() for path in files] == expected
    assert (providers, batches, threads, seconds) == (("cpu",), (4,), (2,), 0.5)


@pytest.mark.slow
def test_files_are_really_measured_and_a_file_is_no_faster_than_itself(sievit: Sievit, store: Store) -> None:
    """The one run of the real benchmark here."""
    document = sievit("compare", "dense", "export@1", "--seconds", "0.1", "--json").document
    assert document["fields"]["latency_verdict"] == "no difference"
    assert document["fields"]["accuracy_verdict"] == "no difference"
    assert (document["accuracy"]["p"], document["fields"]["agreement"]) == (1.0, 1.0)
    assert document["b"]["p50_ms"] > 0 and document["noise_floor"]["percent"] >= 0


def test_sizes_stand_side_by_side_with_the_weights_beside_the_file(
    sievit: Sievit, store: Store, timed: list[Any], tmp_path: Path
) -> None:
    from test_bundle import external

    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "model.data").write_bytes(tiny_onnx.weights().tobytes())
    tiny_onnx.sidecar(external(apart, location="model.data"))
    whole = classifier(tmp_path / "whole", classes=("class 0", "class 1", "class 2", "class 3"))
    document = sievit("compare", str(whole), str(apart / "model.onnx"), "--json").document
    size = (apart / "model.onnx").stat().st_size + 768 * 4
    assert document["b"]["bytes"] == size
    assert document["fields"]["bytes_ratio"] == size / whole.stat().st_size
    assert document["a"]["bytes"] == whole.stat().st_size


def test_the_table_names_both_and_says_what_was_found(sievit: Sievit, store: Store, timed: list[Any]) -> None:
    answer = sievit("compare", "dense", "main", *fails("speedup < 1.5"))
    assert answer.code == 0
    for told in ("A: dense (export@1)", "B: main (quantize@1)", "top-1", "2.50×", "faster", "120 test images"):
        assert told in answer.out, told
    assert "speedup < 1.5 (2.5): passes" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


def test_accuracy_is_measured_on_the_images_of_another_pipeline_when_it_is_named(
    sievit: Sievit, timed: list[Any], tmp_path: Path
) -> None:
    paths = [str(classifier(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 1))]
    data = "data: {source: 'builtin:digits', image_size: 8, max_test: 120}\n"
    model = "model: {name: deit_tiny_patch16_224}\nstages: {ticket: {}, train: {epochs: 1}, export: {}}\n"
    (tmp_path / "pipeline.yaml").write_text(data + model)
    found = sievit("compare", *paths, "--data", "pipeline.yaml", "--json").document["accuracy"]
    assert found["top1"] == [right(0).mean(), right(1).mean()]
    without = sievit("compare", *paths, "--json").document
    assert without["accuracy"] is None and "is no file of this store" in without["unsaid"]["accuracy"]
    assert "no accuracy: model.onnx is no file of this store" in " ".join(sievit("compare", *paths).out.split())


# ---- conditions


def test_a_condition_that_holds_is_exit_code_6_after_the_result(sievit: Sievit, store: Store, timed: list[Any]) -> None:
    drop = right(0).mean() - right(1).mean()
    for condition, code in [
        ("speedup < 2.6", 6), ("speedup < 2.5", 0), ("speedup <= 2.5", 6), ("latency_verdict != faster", 0),
        ("latency_verdict == faster", 6), (f"accuracy_drop > {drop + 0.001}", 0),
        (f"accuracy_drop > {drop - 0.001}", 6),
        ("macs_ratio >= 1", 6), ("bytes_ratio > 1.5", 0), ("p90_ms > 1", 6), ("agreement < 0.99", 6),
    ]:  # fmt: skip
        answer = sievit("compare", "dense", "main", *fails("speedup < 0.1", condition))
        assert answer.code == code, condition
        assert "A: dense" in answer.out
        assert ("gate missed" in answer.err) == (code == 6)
    document = sievit("compare", "dense", "main", *fails("speedup < 3"), "--json").document
    assert document["error"]["code"] == 6
    (judged,) = document["conditions"]
    assert (judged["value"], judged["holds"], judged["bound"]) == (2.5, True, 3.0)


def test_a_drop_of_exactly_the_bound_is_not_above_it() -> None:
    assert not parse("accuracy_drop > 0.01").holds({"accuracy_drop": (93 - 92) / 100})


WRONG = {
    "accuracy_dorp > 0.01": "did you mean 'accuracy_drop'?",
    "speed < 1.5": "valid fields: accuracy, accuracy_drop",
    "accuracy_drop": "is no condition",
    "> 0.01": "is no condition",
    "": "is no condition",
    "accuracy_drop > 1%": "1% is 0.01",
    "accuracy_drop > 1": "one point is 0.01",
    "accuracy_drop >= 1": "one point is 0.01",
    "accuracy > 1": "one point is 0.01",
    "accuracy_drop >": "is no number",
    "speedup < nan": "is no number",
    "speedup < inf": "is no number",
    "speedup == 2": "comparators: <, <=, >, >=",
    "speedup => 2": "comparators: <, <=, >, >=",
    "latency_verdict > faster": "comparators: ==, !=",
    "latency_verdict == fast": "did you mean 'faster'?",
    "accuracy_verdict == slower": "valid words: better, worse, no difference",
    "speedup < 1.5; import os": "is no number",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_condition_is_refused_before_anything_with_what_there_is(text: str, sievit: Sievit) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert WRONG[text] in f"{error.value.message} {error.value.hint}"
    answer = sievit("compare", "nobody", "nothing", *fails("speedup < 1", text))
    assert answer.code == 2 and answer.out == ""


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("accuracy_drop > 0.01", ("accuracy_drop", ">", 0.01)),
        ("  speedup<1.5 ", ("speedup", "<", 1.5)),
        ("p99_ms>=1e1", ("p99_ms", ">=", 10.0)),
        ("accuracy_drop < -0.005", ("accuracy_drop", "<", -0.005)),
        ("agreement < 1", ("agreement", "<", 1.0)),  # unless both always answer alike
        ("latency_verdict == no difference", ("latency_verdict", "==", "no difference")),
        ("accuracy_verdict != 'worse'", ("accuracy_verdict", "!=", "worse")),
    ],
)
def test_a_condition_is_a_field_a_comparator_and_a_bound(text: str, parsed: tuple[str, str, Any]) -> None:
    condition = parse(text)
    assert (condition.field, condition.comparator, condition.bound) == parsed


def test_every_field_is_explained_in_the_help_and_filled_by_a_comparison(
    sievit: Sievit, store: Store, timed: list[Any]
) -> None:
    manual = sievit("compare", "--help").out
    assert [field for field in FIELDS if field not in manual] == []
    fields = sievit("compare", "dense", "main", "--json").document["fields"]
    assert sorted(fields) == sorted(FIELDS)
    assert {name for name in FIELDS if fields[name] is None} == {"p99_ms"}


# ---- what cannot be judged


def test_what_was_not_measured_is_an_error_and_no_pass(sievit: Sievit, store: Store, timed: list[Any]) -> None:
    answer = sievit("compare", "dense", "main", *fails("p99_ms > 1000", "speedup < 1"))
    assert answer.code == 3
    assert "p99_ms cannot be judged: there are 300 calls, 662 needed; raise --seconds" in answer.err
    assert "p99_ms > 1000: cannot be judged" in answer.out
    with pytest.raises(InputError, match="was not measured"):
        Condition("speedup < 1", "speedup", "<", 1.0).holds({})


@pytest.mark.parametrize("field", sorted(ACCURACY))
def test_without_labels_no_condition_on_accuracy_is_passed_and_nothing_is_measured(
    field: str, sievit: Sievit, store: Store, timed: list[Any], tmp_path: Path
) -> None:
    tiny_onnx.linear(tmp_path / "bare.onnx", classes=10)
    foreign = classifier(tmp_path / "foreign", seed=4)
    condition = f"{field} == worse" if field == "accuracy_verdict" else f"{field} > 0.9"
    for other, why in [("bare.onnx", "has no sidecar"), (str(foreign), "is no file of this store")]:
        for sides in (["dense", other], [other, "dense"]):
            answer = sievit("compare", *sides, *fails(condition))
            assert (answer.code, answer.out) == (3, "")
            assert f"{field} cannot be judged" in answer.err and why in answer.err
    assert timed == []


def test_macs_that_no_sidecar_states_are_counted_in_the_graph(
    sievit: Sievit, store: Store, timed: list[Any], tmp_path: Path
) -> None:
    tiny_onnx.linear(tmp_path / "bare.onnx", classes=10)
    found = 3 * 8 * 8 * 10  # the sidecar of dense states 768
    for condition, code in ((f"macs < {found}", 0), (f"macs <= {found}", 6), (f"macs_ratio >= {found / 768}", 6)):
        assert sievit("compare", "dense", "bare.onnx", *fails(condition)).code == code, condition


def test_macs_that_nobody_can_tell_are_not_judged(
    sievit: Sievit, store: Store, timed: list[Any], tmp_path: Path
) -> None:
    """An operator of the runtime's own may multiply as it likes."""
    product = helper.make_node("FusedMatMul", ["flat", "weight"], ["logits"], domain="com.microsoft")
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), product]
    weight = numpy_helper.from_array(tiny_onnx.weights(classes=10), "weight")
    shape: list[int | str] = ["n", 3, 8, 8]
    tiny_onnx.save(tmp_path / "bare.onnx", nodes, [weight], shape, ["n", 10], domains=[("com.microsoft", 1)])
    for sides, condition in ((["dense", "bare.onnx"], "macs > 1"), (["bare.onnx", "dense"], "macs_ratio > 1")):
        answer = sievit("compare", *sides, *fails(condition))
        assert answer.code == 3 and "the MACs of bare.onnx stand in no sidecar .json" in answer.err
    assert timed == []
    assert sievit("compare", "bare.onnx", "dense", *fails("macs < 1")).code == 0, "B's own are known"


def test_networks_of_other_classes_or_other_images_are_not_compared(
    sievit: Sievit, store: Store, timed: list[Any], tmp_path: Path
) -> None:
    other = commit(store, "export", "e" * 12, "other", "onnx", weights=2, data=DATA | {"test_fraction": 0.4})
    answer = sievit("compare", "dense", other.ref)
    assert answer.code == 3 and "they differ in data.test_fraction" in answer.err and "--data" in answer.err
    fewer = commit(store, "export", "9" * 12, "fewer", "onnx", weights=2, data=DATA | {"max_train": 50})
    assert "they differ in data.max_train" in sievit("compare", "dense", fewer.ref).err
    same = commit(store, "export", "c" * 12, "same", "onnx", weights=2, data=DATA | {"workers": 4, "mean": [0.1] * 3})
    assert sievit("compare", "dense", same.ref).code == 0, "these decide nothing about which images are tested on"
    (tmp_path / "letters").mkdir()
    letters = classifier(tmp_path / "letters", classes=tuple("abcdefghij"))
    (tmp_path / "pipeline.yaml").write_text(
        "data: {source: 'builtin:digits', image_size: 8}\nmodel: {name: deit_tiny_patch16_224}\n"
        "stages: {ticket: {}, train: {epochs: 1}, export: {}}\n"
    )
    answer = sievit("compare", "dense", str(letters), "--data", "pipeline.yaml")
    assert answer.code == 3 and "the first other one is 'a'" in answer.err
    assert DIGITS[0] == "0"


def test_a_file_that_does_not_run_is_told_and_not_passed(
    sievit: Sievit, store: Store, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any) -> None:
        raise InvalidInput("it does not run", "export it again")

    monkeypatch.setattr(benchmark, "benchmark_files", refuses)
    answer: Answer = sievit("compare", "dense", "main", *fails("speedup < 1"), "--json")
    assert answer.code == 3
    assert json.loads(answer.out)["error"]["message"] == "it does not run"
