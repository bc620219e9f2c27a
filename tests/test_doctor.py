"""`sievit doctor`: what it says of a machine, and that nothing broken can take it down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from shipped import Sievit, sievit

from sievit.stages import doctor
from sievit.stages.deploy.child import ChildFailed
from sievit.stages.doctor import Finding

__all__ = ["sievit"]
EVERY = ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"]


def found(findings: Iterator[Finding], name: str) -> Finding:
    (one,) = [each for each in findings if each.name == name]
    return one


def answers(**answers: Any) -> doctor.Ask:
    """Stands for the processes: what is to be done, or the provider's name -> its answer, or what it raises."""

    def ask(command: dict[str, Any]) -> dict[str, Any]:
        answer = answers[command.get("name", command["do"])]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    return ask


def test_this_machine_is_well_and_the_cpu_provider_has_computed_something(
    sievit: Sievit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = sievit("doctor", "--json")
    assert answer.code == 0, answer.out
    states = {each["name"]: each["state"] for each in answer.document["findings"]}
    assert states["provider cpu"] == states["torch"] == states["telemetry"] == "ok"
    assert {"python", "CPU", "cores", "memory", "disk", "GPU", "provider cuda"} <= set(states)
    assert list(tmp_path.iterdir()) == []


def test_a_provider_that_crashes_or_computes_nonsense_is_told_and_the_others_are_still_tried() -> None:
    ask = answers(
        providers={"version": "1", "available": EVERY},
        cpu={"right": True},
        cuda=ChildFailed("cuda: its process ended during provider (signal SIGSEGV)"),
        tensorrt={"right": False},
        openvino={"right": True},
    )
    by_name = {each.name: each for each in doctor.runtimes(ask)}
    states = [by_name[f"provider {name}"].state for name in ("cpu", "cuda", "tensorrt", "openvino")]
    assert states == ["ok", "note", "note", "ok"]
    assert "SIGSEGV" in by_name["provider cuda"].means and by_name["provider cuda"].do


@pytest.mark.parametrize(
    "asked",
    [
        answers(providers=ChildFailed("no answer")),
        answers(providers={"version": "1", "available": EVERY[:1]}, cpu=ChildFailed("crash")),
        answers(providers={"version": "1", "available": EVERY[:1]}, cpu={"right": False}),
    ],
)
def test_without_a_working_cpu_provider_nothing_can_run(asked: doctor.Ask) -> None:
    assert any(each.state == "wrong" and each.do for each in doctor.runtimes(asked))


def test_what_makes_a_run_impossible_is_exit_code_1_and_says_what_to_do(
    sievit: Sievit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ask: doctor.Ask) -> Iterator[Finding]:
        yield Finding("onnxruntime", "wrong", "does not start", "", "install it again")

    monkeypatch.setattr(doctor, "runtimes", broken)
    monkeypatch.setattr(doctor, "in_torch", lambda ask: iter(()))
    answer = sievit("doctor")
    assert answer.code == 1
    assert "Sievit cannot run here: onnxruntime" in answer.err and "help: install it again" in answer.err
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["avx2", "avx512f", "avx512_vnni", "amx_int8"], "tiles"),
        (["avx2", "avx512f", "avx512_vnni"], "dot products: INT8 files are usually clearly faster"),
        (["avx2", "avx_vnni"], "dot products: INT8 files are usually clearly faster"),
        (["asimd", "asimddp"], "dot products: INT8 files are usually clearly faster"),
        (["avx2", "avx512f"], "no 8-bit dot products"),
        (["avx2"], "no 8-bit dot products"),
        ([], "no vector instructions"),
    ],
)
def test_what_int8_gains_is_told_by_the_instruction_sets(sets: list[str], said: str) -> None:
    assert said in found(doctor.processor("Some CPU", sets), "CPU").means


def test_a_driver_that_torch_cannot_use_is_wrong_since_auto_would_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = answers(torch={"version": "2", "cuda": "12.8", "gpus": []})
    monkeypatch.setattr(doctor.host, "device", lambda wanted: "cuda")
    assert found(doctor.in_torch(ask), "GPU").state == "wrong"
    monkeypatch.setattr(doctor.host, "device", lambda wanted: "cpu")
    assert found(doctor.in_torch(ask), "GPU").state == "note"


def test_telemetry_is_off_before_a_library_can_read_that_it_is_on() -> None:
    program = (
        "import sievit.stages, os; from huggingface_hub import constants; "
        "print(os.environ['ORT_DISABLE_TELEMETRY'], constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_versions_are_those_that_python_itself_reads() -> None:
    names = {str(each.metadata["Name"]) for each in metadata.distributions()}
    assert len(names) > 50
    assert {name: doctor.host.version(name) for name in names} == {name: metadata.version(name) for name in names}
    assert doctor.host.version("Torch_Pruning") == metadata.version("torch-pruning")
    assert doctor.host.version("there-is-no-such-distribution") is None


def test_a_library_that_is_missing_or_too_old_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = dict.fromkeys(doctor.NEEDED, "99") | {"torch": "2.9.1", "timm": None}
    monkeypatch.setattr(doctor.host, "version", installed.get)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.10", "timm>=1.0.26", 'pytest; extra=="x"'])
    wrong = {each.name: each for each in doctor.versions() if each.state == "wrong"}
    assert set(wrong) == {"torch", "timm"}
    assert "torch >=2.10" in wrong["torch"].means and wrong["torch"].do == "pip install 'torch>=2.10'"
