"""main/prune is what that arm's stage left in the newest whole run, for every command that takes a reference."""

from __future__ import annotations

from pathlib import Path

from test_cli import Sievit, folder, sievit
from test_completion import Tab, tab

from sievit.pipeline.references import FORMS

__all__ = ["folder", "sievit", "tab"]
ANEW = ("--set", "train.epochs=3")


def shown(sievit: Sievit, ref: str) -> str:
    answer = sievit("show", ref, "--json")
    assert answer.code == 0, answer.out
    return str(answer.document["ref"])


def made(sievit: Sievit, arm: str, entry: str, *arguments: str) -> str:
    """The artifact of a stage in a run of these settings."""
    stages = sievit("run", *arguments, "--json").document["stages"]
    return str(next(each["ref"] for each in stages if (each["arm"], each["entry"]) == (arm, entry)))


def test_an_arm_s_stage_is_that_of_the_newest_whole_run_and_nothing_unfinished_takes_its_place(sievit: Sievit) -> None:
    whole = made(sievit, "main", "prune")
    assert shown(sievit, "main/prune") == whole
    newer = made(sievit, "main", "prune", *ANEW, "--until", "prune")
    assert newer != whole and shown(sievit, "prune") != whole
    assert shown(sievit, "main/prune") == whole, "the newer run is not whole"
    sievit("run", *ANEW)
    assert shown(sievit, "main/prune") == newer
    sievit("run")
    assert shown(sievit, "main/prune") == whole, "a whole run that found everything cached is the newest all the same"


def test_where_no_run_is_whole_it_is_what_the_newest_has_made(sievit: Sievit) -> None:
    first = made(sievit, "main", "train", "--arm", "main", "--until", "train")
    second = made(sievit, "main", "train", *ANEW, "--arm", "main", "--until", "train")
    sievit("run", "--set", "train.epochs=4", "--arm", "main", "--until", "ticket")
    assert first != second and shown(sievit, "main/train") == second


def test_a_whole_run_whose_artifact_is_gone_is_passed_over(sievit: Sievit, folder: Path) -> None:
    first = made(sievit, "main", "train")
    second = made(sievit, "main", "train", *ANEW)
    Path(sievit("show", second, "--json").document["path"]).rename(folder / "away")
    assert shown(sievit, "main/train") == first


def test_every_command_that_takes_a_reference_takes_an_arm_s_stage(sievit: Sievit) -> None:
    sievit("run")
    difference = sievit("diff", "dense/train", "main/train", "--json").document
    assert (difference["left"], difference["right"]) == (shown(sievit, "dense/train"), shown(sievit, "main/train"))
    assert difference["left"] != difference["right"]
    assert sievit("verify", "main/prune", "--json").document["checked"] == 1
    assert "random/prune is in the store: prune@" in sievit("explain", "random/prune").out
    change = sievit("explain", "random/prune", "--set", "prune.target.macs=0.4").out
    assert "random/prune would run" in change and "target.macs: 0.5 -> 0.4" in change
    pruned = sievit("prune", "--input", "model=dense/train", "--json").document["ref"]
    assert sievit("show", pruned, "--json").document["inputs"]["model"]["ref"] == difference["left"]


def test_an_arm_is_named_once(sievit: Sievit) -> None:
    answer = sievit("explain", "random/prune", "--arm", "random")
    assert answer.code == 2 and "leave out --arm random, or write prune" in answer.err
    unknown = sievit("explain", "randm/prune")
    assert unknown.code == 2 and "'random'" in unknown.err


UNKNOWN = {
    "main/prun": "did you mean 'main/prune'?",
    "mian/prune": "did you mean 'main/prune'?",
    "prun": "did you mean 'prune'?",
    "bogus": "there are artifacts of benchmark",
    "main": "name one of its stages: main/ticket, main/train",
    "somewhere-else/export": "there are main/export, dense/export, random/export",
    "main/train/x": "did you mean 'main/train'?",
    "train@99": "there are train@1",
    "train@@": "write train",
}


def test_an_unknown_reference_is_answered_with_the_nearest_and_with_all_forms(sievit: Sievit) -> None:
    sievit("run")
    for ref, near in UNKNOWN.items():
        for command in (["show", ref], ["verify", ref], ["diff", "main/train", ref]):
            error = sievit(*command, "--json").document["error"]
            assert error["code"] == 3
            assert near in error["hint"] and FORMS in error["hint"], (ref, error)


def test_in_a_store_without_runs_and_of_what_no_run_has_made_the_next_step_is_told(sievit: Sievit) -> None:
    assert "`sievit run` makes one" in sievit("show", "main/train", "--json").document["error"]["hint"]
    sievit("run", "--until", "train")
    error = sievit("show", "main/prune", "--json").document["error"]
    assert "no run has made main/prune" in error["message"] and "sievit run --until prune" in error["hint"]


def test_a_tab_behind_an_arm_offers_its_stages(tab: Tab, sievit: Sievit) -> None:
    sievit("run")
    assert tab("show", "dense/") == ["dense/ticket", "dense/train", "dense/finetune", "dense/export"]
    assert tab("verify", "main/pr") == ["main/prune"]
