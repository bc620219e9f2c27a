"""How results and errors are drawn: whole at 80 columns, and readable in fewer."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from report_run import measurement
from rich.console import Console, Group, RenderableType

from sievit.pipeline import views, views_store
from sievit.pipeline.diagnostics import Source, Span, located


def drawn(what: RenderableType, width: int = 80) -> str:
    """As a terminal of so many columns shows it, spaces at the ends of lines left out."""
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, emoji=False, highlight=False).print(what, crop=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_a_measurement_shows_every_percentile_with_its_interval_within_80_columns() -> None:
    shown = drawn(views.measurement(measurement()))
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split("batch 1, 1 thread\n")[1].splitlines()[:3] == [
        "file                       top-1       p50 ms      p90 ms     p99 ms    speed-up",
        "main/quantize int8         97.6%        0.894        1.07       1.70       2.31×",
        "472 KB, 21.9 M MACs   96.0–98.5%  0.876–0.921  0.983–1.16  1.52–1.97  2.22–2.43×",
    ]
    assert "below: 95% intervals; top-1 of 450 test images" in shown


def test_a_percentile_of_too_few_calls_is_a_dash_with_its_reason() -> None:
    rows: list[dict[str, Any]] = [row for row in measurement()["rows"] if row["p99_ms"] is None][:1]
    shown = drawn(views.measurement({"rows": rows})).splitlines()
    assert [line.split()[4] for line in shown[2:3]] == ["7.15"]
    assert "–" in shown[2].split()
    assert "131 calls," in shown[3]
    assert "662 needed" in shown[4]


def test_a_list_keeps_its_results_on_the_screen_however_long_an_arm_is_called() -> None:
    one = {
        "arm": "random@seed2",
        "entry": "finetune",
        "seconds": 125.0,
        "bytes": 21_900_000,
        "headline": "97.6% of MACs",
    }
    artifacts = [
        {"ref": "finetune@12", "created": "2025-12-31T23:59:01.123+00:00", **one},
        {"ref": "finetune@13", "created": "2026-01-02T03:04:05.678+00:00", **one},
    ]
    lines = drawn(views_store.artifacts({"store": "artifacts", "artifacts": artifacts})).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[-3:] for line in lines if line.startswith("finetune@")] == [["97.6%", "of", "MACs"]] * 2
    assert "2025-12-31" in lines[1] and "01-02 03:04" in lines[3], "the year of the newest goes without saying"
    assert lines[2].split() == lines[4].split() == ["finetune"]


def test_damage_is_told_in_sentences_and_its_place_can_be_copied_whole() -> None:
    place = "/home/somebody/a/rather/long/way/to/the/project/artifacts/train/238bdee454f0/model.safetensors"
    damaged = {
        "ref": "train@2",
        "message": "train@2 is not what was stored: model.safetensors has 7294050 bytes, expected 7294048",
        "where": place,
    }
    assert drawn(views_store.verification({"checked": 17, "damaged": [damaged]})).splitlines() == [
        "train@2",
        "  model.safetensors has 7294050 bytes, expected 7294048",
        f"  {place}",
        "17 artifacts checked, 1 damaged",
    ]
    removed = {"path": "s/train/238bdee454f0", "kind": "damaged", "why": damaged["message"], "bytes": 7_294_050}
    document = {"store": "s", "removed": [removed], "bytes": 7_294_050, "dry_run": True}
    assert drawn(views_store.collection(document)).splitlines() == [
        "what                                                   kind        size",
        "train/238bdee454f0                                     damaged  7.29 MB",
        "model.safetensors has 7294050 bytes, expected 7294048",
        "1 would be removed, 7.29 MB",
    ]


def test_a_difference_of_many_rows_is_one_line_and_of_a_few_is_told() -> None:
    curve = [{"field": f"curve[{row}].loss", "left": 1.0, "right": 2.0} for row in range(30)]
    few = [{"field": f"gates[{row}].bound", "left": 1.0, "right": 2.0} for row in range(2)]
    changes = {"config": [], "inputs": [], "files": [], "metrics": [*curve, *few]}
    shown = drawn(
        views_store.difference({"left": "train@1", "right": "train@2", "changes": changes, "common": {}})
    ).splitlines()
    assert len(shown) == 2 + 1 + 2
    assert shown[2].startswith("curve") and "30 values in 30 rows differ" in shown[2]
    assert [line.split() for line in shown[3:]] == [["gates[0].bound", "1", "2"], ["gates[1].bound", "1", "2"]]


@pytest.mark.parametrize("width", range(30, 130, 7))
def test_an_error_fits_the_terminal_and_its_carets_stay_under_the_fault(width: int) -> None:
    words = "stages: {train: {epochs: 4, " + ", ".join(f"other_{n}: {n}" for n in range(20)) + ", epcohs: 3, last: 1}}"
    span = Span(Source("pipeline.yaml", words), 1, words.index("epcohs") + 1, len("epcohs"))
    text = located("unknown key 'epcohs' in stages.train", span, "valid keys: " + ", ".join("abcdefghijklm" * 4)).text(
        width
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    source, carets = next((a, b) for a, b in itertools.pairwise(lines) if "^" in b)
    assert source[carets.index("^") : carets.rindex("^") + 1] == "epcohs"
    assert " ".join(text.split()).count("valid keys: a, b, c") == 1


def test_a_difference_ends_with_what_both_have_in_common() -> None:
    changes: dict[str, list[object]] = {"config": [], "inputs": [], "files": [], "metrics": []}
    common = {"images_jaccard": 0.25, "patches_of": "9 training images"}
    shown = drawn(
        views_store.difference({"left": "a@1", "right": "a@2", "changes": changes, "common": common})
    ).splitlines()
    assert shown[0] == "a@1 and a@2 are equal"
    assert [line.split() for line in shown[-2:]] == [
        ["images_jaccard", "0.25"], ["patches_of", "9", "training", "images"],
    ]  # fmt: skip


def test_a_matrix_of_three_kinds_of_patches_fits_80_columns_with_its_intervals_whole() -> None:
    kinds = ("ticket", "random", "full")
    cells = [
        {"arm": "magnitude", "test": kind, "mean": 0.295, "low": 0.2731, "high": 0.3172, "seeds": [0.295]}
        for kind in kinds
    ]
    spent = {"steps": 128, "macs": 600e9, "scoring_macs": 30e9}
    matrix = {
        "test": list(kinds), "arms": [{"arm": "magnitude", "spent": [spent]}], "cells": cells, "seeds": ["0", "1"],
        "claims": [], "budget": "epochs", "test_images": 3000,
    }  # fmt: skip
    lines = drawn(Group(*views.further({"matrix": matrix}))).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("27.3–31.7%") == 3
    for whole in ("magnitude", "On ticket", "On random", "On full", "Steps", "MACs spent", "630 G"):
        assert whole in text
