"""`--json-lines`: one object an event, named as the documentation names them, the result last."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import STAGES, BadInput
from test_cli import ROOT, folder, process

from sievit.pipeline.cli import execute
from sievit.pipeline.events import Events
from sievit.pipeline.progress import Ending

__all__ = ["folder"]
Event = dict[str, Any]
ENVELOPE = {"v", "event", "time"}


def documented() -> dict[str, set[str]]:
    """Event -> its fields, as docs/json-lines.md has them."""
    table = re.findall(
        r"^\| `(\w+)` \| (.+?) \| ", (ROOT / "docs" / "json-lines.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    rows = {name: {field.partition("`")[0] for field in cell.split("`")[1::2]} for name, cell in table}
    rows["run"] = {"stages"}  # whose own fields stand behind it
    return {name: fields for name, fields in rows.items() if name not in ENVELOPE}


def events(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Event]]:
    capfd.readouterr()
    code = execute(STAGES, (BadInput,), [*arguments, "--json-lines"])
    out, err = capfd.readouterr()
    assert err == ""
    return code, [json.loads(line) for line in out.splitlines()]


def of(found: list[Event], name: str) -> list[Event]:
    return [event for event in found if event["event"] == name]


def test_every_event_of_a_run_has_the_fields_that_are_documented(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, found = events(capfd, "run", "--arm", "main")
    assert code == 0
    known = documented()
    assert set(known) == {"run", "begin", "progress", "note", "warning", "end", "result"}
    for event in found:
        assert set(event) == ENVELOPE | known[event["event"]], event
        assert event["v"] == 1
    assert sorted(event["time"] for event in found) == [event["time"] for event in found]
    assert found[0]["event"] == "run"
    places = [(stage["arm"], stage["entry"]) for stage in found[0]["stages"]]
    assert [(event["arm"], event["entry"]) for event in of(found, "begin")] == places
    assert [(event["number"], event["state"]) for event in of(found, "end")] == [
        (number, "done") for number in range(1, len(places) + 1)
    ]
    (last,) = [event for event in of(found, "progress") if event["done"] == event["total"]]
    assert (last["task"], last["entry"], last["values"]) == ("train", "train", {"loss": 1 / 20})


def test_the_last_line_is_what_json_prints(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, found = events(capfd, "run")
    assert of(found, "result") == found[-1:]
    assert execute(STAGES, (BadInput,), ["run", "--json"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert found[-1]["result"].keys() == plain.keys()
    assert found[-1]["result"]["run"] == plain["run"]
    _, again = events(capfd, "run")
    assert {event["state"] for event in of(again, "end")} == {"cached"}
    assert {stage["expected_seconds"] for stage in again[0]["stages"]} == {None}
    _, forced = events(capfd, "train", "--force")
    assert forced[-1]["result"]["ref"] == of(forced, "end")[0]["ref"]


@pytest.mark.parametrize(
    ("code", "arguments", "ends"),
    [
        (3, ["run", "--set", "train.fail=true"], ["done", "failed"]),
        (3, ["run", "--set", "train.epcohs=1"], []),
        (2, ["run", "--frce"], []),
    ],
)
def test_a_failure_is_the_last_line_too(
    code: int, arguments: list[str], ends: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    got, found = events(capfd, *arguments)
    assert got == code
    assert [event["state"] for event in of(found, "end")] == ends
    assert found[-1]["event"] == "result"
    assert found[-1]["result"]["error"]["code"] == code
    assert found[-1]["result"]["error"]["hint"]


def test_progress_is_told_at_most_once_a_second_and_at_its_end() -> None:
    told: list[Event] = []
    now = [0.0]
    display = Events(told.append, clock=lambda: now[0])
    with display.run([("main", "train")], {("main", "train"): 3.0}):
        display.begin(1, ("main", "train"))
        with display.task("training", 12) as task:
            for step in range(12):
                now[0] += 0.25
                task.advance(1, loss=math.nan if step else 1.0)
            task.advance(0, top1=0.5)
        display.end(1, ("main", "train"), Ending("stopped", 1.23456))
    progress = [(event["done"], event["values"]) for event in of(told, "progress")]
    assert progress == [
        (1, {"loss": 1.0}), (5, {"loss": None}), (9, {"loss": None}), (12, {"loss": None, "top1": 0.5}),
    ]  # fmt: skip
    assert told[-1] == {
        "event": "end", "number": 1, "arm": "main", "entry": "train", "state": "stopped", "ref": None, "seconds": 1.235,
    }  # fmt: skip


def test_a_reader_that_goes_away_does_not_stop_the_run(folder: Path) -> None:
    reader, writer = os.pipe()
    running = process(folder, "run", "--json-lines", stdout=writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert json.loads(lines.readline())["event"] == "run"
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (141, "")
    done = process(folder, "run", "--json")
    out, _ = done.communicate(timeout=60)
    assert {stage["state"] for stage in json.loads(out)["stages"]} == {"cached"}, "everything was made"


def test_a_stopped_run_ends_in_a_result_that_says_how_to_go_on(folder: Path) -> None:
    running = process(folder, "run", "--json-lines", "--set", "train.pause=0.1", "--set", "train.epochs=100")
    assert running.stdout is not None
    deadline = time.monotonic() + 60
    for line in running.stdout:
        assert time.monotonic() < deadline
        if json.loads(line)["event"] == "progress":
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")
    last = json.loads(out.splitlines()[-1])
    assert last["result"]["error"]["code"] == 130
    assert "last checkpoint" in last["result"]["error"]["hint"]
