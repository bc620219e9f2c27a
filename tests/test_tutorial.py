"""The tutorial as its reader follows it: every file on the page is written and every command run, in their order."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_vision import image_folder

from sievit.stages import __main__ as composition

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps() -> Iterator[tuple[str, str]]:
    """("write NAME", text) and ("run", command) of each block, in the order of the page."""
    for kind, title, text in BLOCK.findall(TUTORIAL):
        if kind == "sh":
            yield from (("run", line) for line in text.splitlines() if line.strip())
        elif title:
            yield f"write {title}", text


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "photos", per_class=24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    said = {}
    for what, text in steps():
        if what != "run":
            (tmp_path / what.removeprefix("write ")).write_text(text, encoding="utf-8")
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(text))
        code = composition.main()
        said[text], told = capfd.readouterr()
        assert code == 0, f"{text}\n{said[text]}\n{told}"
    assert "nothing to do" not in said["sievit plan rehearsal.yaml"]
    changed = said["sievit plan rehearsal.yaml --set prune.target.macs=0.4"].splitlines()
    states = {line.split()[1]: line.split()[2] for line in changed if line.startswith("main ")}
    assert states["ticket"] == states["train"] == "cached" and states["prune"] == "run", "as the page says"
    assert (tmp_path / "insects" / "predict.py").exists()
    assert len(list((tmp_path / "artifacts" / "runs").glob("sweep-*/report.html"))) == 1
    assert said["sievit predict insects photos/ant"].count(".png") == 24


def test_what_the_tutorial_plans_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The part of it that trains nothing; the settings of the rest are read as its commands would."""
    image_folder(tmp_path / "photos", per_class=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    for what, text in steps():
        if what != "run":
            (tmp_path / what.removeprefix("write ")).write_text(text, encoding="utf-8")
            continue
        words = shlex.split(text)
        if words[1] in ("run", "sweep"):
            swept = {"--grid": "--set"}
            words = ["sievit", "plan", *(swept.get(word, word.partition(",")[0]) for word in words[2:])]
        elif words[1] not in ("init", "plan"):
            continue
        monkeypatch.setattr(sys, "argv", words)
        code = composition.main()
        assert code == 0, f"{text}\n{capfd.readouterr()}"


def test_the_tutorial_has_commands_and_they_are_all_ours() -> None:
    commands = [text for what, text in steps() if what == "run"]
    assert len(commands) >= 10
    assert all(command.startswith("sievit ") for command in commands)
    assert not re.search(r"^\s*(?:\$ )?sievit ", re.sub(BLOCK, "", TUTORIAL), re.MULTILINE), "a command outside a block"
