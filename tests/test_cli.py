"""The command line as its users meet it: on the fake stages, through the one function that the console script calls."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import PIPELINE, STAGES, TRAIN, BadInput
from test_architecture import OPTIONS

from sievit.pipeline import errors
from sievit.pipeline.cli import execute
from sievit.pipeline.manual import laid_out
from sievit.pipeline.stage import Context, Preflight, Stage

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = 17  # stages of PIPELINE: 6 in main, 4 in dense, 6 in random, and the benchmark of all


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


Sievit = Callable[..., Answer]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline.yaml, which is the current one."""
    (tmp_path / "pipeline.yaml").write_text(PIPELINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    for name in ("FORCE_COLOR", "NO_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def sievit(folder: Path, capsys: pytest.CaptureFixture[str]) -> Sievit:
    def call(*arguments: str, stages: Sequence[Stage] = STAGES) -> Answer:
        capsys.readouterr()
        code = execute(stages, (BadInput,), arguments)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return call


def process(
    folder: Path, *arguments: str, env_more: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """The same, as a process of its own."""
    program = (
        "import sys; from fakes import STAGES, BadInput; from sievit.pipeline.cli import execute; "
        "sys.exit(execute(STAGES, (BadInput,), sys.argv[1:]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / '.typing'}{os.pathsep}{ROOT / 'tests'}",
        "COLUMNS": "80",
        **(env_more or {}),
    }
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, **piped)


# ---- help


@pytest.mark.parametrize("command", [name for name in OPTIONS if name])
def test_every_command_explains_itself_in_80_columns(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sievit.stages import __main__ as composition

    assert (
        execute(composition.STAGES, (), [command, "--help"], commands=composition.COMMANDS, further=composition.FURTHER)
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: sievit {command}")
    assert max(map(len, out.splitlines())) <= 80
    for option in OPTIONS[command]:
        assert option in out


def test_the_overview_groups_commands_by_task(sievit: Sievit) -> None:
    answer = sievit("--help")
    groups = re.findall(r"^(\w+):$", answer.out, re.MULTILINE)
    assert groups == ["Options", "Output", "Run", "Stages", "Inspect", "Store"]
    assert sievit().out.strip() == answer.out.strip()


def test_every_command_has_one_whole_sentence_in_the_overview(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sievit.stages import __main__ as composition

    further = {"commands": composition.COMMANDS, "further": composition.FURTHER}
    assert execute(composition.STAGES, (), ["--help"], **further) == 0
    overview = capsys.readouterr().out.partition("\nRun:\n")[2]
    found = re.findall(r"^  (\w+) +(\S.*(?:\n {4,}\S.*)*)", overview, re.MULTILINE)
    assert {name for name, _ in found} == set(OPTIONS) - {""}
    for name, summary in found:
        assert summary[0].isupper() and summary.endswith(".") and ". " not in summary, name


def test_a_wrong_command_names_the_nearest_of_all(sievit: Sievit) -> None:
    answer = sievit("trian")
    assert answer.code == 2
    assert "Did you mean" in answer.err and "'train'" in answer.err


def test_the_manual_of_a_stage_is_its_help_brackets_and_all(sievit: Sievit) -> None:
    manual = "Cut.\n\nReads [model], writes [bold]nothing[/bold]:\n\n    sievit prune --set 'x=[1, 2]'\n\nThe\nend."
    stages = [dataclasses.replace(stage, manual=manual) if stage.name == "prune" else stage for stage in STAGES]
    out = sievit("prune", "--help", stages=stages).out
    assert "\n  Cut.\n\n  Reads [model], writes [bold]nothing[/bold]:\n" in out
    assert "\n      sievit prune --set 'x=[1, 2]'\n" in out
    assert "\n  The end.\n" in out


MANUAL = """What it does, in a sentence that
goes on.

Kinds   one    the first one, told in
               two lines
        two    the second
Prose right below a table is no row of it.

    sievit prune pipeline.yaml --set prune.target.macs=0.4
"""


def test_a_manual_keeps_its_tables_at_any_width_and_its_sentences_run_on() -> None:
    assert (
        laid_out(MANUAL, 80)
        == """What it does, in a sentence that goes on.

Kinds   one    the first one, told in two lines
        two    the second
Prose right below a table is no row of it.

    sievit prune pipeline.yaml --set prune.target.macs=0.4"""
    )
    assert (
        laid_out(MANUAL, 33)
        == """What it does, in a sentence that
goes on.

Kinds   one    the first one,
               told in two lines
        two    the second
Prose right below a table is no
row of it.

    sievit prune pipeline.yaml
        --set
        prune.target.macs=0.4"""
    )


# ---- output and exit codes

WITHOUT_A_STORE = [
    ["ls"], ["plan"], ["schema"], ["verify"], ["gc"], ["--version"], ["explain", "train"],
]  # fmt: skip
WITH_A_STORE = [
    ["run"], ["train"], ["ls"], ["ls", "train"], ["show", "train"], ["explain", "train@2"],
    ["diff", "train@1", "train@2"], ["report"],
    ["verify"], ["verify", "train@1"], ["gc", "--dry-run"], ["plan"], ["benchmark"],
]  # fmt: skip
FAILURES = [
    (2, ["rnu"]),
    (2, ["run", "--frce"]),
    (2, ["run", "--wait", "soon"]),
    (2, ["run", "--only", "train", "--until", "export"]),
    (2, ["run", "--arm", "dens"]),
    (2, ["run", "--until", "exprt"]),
    (2, ["prune", "--arm", "dense"]),
    (2, ["prune", "--input", "model"]),
    (2, ["prune", "--input", "modle=train@1"]),
    (2, ["explain", "tran"]),
    (2, ["ls", "tran"]),
    (2, ["verify", "--all", "train@1"]),
    (3, ["run", "nowhere.yaml"]),
    (3, ["plan", "--set", "train.epcohs=3"]),
    (3, ["run", "--set", "train.fail=true"]),
    (3, ["prune"]),
    (3, ["show", "train@7"]),
    (3, ["show", "train@@"]),
    (3, ["report"]),
    (3, ["report", "abc"]),
]


@pytest.mark.parametrize("arguments", WITHOUT_A_STORE, ids=" ".join)
def test_with_json_stdout_is_one_document_and_stderr_silent(arguments: list[str], sievit: Sievit) -> None:
    answer = sievit(*arguments, "--json")
    assert answer.code == 0
    assert answer.document
    assert answer.err == ""


def test_with_json_stdout_is_one_document_in_a_filled_store_too(sievit: Sievit) -> None:
    assert sievit("run", "--quiet").code == 0
    for arguments in WITH_A_STORE:
        answer = sievit(*arguments, "--json")
        assert (answer.code, answer.err) == (0, ""), arguments
        assert answer.document, arguments


@pytest.mark.parametrize(("code", "arguments"), FAILURES, ids=lambda value: " ".join(value) if value is list else None)
def test_a_mistake_is_one_clear_message_and_its_exit_code(code: int, arguments: list[str], sievit: Sievit) -> None:
    answer = sievit(*arguments)
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "help: " in answer.err, "what to do about it"


@pytest.mark.parametrize(("code", "arguments"), FAILURES, ids=lambda value: " ".join(value) if value is list else None)
def test_a_mistake_with_json_is_one_document(code: int, arguments: list[str], sievit: Sievit) -> None:
    answer = sievit(*arguments, "--json")
    assert answer.code == code
    error = answer.document["error"]
    assert error["code"] == code
    assert error["message"] and error["hint"]
    assert answer.err == ""


def test_what_libraries_print_does_not_reach_stdout(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def chatter(ctx: Context) -> None:
        print("said in Python")  # noqa: T201
        os.write(1, b"said below Python\n")
        TRAIN.run(ctx)

    stages = [dataclasses.replace(stage, run=chatter) if stage is TRAIN else stage for stage in STAGES]
    assert execute(stages, (), ["run", "--until", "train", "--arm", "main", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["state"]
    assert "said in Python" in err and "said below Python" in err


def raising(error: Exception) -> list[Stage]:
    """The fake stages, `train` ending in this error."""

    def fail(ctx: Context) -> None:
        raise error

    return [dataclasses.replace(stage, run=fail) if stage is TRAIN else stage for stage in STAGES]


ERRORS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.SievitError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_ends_in_its_exit_code(kind: type[errors.SievitError], sievit: Sievit) -> None:
    answer = sievit("run", stages=raising(kind("the sky fell", hint="hold it up")))
    assert answer.code == kind.exit_code
    assert f"{kind.title}: the sky fell" in answer.err
    assert "help: hold it up" in answer.err


def test_an_unexpected_error_is_exit_code_1_and_a_traceback_only_with_debug(sievit: Sievit) -> None:
    stages = raising(ZeroDivisionError("division by zero"))
    short, long = sievit("run", stages=stages), sievit("run", "--debug", stages=stages)
    assert short.code == long.code == 1
    assert "division by zero" in short.err and "Traceback" not in short.err
    assert "Traceback" in long.err and "ZeroDivisionError" in long.err


def test_the_nearest_command_option_stage_arm_and_reference_are_named(sievit: Sievit) -> None:
    assert "'run'" in sievit("rnu").err
    assert "--force" in sievit("run", "--frce").err
    assert "'export'" in sievit("run", "--until", "exprt").err
    assert "'dense'" in sievit("run", "--arm", "dens").err
    assert "'train'" in sievit("ls", "tran").err
    assert "epochs" in sievit("plan", "--set", "train.epcohs=3").err


def test_a_name_cannot_steer_the_terminal(sievit: Sievit, folder: Path) -> None:
    for arguments in (
        ["run", "\x1b[31mred.yaml"],
        ["show", "train\x1b]0;title\x07"],
        ["ls", "[red]x"],
        ["plan", "\x9b2J"],
    ):
        answer = sievit(*arguments)
        assert answer.code in (2, 3)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", answer.err)
    assert "[red]x" in sievit("ls", "[red]x").err
    evil = folder / "\x1b[31mred"
    evil.mkdir()
    (evil / "pipeline.yaml").write_text(PIPELINE, encoding="utf-8")
    answer = sievit("run", str(evil / "pipeline.yaml"))
    assert answer.code == 0
    assert "\x1b" not in answer.out + answer.err


def test_what_is_no_terminal_gets_no_colour(sievit: Sievit) -> None:
    for arguments in (["run"], ["plan"], ["ls"], ["show", "train"], ["--help"], ["run", "--frce"]):
        answer = sievit(*arguments)
        assert "\x1b" not in answer.out + answer.err


# ---- run


def test_a_second_run_does_nothing_says_so_and_is_quick(sievit: Sievit) -> None:
    first = sievit("run")
    began = time.process_time()
    second = sievit("run")
    assert time.process_time() - began < 1
    assert first.code == second.code == 0
    assert f"{ENTRIES} stages run, 0 cached" in first.out
    assert f"nothing to do: {ENTRIES} stages cached" in second.out
    reports = [re.findall(r"report: (.+)", answer.out) for answer in (first, second)]
    assert reports[0] == reports[1]
    assert Path(reports[0][0]).is_file()


def test_quiet_is_silent_on_success(sievit: Sievit) -> None:
    assert sievit("run").err
    assert sievit("run", "--quiet", "--force").err == ""


def test_a_run_ends_with_the_first_words_of_its_report(sievit: Sievit) -> None:
    document = sievit("run", "--json").document
    words = document["verdict"]
    assert words and words in " ".join(Path(document["report"]).with_suffix(".md").read_text().split())
    answer = sievit("run", "--set", "gates.speedup=3").out
    assert words in " ".join(answer.split()), "the report was written anew"
    assert sievit("run", "--set", "gates.speedup=3", "--json").document["verdict"] == "", "nothing was"


def test_a_missed_gate_is_exit_code_6_after_the_report(sievit: Sievit) -> None:
    for answer in (sievit("run", "--set", "gates.speedup=3"), sievit("run", "--set", "gates.speedup=3")):
        assert answer.code == 6
        assert "gate speedup: 2.50×, at least 3.00× asked: missed" in answer.out
        assert "gate accuracy_drop: 0.1 points, at most 1.0 points asked: met" in answer.out
        assert Path(re.findall(r"report: (.+)", answer.out)[0]).is_file()
    document = sievit("run", "--set", "gates.speedup=3", "--json").document
    assert document["error"]["code"] == 6
    assert Path(document["report"]).is_file()


def test_a_failed_run_says_where_and_still_leaves_a_report(sievit: Sievit) -> None:
    answer = sievit("run", "--set", "train.fail=true")
    assert answer.code == 3
    assert "the images are not images" in answer.err
    assert "main/train" in answer.err
    assert "help: give another one" in answer.err
    page = Path(re.findall(r"report of the run so far: (.+)", answer.err)[0])
    assert "the images are not images" in page.read_text(encoding="utf-8")
    document = sievit("run", "--set", "train.fail=true", "--json").document
    assert document["error"]["where"] == "main/train"
    assert document["report"] == str(page)
    assert [each["entry"] for each in document["stages"] if each["state"] == "failed"] == ["train"]


def test_an_error_before_a_run_begins_is_not_blamed_on_an_older_run(sievit: Sievit) -> None:
    sievit("run", "--set", "train.fail=true")
    for arguments in (["run", "--set", "train.epcohs=3"], ["run", "--arm", "dens"]):
        assert "report" not in sievit(*arguments).err


def test_force_makes_again_what_is_there(sievit: Sievit) -> None:
    sievit("run")
    again = sievit("run", "--force", "--json").document
    assert {stage["state"] for stage in again["stages"]} <= {"done", "cached"}
    assert sum(stage["state"] == "done" for stage in again["stages"]) >= ENTRIES - 2


def test_until_and_arm_run_a_part(sievit: Sievit) -> None:
    part = sievit("run", "--until", "prune", "--arm", "random", "--json").document
    assert [(stage["arm"], stage["entry"]) for stage in part["stages"]] == [
        ("random", "ticket"),
        ("random", "train"),
        ("random", "prune"),
    ]
    assert part["gates"] == []


def test_only_runs_one_stage_and_refuses_when_its_input_is_not_there(sievit: Sievit) -> None:
    refused = sievit("run", "--only", "prune", "--arm", "main")
    assert refused.code == 3
    assert "main/ticket" in refused.err or "main/train" in refused.err
    sievit("run", "--until", "prune")
    part = sievit("run", "--only", "prune", "--arm", "main", "--set", "prune.importance=l1", "--json").document
    done = [stage["entry"] for stage in part["stages"] if stage["state"] == "done"]
    assert done == ["prune"]


def test_the_store_stands_beside_the_pipeline_unless_it_is_named(
    sievit: Sievit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder / "project"
    other.mkdir()
    (other / "pipeline.yaml").write_text(PIPELINE, encoding="utf-8")
    assert sievit("ticket", "project/pipeline.yaml").code == 0
    assert (other / "artifacts" / "ticket").is_dir()
    assert sievit("ticket", "--store", "named").code == 0
    assert (folder / "named" / "ticket").is_dir()
    monkeypatch.setenv("SIEVIT_STORE", "from-the-environment")
    assert sievit("ticket").code == 0
    assert (folder / "from-the-environment" / "ticket").is_dir()
    assert not (folder / "artifacts").exists()


# ---- plan


def test_a_plan_writes_nothing_and_a_run_keeps_to_it(sievit: Sievit, folder: Path) -> None:
    before = sievit("plan", "--json").document
    assert not (folder / "artifacts").exists()
    assert {stage["state"] for stage in before["stages"]} == {"run", "unknown"}
    sievit("run")
    change = ["--set", "prune.target.macs=0.4"]
    planned = {(s["arm"], s["entry"]): s["state"] for s in sievit("plan", *change, "--json").document["stages"]}
    ran = {(s["arm"], s["entry"]): s["state"] for s in sievit("run", *change, "--json").document["stages"]}
    assert planned.keys() == ran.keys()
    for node, state in planned.items():
        assert (state == "cached") == (ran[node] == "cached"), node


def test_a_checked_plan_refuses_what_a_run_would_refuse_and_a_quick_one_says_that_it_did_not_look(
    sievit: Sievit, folder: Path
) -> None:
    def no_opset_20(seen: Preflight) -> None:
        if seen.config.opset == 20:
            raise BadInput("20 does not go")

    picky = [dataclasses.replace(stage, preflight=no_opset_20) if stage.name == "export" else stage for stage in STAGES]
    quick = sievit("plan", stages=picky)
    assert quick.code == 0 and "not looked at: `sievit plan --check`" in quick.out
    checked, run = sievit("plan", "--check", stages=picky), sievit("run", stages=picky)
    assert checked.code == run.code == 3
    assert checked.err == run.err and "20 does not go" in run.err
    assert not (folder / "artifacts").exists()
    good = sievit("plan", "--check")
    assert good.code == 0 and "not looked at" not in good.out
    assert sievit("plan", "--check", "--json").document["checked"] is True


def test_a_plan_tells_the_field_that_changed_and_how_long_it_takes(sievit: Sievit) -> None:
    sievit("run")
    answer = sievit("plan", "--set", "prune.target.macs=0.4")
    assert answer.code == 0
    assert "target.macs: 0.5 -> 0.4" in answer.out
    assert re.search(r"main +finetune +unknown .* when prune has run", answer.out)
    assert re.search(r"9 of 17 stages to run, about .+ s", answer.out)
    assert max(map(len, answer.out.splitlines())) <= 80


def test_a_plan_tells_what_it_takes_of_the_disk_and_warns_when_there_is_less(
    sievit: Sievit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sievit.pipeline import expectations

    change = ("--set", "prune.target.macs=0.4", "--json")
    assert sievit("plan", *change).document["expected_bytes"] is None, "nobody knows"
    sievit("run")
    plan = sievit("plan", *change).document
    to_run = [stage for stage in plan["stages"] if stage["state"] in ("run", "unknown")]
    assert plan["expected_bytes"] == sum(stage["expected_bytes"] for stage in to_run)
    for stage in to_run:
        listed = sievit("show", stage["stage"], "--json").document["files"].values()
        assert stage["expected_bytes"] == sum(file["bytes"] for file in listed)
    assert plan["warnings"] == [] and plan["free_bytes"] > 0
    margin = 50 * 2**20
    for free, warns in ((plan["expected_bytes"] + margin, False), (plan["expected_bytes"] + margin - 1, True)):
        monkeypatch.setattr(expectations, "free_bytes", lambda folder, free=free: free)
        answer = sievit("plan", "--set", "prune.target.macs=0.4")
        assert ("warning: this will not fit" in answer.out) == warns
        assert (answer.code, "bytes of the 52.4 MB free" in answer.out) == (0, True)
    nothing = sievit("plan", "--json").document
    assert (nothing["expected_bytes"], nothing["expected_seconds"]) == (0, 0)


# ---- stage commands


def test_a_stage_runs_alone_on_the_newest_artifact_before_it(sievit: Sievit) -> None:
    assert sievit("prune").code == 3
    for stage in ("ticket", "train", "prune"):
        answer = sievit(stage)
        assert answer.code == 0, answer.err
        assert f"made {stage}@1" in answer.out
    assert "unchanged: prune@1" in sievit("prune").out
    assert re.search(r"made prune@\d", sievit("prune", "--force").out)


def test_an_older_version_can_be_given_as_input(sievit: Sievit) -> None:
    for arguments in (["ticket"], ["train"], ["train", "--set", "train.epochs=3"]):
        assert sievit(*arguments).code == 0
    newest = sievit("prune", "--json").document
    older = sievit("prune", "--input", "model=train@1", "--json").document
    assert newest["key"] != older["key"]
    assert sievit("show", older["ref"], "--json").document["inputs"]["model"]["ref"] == "train@1"


# ---- the store


def test_ls_and_show_tell_what_there_is(sievit: Sievit) -> None:
    assert "no artifacts in artifacts" in sievit("ls").out
    sievit("run")
    listed = sievit("ls").out
    assert len(listed.splitlines()) == ENTRIES + 1
    assert max(map(len, listed.splitlines())) <= 80
    assert len(sievit("ls", "train").out.splitlines()) == 4
    shown = sievit("show", "prune@1").out
    for fact in ("prune@1", "main/prune", "model", "train@1", "target.macs", "0.5", "payload.txt", "65 bytes"):
        assert fact in shown
    assert sievit("show", "prune@1", "--json").document["config"]["target"]["macs"] == 0.5


def test_explain_names_the_field_for_a_stage_and_for_an_artifact(sievit: Sievit) -> None:
    sievit("run")
    assert "main/prune is in the store: prune@1" in sievit("explain", "prune").out
    change = sievit("explain", "prune", "--set", "prune.target.macs=0.4").out
    assert "main/prune would run" in change and "target.macs: 0.5 -> 0.4" in change
    below = sievit("explain", "finetune", "--set", "prune.target.macs=0.4").out
    assert "not known before prune has run" in below and "->" not in below
    assert "epochs" not in sievit("explain", "train@1").out
    sievit("train", "--set", "train.epochs=3")
    assert "epochs: 20 -> 3" in sievit("explain", "train@latest").out


def test_a_stage_below_a_miss_tells_its_own_changes_too(sievit: Sievit) -> None:
    sievit("run")
    changed = ["--set", "prune.target.macs=0.4", "--set", "finetune.epochs=3"]
    plan = sievit("plan", *changed).out.splitlines()
    (at,) = [number for number, line in enumerate(plan) if line.split()[:2] == ["main", "finetune"]]
    assert "when prune has run" in plan[at]
    assert re.search(r"^ +epochs: \d+ -> 3$", plan[at + 1].rstrip())
    (export,) = [line for line in plan if line.split()[:2] == ["main", "export"]]
    assert export.split()[-4:] == ["when", "finetune", "has", "run"], "nothing of its own has changed"
    told = sievit("explain", "finetune", *changed).out
    assert "not known before prune has run, and differs from finetune@" in " ".join(told.split())
    assert re.search(r"epochs: \d+ -> 3", told)


def test_what_is_not_there_is_said_and_no_command_is_made_up(sievit: Sievit, folder: Path) -> None:
    for command in (["ls"], ["verify"], ["gc"], ["report"], ["show", "train"], ["diff", "train@1", "train@2"]):
        answer = sievit(*command, "--store", "elsewhere")
        assert answer.code == 3
        assert "there is no such store" in answer.err and "elsewhere" in answer.err
    assert "nothing to remove: no artifacts in artifacts" in sievit("gc").out
    assert "the store is empty" in sievit("show", "bogus").err
    sievit("run")
    told = sievit("show", "bogus").err
    assert "there are artifacts of benchmark, export, finetune" in told and "sievit bogus" not in told
    assert "nothing to remove: no artifact is damaged" in sievit("gc", "--damaged").out


def test_diff_lists_config_inputs_and_files(sievit: Sievit) -> None:
    sievit("run")
    sievit("train", "--set", "train.epochs=3")
    changes = sievit("diff", "train@1", "train@latest", "--json").document["changes"]
    assert changes["config"] == [{"field": "config.epochs", "left": 20, "right": 3}]
    assert [each["field"] for each in changes["metrics"]] == ["epochs"]
    assert [each["field"] for each in changes["files"]] == ["payload.txt"]
    assert "train@1 and train@1 are equal" in sievit("diff", "train@1", "train@1").out


def test_verify_names_what_is_damaged_and_gc_removes_it(sievit: Sievit, folder: Path) -> None:
    sievit("run")
    assert "17 artifacts checked, 0 damaged" in sievit("verify").out
    damaged = Path(sievit("show", "train@1", "--json").document["path"]) / "payload.txt"
    damaged.chmod(0o644)
    damaged.write_text("0" * 65, encoding="utf-8")
    answer = sievit("verify", "--json")
    assert answer.code == answer.document["error"]["code"] == 4
    assert [each["ref"] for each in answer.document["damaged"]] == ["train@1"]
    assert sievit("verify", "train@2").code == 0
    assert sievit("verify", "train@1").code == 4
    assert sievit("gc", "--damaged", "--yes").code == 0
    assert not damaged.exists()
    assert sievit("verify").code == 0
    assert sievit("run").code == 0


def test_gc_does_not_act_without_being_told(sievit: Sievit, folder: Path) -> None:
    sievit("run")
    for keep in (0.3, 0.4):
        sievit("prune", "--set", f"prune.target.macs={keep}")
    left = folder / "artifacts" / "train" / ".tmp-0123456789ab-x"
    left.mkdir()
    (left / "half").write_text("half", encoding="utf-8")
    assert ".tmp-0123456789ab-x" in sievit("gc", "--dry-run").out
    refused = sievit("gc")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert left.exists()
    removed = sievit("gc", "--yes", "--json").document["removed"]
    assert str(left) in [str(folder / each["path"]) for each in removed]
    assert not left.exists()
    assert "nothing to do" in sievit("run").out


def test_gc_removes_what_only_older_runs_need_and_keeps_lineage_whole(sievit: Sievit) -> None:
    sievit("run")
    before = {each["ref"] for each in sievit("ls", "--json").document["artifacts"]}
    sievit("run", "--set", "train.epochs=3")
    assert sievit("gc", "--keep-last", "2", "--yes", "--json").document["removed"] == []
    assert sievit("gc", "--yes").code == 0
    after = {each["ref"] for each in sievit("ls", "--json").document["artifacts"]}
    assert "train@1" in before - after
    assert {"ticket@1", "ticket@2", "ticket@3"} <= after, "the newer run stands on them"
    assert "nothing to do" in sievit("run", "--set", "train.epochs=3").out
    assert sievit("verify").code == 0
    assert sievit("gc", "--keep-last", "0").code == 2


def test_a_report_can_be_written_again(sievit: Sievit) -> None:
    run = sievit("run", "--json").document
    page = Path(run["report"])
    page.unlink()
    assert sievit("report").code == 0
    assert page.is_file()
    assert sievit("report", run["run"], "--json").document["report"] == str(page)


def test_runs_are_laid_side_by_side_and_one_of_them_twice_is_refused(sievit: Sievit) -> None:
    first = sievit("run", "--json").document["run"]
    second = sievit("run", "--set", "train.epochs=3", "--json").document["run"]
    document = sievit("report", first, second, "--json").document
    assert document["runs"] == [first, second]
    assert "| train.epochs |" in Path(document["markdown"]).read_text(encoding="utf-8")
    assert Path(document["report"]).is_file()
    refused = sievit("report", first, first)
    assert (refused.code, "is named twice" in refused.err) == (3, True)
    assert sievit("report", first, "abc").code == 3
    assert sievit("report").code == 0, "the page on both is no run"


# ---- schema


def test_the_schema_is_json_with_or_without_json(sievit: Sievit) -> None:
    assert sievit("schema").document == sievit("schema", "--json").document
    assert "stages" in sievit("schema").document["properties"]


def test_version_names_the_libraries_without_importing_them(sievit: Sievit) -> None:
    answer = sievit("--version")
    assert answer.code == 0
    assert re.search(r"torch \d+\.\d+", answer.out)


# ---- sievit benchmark on files


@pytest.fixture
def measure(folder: Path, capfd: pytest.CaptureFixture[str]) -> Sievit:
    """`sievit benchmark` of the real stages."""
    from sievit.stages import __main__ as composition
    from sievit.stages.methods import InvalidInput

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        line = ["benchmark", *arguments]
        code = execute(composition.STAGES, (InvalidInput,), line, commands=composition.COMMANDS)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


def test_any_onnx_file_is_measured_without_a_pipeline_and_without_torch(folder: Path) -> None:
    from tiny_onnx import linear

    (folder / "pipeline.yaml").unlink()
    linear(folder / "tiny.onnx")
    program = (
        "import sys; from sievit.stages.__main__ import main; code = main(); "
        "sys.exit(code or (9 if {'torch', 'timm'} & set(sys.modules) else 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "COLUMNS": "80"}
    line = ["benchmark", "--onnx", "tiny.onnx", "--provider", "cpu", "--batch", "1", "--batch", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["p50_ms"] > 0 for row in rows)
    assert [path.name for path in folder.iterdir()] == ["tiny.onnx"], "nothing is written"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (3, ["--onnx", "nowhere.onnx"]),
        (3, ["--onnx", "pipeline.yaml"]),
        (3, ["--onnx", "empty.onnx"]),
        (2, ["--onnx", "pipeline.yaml", "--provider", "tpu"]),
        (2, ["--onnx", "pipeline.yaml", "--batch", "0"]),
        (2, ["--onnx", "pipeline.yaml", "--timeout", "0"]),
        (2, ["--batch", "8"]),
        (2, ["--timeout", "8"]),
    ],
)
def test_what_is_no_onnx_file_or_no_setting_is_refused(
    code: int, arguments: list[str], measure: Sievit, folder: Path
) -> None:
    (folder / "empty.onnx").touch()
    answer = measure(*arguments)
    assert (answer.code, answer.out) == (code, "")
    assert "Traceback" not in answer.err
    assert "help: " in answer.err
    assert measure(*arguments, "--json").document["error"]["code"] == code


def test_a_file_that_never_ends_is_given_up_after_the_time_that_is_asked(measure: Sievit, folder: Path) -> None:
    from test_predict import endless

    endless(folder / "endless.onnx")
    answer = measure("--onnx", "endless.onnx", "--timeout", "6")
    assert (answer.code, answer.out) == (1, "")
    assert "endless.onnx" in answer.err and "within 6 s; its process was ended" in answer.err, answer.err


# ---- processes


def on_a_terminal(folder: Path, *arguments: str, interrupt_at: str = "") -> tuple[int, str]:
    """(exit code, all that a terminal of 60 columns is sent). interrupt_at: Ctrl-C is typed when this is seen."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    more = {"TERM": "xterm-256color", "COLUMNS": "60", "LINES": "24"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C becomes a signal

    running = process(folder, *arguments, env_more=more, preexec_fn=own_terminal, **streams)
    os.close(theirs)
    said, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            said += os.read(ours, 1 << 16).decode(errors="replace")
        except OSError:  # the other end was closed
            break
        if interrupt_at and interrupt_at in said:
            os.write(ours, b"\x03")
            interrupt_at = ""
    os.close(ours)
    return running.wait(timeout=60), said


def test_ctrl_c_in_the_live_view_leaves_a_clean_screen_and_says_how_to_go_on(folder: Path) -> None:
    slow = ["run", "--set", "train.pause=0.2", "--set", "train.epochs=50"]
    code, said = on_a_terminal(folder, *slow, interrupt_at="2/50")
    assert code == 130
    assert "\x1b[?25h" in said.rpartition("\x1b[?25l")[2], "the cursor is shown again"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    for part in ("main", "▸ train", "loss"):
        assert part in plain, part
    last = " ".join(plain.rpartition("interrupted:")[2].split())
    assert "finished stages are kept" in last
    assert "stopped in main/train" in last and "run the same command again" in last and "last checkpoint" in last
    assert "Traceback" not in plain


@pytest.mark.parametrize(
    ("more", "said"), [([], "finished stages are kept"), (["--force"], "other stages are made anew, as --force says")]
)
def test_how_a_stopped_run_goes_on_is_told_as_it_is(
    more: list[str], said: str, sievit: Sievit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(ctx: Context) -> None:
        raise KeyboardInterrupt

    stages = [dataclasses.replace(stage, run=stop) if stage is TRAIN else stage for stage in STAGES]
    monkeypatch.setattr(sys, "argv", ["sievit", "run", *more])  # what the hint repeats
    answer = sievit("run", *more, stages=stages)
    assert answer.code == 130
    assert said in answer.err and "main/train goes on from its last checkpoint" in answer.err


def test_with_no_color_a_terminal_gets_the_tree_without_colours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    code, said = on_a_terminal(folder, "run", "--arm", "dense")
    assert code == 0
    assert "▸ train" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[0-9;]*m", said)


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    for arguments in (["--help"], ["schema"]):
        reader, writer = os.pipe()
        os.close(reader)
        running = process(folder, *arguments, stdout=writer)
        os.close(writer)
        _, err = running.communicate(timeout=60)
        assert (running.returncode, err) == (141, ""), arguments


def test_a_terminal_without_the_signs_still_gets_the_lines(folder: Path) -> None:
    running = process(folder, "run", "--quiet", env_more={"PYTHONIOENCODING": "ascii"})
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert "gate speedup: 2.50?" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_said_in_one_line(folder: Path) -> None:
    for arguments in (["schema"], ["--help"], ["plan"]):
        with Path("/dev/full").open("w") as full:
            running = process(folder, *arguments, stdout=full)
            _, err = running.communicate(timeout=60)
        assert running.returncode == 1
        assert err.startswith("error: the output cannot be written"), arguments
        assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_goes_on(number: signal.Signals, code: int, folder: Path) -> None:
    slow = ["train", "--set", "train.pause=0.1", "--set", "train.epochs=30"]
    assert process(folder, "ticket").wait(timeout=60) == 0
    running = process(folder, *slow, "--json")
    checkpoints = folder / "artifacts" / "train"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob(".work-*/checkpoint.json")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert json.loads(out)["error"]["code"] == code
    assert json.loads(out)["error"]["hint"]
    assert "Traceback" not in err
    again = process(folder, *slow, "--json")
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert json.loads(out)["metrics"]["resumed_at"] >= 1
