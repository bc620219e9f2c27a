"""What is told during a run: lines in a log, bars on a terminal, nothing for a script, never a stray escape code."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sievit.pipeline import host
from sievit.pipeline.bars import Bars
from sievit.pipeline.progress import Display, Lines, Notebook, Quiet, Silent, choose, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(display: Display) -> None:
    with display.run(2):
        display.begin(1, "main/train")
        with display.task("epochs", 3) as task:
            for loss in (3.0, 2.0, 1.0):
                task.advance(1, loss=loss)
        display.note("a note")
        display.warn("a warning")
        display.end(1, "main/train", "train@7", 75.0)
        display.end(2, "main/prune", "prune@1 (cached)", 0.0)


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    tell(Lines(stream))
    assert stream.getvalue().splitlines() == [
        "[1/2] main/train ...",
        "  epochs 3/3  loss 1",
        "  a note",
        "  warning: a warning",
        "[1/2] main/train: train@7 in 1 min 15 s",
        "[2/2] main/prune: prune@1 (cached)",
    ]


def test_a_task_prints_at_most_every_ten_seconds_and_at_its_end() -> None:
    stream, now = io.StringIO(), [0.0]
    display = Lines(stream, clock=lambda: now[0])
    with display.task("epochs", 100) as task:
        for _ in range(100):
            now[0] += 0.25
            task.advance()
    assert stream.getvalue().splitlines() == [
        "  epochs 40/100  15 s left",
        "  epochs 80/100  5.0 s left",
        "  epochs 100/100",
    ]


def test_quiet_tells_warnings_and_silent_nothing() -> None:
    quiet = io.StringIO()
    tell(Quiet(quiet))
    assert quiet.getvalue() == "warning: a warning\n"
    tell(Silent())


def test_a_terminal_gets_bars_and_lines_that_stay() -> None:
    stream = Terminal()
    tell(Bars(stream))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for expected in ("stages", "epochs", "1/2  main/train", "train@7  1 min 15 s"):
        assert expected in text, expected
    for expected in ("a note", "warning: a warning", "train@7"):  # each says what it is about
        assert re.search(rf"1/2  main/train +{expected}", text), expected


def test_a_long_note_goes_on_below_its_beginning_and_breaks_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    display = Bars(stream, colour=False)
    with display.run(12):
        display.begin(3, "main/quantize")
        display.note("the measuring threads had a core for 37% of the time")
        lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()]
    column = len("  3/12  ") + 24 + 2
    (first,) = [number for number, line in enumerate(lines) if "the measuring" in line]
    assert lines[first] == "  3/12  main/quantize".ljust(column) + "the measuring threads had"
    assert lines[first + 1] == " " * column + "a core for 37% of the time"


@pytest.mark.parametrize(
    ("stream", "environment", "options", "kind"),
    [
        (Terminal(), {"TERM": "xterm"}, {}, Bars),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, {}, Bars),
        (Terminal(), {"TERM": "dumb"}, {}, Lines),
        (io.StringIO(), {"TERM": "xterm"}, {}, Lines),
        (io.StringIO(), {"FORCE_COLOR": "1"}, {}, Lines),
        (Terminal(), {"TERM": "xterm"}, {"quiet": True}, Quiet),
        (Terminal(), {"TERM": "xterm"}, {"silent": True, "quiet": True}, Silent),
    ],
)
def test_the_display_fits_its_stream(
    stream: Any, environment: dict[str, str], options: dict[str, bool], kind: type
) -> None:
    assert type(choose(stream=stream, environment=environment, **options)) is kind


def test_no_color_takes_the_colours_of_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured, plain = Terminal(), Terminal()
    tell(choose(stream=coloured, environment={"TERM": "xterm-256color"}))
    tell(choose(stream=plain, environment={"TERM": "xterm-256color", "NO_COLOR": "1"}))
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[0-9;]*m")
    assert colour.search(coloured.getvalue()) and not colour.search(plain.getvalue())


NASTY = "a[red]b[/red]\x1b[31mc\nd\te\u202ef\x00g\udcff"


def test_names_cannot_steer_the_terminal() -> None:
    log, terminal = io.StringIO(), Terminal()
    displays: list[tuple[Display, io.StringIO]] = [(Lines(log), log), (Bars(terminal, colour=False), terminal)]
    for display, stream in displays:
        with display.run(1):
            display.begin(1, NASTY)
            with display.task(NASTY, 1) as task:
                task.advance(1, **{NASTY: 1.0})
            display.note(NASTY)
            display.warn(NASTY)
            display.end(1, NASTY, NASTY, 0.0)
        text = stream.getvalue()
        assert "\x1b[31m" not in text and "\u202e" not in text and "\x00" not in text and "c\nd" not in text
        assert text.count("a[red]b[/red]") >= 3


def test_a_stage_s_notes_are_kept_in_order() -> None:
    notebook = Notebook(Silent())
    notebook.note("one")
    notebook.warn("two")
    with notebook.task("epochs", 1) as task:
        task.advance()
    assert notebook.notes == [{"level": "note", "text": "one"}, {"level": "warning", "text": "two"}]


def test_durations_are_for_people() -> None:
    expected = {
        0.04: "0.0 s",
        9.94: "9.9 s",
        59.4: "59 s",
        60.0: "1 min 0 s",
        3599.4: "59 min 59 s",
        7500.0: "2 h 5 min",
    }
    assert {seconds: duration(seconds) for seconds in expected} == expected


# ---- host facts


def test_a_command_line_tells_no_secret_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    words = [
        "/opt/x/__main__.py",
        "run",
        "--store",
        "/home/me/store",
        "--token",
        "abc",
        "--api-key=abc",
        "https://me:abc@host/x",
        "--set",
        "name=a b",
    ]
    said = host.command_line(words)
    assert "abc" not in said and "/home/me" not in said and "/opt" not in said
    assert said == "sievit run --store '~/store' --token '***' '--api-key=***' 'https://***@host/x' --set 'name=a b'"


def test_host_facts_name_the_machine_s_kind_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    facts = host.facts()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gb"] >= 1
    assert socket.gethostname() not in [str(value) for value in facts.values()]
    first = host.fingerprint()
    assert re.fullmatch("[0-9a-f]{12}", first) and host.fingerprint() == first
    monkeypatch.setattr(host, "facts", lambda: facts | {"cores": facts["cores"] + 1})
    assert host.fingerprint() != first


def test_git_is_asked_without_running_the_repository_s_programs(tmp_path: Path) -> None:
    assert host.git(tmp_path) is None

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-m", "a")
    git("config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; false")
    clean = host.git(tmp_path)
    assert clean is not None and re.fullmatch("[0-9a-f]{40}", clean["commit"]) and not clean["dirty"]
    (tmp_path / "a").write_text("b")
    dirty = host.git(tmp_path)
    assert dirty is not None and dirty["dirty"] and not (tmp_path / "ran").exists()


MEASURE_PEAKS = """
from sievit.pipeline import host
large = bytearray(400_000_000)
large[::4096] = b"x" * len(large[::4096])
peak = host.peak_memory_mb()
del large
host.reset_peak_memory()
print(peak, host.peak_memory_mb())
"""


def test_the_peak_of_memory_is_that_of_the_stage() -> None:
    # a process of its own: what other tests have held or still hold here would blur both figures
    done = subprocess.run([sys.executable, "-c", MEASURE_PEAKS], check=True, capture_output=True, text=True)
    peak, after = map(float, done.stdout.split())
    assert peak > 400
    assert 1 < after < peak - 300
