"""What a tab offers, as bash and zsh ask for it; nothing is ever said, whatever is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import STAGES, BadInput
from test_cli import ROOT, Sievit, folder, sievit

from sievit.pipeline.cli import execute

__all__ = ["folder", "sievit"]
Tab = Callable[..., list[str]]


@pytest.fixture
def tab(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tab:
    """What bash is given for words of which the last is being typed, taken apart as bash takes them."""

    def press(*words: str) -> list[str]:
        monkeypatch.setenv("_SIEVIT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["sievit", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        capsys.readouterr()
        assert execute(STAGES, (BadInput,), []) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name in ("_SIEVIT_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            monkeypatch.delenv(name)
        return out.splitlines()

    return press


def test_commands_options_arms_stages_and_runs_are_offered(tab: Tab, sievit: Sievit) -> None:
    run = sievit("run", "--json").document["run"]
    assert tab("sho") == ["show"]
    assert tab("run", "--unt") == ["--until"]
    assert tab("run", "--arm", "") == ["main", "dense", "random"]
    assert tab("train", "--arm", "d") == ["dense"]
    assert tab("run", "--until", "ex") == ["export"]
    assert tab("ls", "t") == ["ticket", "train"]
    assert tab("report", "") == [run]
    assert set(tab("explain", "qu")) == {"quantize", "quantize@1", "quantize@2"}


def test_artifacts_are_offered_behind_the_sign_at_which_bash_takes_words_apart(tab: Tab, sievit: Sievit) -> None:
    sievit("run")
    assert tab("show", "") == sorted(stage.name for stage in STAGES)
    assert tab("show", "tr") == ["train", "train@3", "train@2", "train@1"]
    assert tab("show", "train", "@") == ["3", "2", "1"]
    assert tab("diff", "train", "@", "1", "train", "@", "2") == ["2"]
    assert tab("show", "tickets", "@") == []


def test_set_offers_fields_with_the_values_that_they_have_and_then_others(tab: Tab, sievit: Sievit) -> None:
    assert tab("plan", "--set", "prune.ta") == ["prune.target.macs=0.5", "prune.target.params=null"]
    assert tab("plan", "--set", "train.weights.") == [
        "train.weights.method=group_lasso",
        "train.weights.strength=0.0001",
    ]
    assert tab("plan", "--set", "train.weights.method", "=") == ["group_lasso", "l1"]
    assert tab("plan", "--set", "model.pre") == ["model.pretrained=false"]
    for offered in tab("plan", "--set", "finetune."):
        assert sievit("plan", "--set", offered).code == 0, offered


def test_zsh_gets_whole_words(folder: Path, sievit: Sievit, monkeypatch: pytest.MonkeyPatch) -> None:
    sievit("run")
    monkeypatch.setenv("_SIEVIT_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "sievit show train@")
    assert all(f"train@{version}" in sievit().out for version in (1, 2, 3))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "sievit sho")
    assert '"show"' in sievit().out


def test_what_is_damaged_missing_or_wrong_is_passed_over_in_silence(tab: Tab, sievit: Sievit, folder: Path) -> None:
    assert tab("show", "train", "@") == []
    sievit("run")
    for manifest in (folder / "artifacts" / "train").glob("*/manifest.json"):
        manifest.chmod(0o644)
        manifest.write_text("{" if manifest.stat().st_size else "")
        break
    assert len(tab("show", "train", "@")) == 2
    (folder / "pipeline.yaml").write_text("stages: {train: [")
    assert tab("run", "--arm", "") == tab("plan", "--set", "train.") == []
    (folder / "pipeline.yaml").unlink()
    assert tab("run", "--until", "") == []
    assert tab("show", "--store", "nowhere", "train", "@") == []


def test_only_what_the_command_needs_is_imported(folder: Path) -> None:
    program = (
        "import sys; from sievit.stages.__main__ import main; code = main(); "
        "sys.stderr.write(' '.join(sorted({'torch', 'rich', 'numpy', 'onnx'} & set(sys.modules))))"
    )
    words = {"COMP_WORDS": "sievit\nshow\ntr", "COMP_CWORD": "2", "_SIEVIT_COMPLETE": "complete_bash"}
    environment = {**os.environ, **words, "PYTHONPATH": str(ROOT / ".typing")}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
