"""What holds the design together: who may import whom, what is fast because it is not imported, what is shipped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch", "torchvision", "timm", "torch_pruning", "nncf", "onnx", "onnxruntime", "onnxscript",
    "numpy", "scipy", "sklearn", "PIL", "matplotlib", "safetensors",
)  # fmt: skip
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


OUTPUT = {"--json", "--debug"}
LIVE = {"--quiet", "--json-lines", *OUTPUT}
STAGE = {"PIPELINE", "--set", "--arm", "--input", "--force", "--wait", "--store", *LIVE}
OPTIONS: dict[str, set[str]] = {  # of every command, as a user writes them; "" is `sievit` itself
    "": {"--version", "--json", "--install-completion", "--show-completion"},
    "run": {"PIPELINE", "--set", "--arm", "--only", "--until", "--force", "--wait", "--store", *LIVE},
    "sweep": {
        "PIPELINE",
        "--grid",
        "--search",
        "--objective",
        "--trials",
        "--seed",
        "--storage",
        "--set",
        "--store",
        "--quiet",
        *OUTPUT,
    },
    "plan": {"PIPELINE", "--set", "--check", "--store", *OUTPUT},
    "init": {"WHERE", "--data", "--model", "--target", "--device", "--yes", "--force", *OUTPUT},
    "doctor": {"--store", *OUTPUT},
    "schema": OUTPUT,
    "ticket": STAGE,
    "train": STAGE,
    "prune": STAGE,
    "finetune": STAGE,
    "export": STAGE,
    "adopt": STAGE,
    "quantize": STAGE,
    "benchmark": STAGE | {"--onnx", "--provider", "--batch", "--threads", "--timeout"},
    "matrix": STAGE,
    "sensitivity": STAGE | {"--seconds", "--importance", "--fraction"},
    "pack": {"MODEL", "--output", "--zip", "--store", *OUTPUT},
    "predict": {"MODEL", "IMAGE", "--top", "--store", *OUTPUT},
    "compare": {
        "A",
        "B",
        "--fail-if",
        "--data",
        "--provider",
        "--batch",
        "--threads",
        "--seconds",
        "--store",
        "--quiet",
        *OUTPUT,
    },
    "ls": {"STAGE", "--store", *OUTPUT},
    "show": {"REF", "--store", *OUTPUT},
    "explain": {"STAGE|REF", "PIPELINE", "--set", "--arm", "--store", *OUTPUT},
    "diff": {"LEFT", "RIGHT", "--store", *OUTPUT},
    "report": {"RUN", "--serve", "--port", "--store", *OUTPUT},
    "verify": {"REF", "--all", "--store", *OUTPUT},
    "gc": {"--keep-last", "--damaged", "--checkpoints", "--dry-run", "--yes", "--store", *OUTPUT},
}


def environment() -> dict[str, str]:
    """The checkout is what is imported, installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "COLUMNS": "80"}


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "pipeline.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "sievit.stages", "init", str(path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


def loaded(arguments: list[str], folder: Path) -> tuple[set[str], float]:
    """Top-level modules that one command line imports, and the CPU seconds that it takes."""
    program = """
import json, sys, time
from sievit.stages import __main__ as composition
sys.argv = ["sievit", *json.loads(sys.argv[1])]
code = composition.main()
names = sorted({name.partition(".")[0] for name in sys.modules})
sys.stdout.flush()
print("\\n" + json.dumps([code, names, time.process_time()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        env=environment(), cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, names, seconds = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names), seconds


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["plan"], ["schema"], ["ls"]], ids=" ".join
)
def test_what_needs_no_tensor_imports_no_tensor_library(arguments: list[str], pipeline_file: Path) -> None:
    names, seconds = loaded(arguments, pipeline_file.parent)
    assert not names & set(HEAVY)
    assert "--help" not in arguments or "rich" not in names, "its panels and its Markdown cost a third of the answer"
    assert seconds < 2, "help and plans answer at once"  # a quarter of a second on an idle machine


def test_the_command_line_is_there_before_any_config_is_built() -> None:
    """A default that is an instance, or a plugin of another package, costs every command what only `plan` may need."""
    program = """
import gc
from pydantic import BaseModel
from sievit.stages import __main__ as composition

def offspring(base):
    for kind in base.__subclasses__():
        yield kind
        yield from offspring(kind)

ours = {kind for kind in offspring(BaseModel) if kind.__module__.startswith("sievit.")}
print(len(ours) > 40, sorted(kind.__name__ for kind in ours if kind.__pydantic_complete__), gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "True [] True", done.stdout + done.stderr


def options_of(app: typer.Typer) -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {
        name: {
            option
            for param in command.params
            for option in (
                [param.metavar or param.name]
                if param.param_type_name == "argument"
                else [*param.opts, *param.secondary_opts]
            )
        }
        for name, command in {"": group, **group.commands}.items()  # type: ignore[attr-defined]
    }


def test_the_options_of_every_command_are_these_and_no_others() -> None:
    """A knob belongs into pipeline.yaml. Whoever adds an option changes this literal, and a reviewer sees it."""
    from sievit.pipeline.cli import build_app
    from sievit.stages import __main__ as composition

    more = {"commands": composition.COMMANDS, "further": composition.FURTHER}
    assert options_of(build_app(composition.STAGES, **more)) == OPTIONS
    for name in OPTIONS:  # a command that is built alone is the same command
        if name:
            alone = options_of(build_app(composition.STAGES, **more, alone=name))
            assert alone == {"": OPTIONS[""], name: OPTIONS[name]}


def test_every_stage_file_imports_without_a_tensor_library() -> None:
    stages = [path.stem for path in (ROOT / "stages").glob("*.py") if not path.stem.startswith("__")]
    assert len(stages) == 33
    program = f"import sys\nfrom sievit.stages import {', '.join(stages)}\nprint(set(sys.modules) & {set(HEAVY)!r})"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_the_stages_are_one_literal_in_the_order_of_the_pipeline() -> None:
    from sievit.stages.__main__ import STAGES

    assert [stage.name for stage in STAGES] == [
        "ticket",
        "train",
        "prune",
        "finetune",
        "export",
        "adopt",
        "quantize",
        "benchmark",
        "matrix",
    ]


def test_imports_point_down_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    done = subprocess.run([lint, "--no-cache"], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("stages/methods/cost.py", "sievit.pipeline.errors"),
        ("stages/deploy/session.py", "torch"),
        ("pipeline/keys.py", "numpy"),
        ("pipeline/keys.py", "sievit.stages"),
        ("stages/prune.py", "sievit.stages.train"),
    ],
)
def test_the_import_contracts_catch_a_wrong_import(importer: str, imported: str, tmp_path: Path) -> None:
    """The linter's silence above is worth something only if it is not silent here."""
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    for package in ("pipeline", "stages"):
        for source in (ROOT / package).rglob("*.py"):
            copy = tmp_path / "sievit" / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    wrong = tmp_path / "sievit" / importer
    before = wrong.read_text(encoding="utf-8") if wrong.exists() else "from __future__ import annotations\n"
    wrong.write_text(f"{before}\nimport {imported}\n", encoding="utf-8")
    env = {**environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [lint, "--no-cache", "--config", ROOT / "pyproject.toml"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_the_wheel_lists_every_package_and_nothing_else() -> None:
    """An editable install works without a forgotten package; the wheel does not."""
    found = {
        "sievit." + folder.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("pipeline", "stages")
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]
        if (folder / "__init__.py").exists()
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_file_that_is_not_python_is_listed_as_package_data() -> None:
    listed = {
        file
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.removeprefix("sievit.").replace(".", "/")).glob(pattern)
    }
    found = {
        path
        for top in ("pipeline", "stages")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert found == listed


def test_every_module_says_why_it_exists_and_no_name_says_nothing() -> None:
    import ast

    nameless = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "base"}
    clashing = {"select", "types", "copy", "profile", "onnx", "yaml", "torch", "timm"}
    for top in ("pipeline", "stages"):
        for path in (ROOT / top).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"
            assert path.stem not in nameless | clashing, path


def test_the_links_for_type_checkers_lead_to_the_packages() -> None:
    for top in ("pipeline", "stages"):
        assert (ROOT / ".typing" / "sievit" / top).resolve() == ROOT / top


def test_the_readme_shows_the_whole_pipeline_and_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "pipeline.yaml").read_text().rstrip() in readme
    tree = set(re.split(r"[^A-Za-z0-9_.]+", readme.split("## The tree")[1]))
    modules = {file.stem for folder in ("pipeline", "stages") for file in (ROOT / folder).rglob("*.py")}
    assert modules - tree - {"__init__", "__main__"} == set()


def test_no_placeholder_is_left_in_what_people_read() -> None:
    for file in [ROOT / "README.md", *(ROOT / "recipes").glob("*"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"@[A-Z]+@|TODO|TBD", file.read_text()), file


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_plans_and_names_no_path_of_ours(recipe: Path) -> None:
    from sievit.pipeline.plan import make_plan
    from sievit.pipeline.preflight import check_settings
    from sievit.pipeline.spec import load_pipeline
    from sievit.stages.__main__ import STAGES
    from sievit.stages.methods import InvalidInput

    spec = load_pipeline(recipe, STAGES)
    check_settings(make_plan(spec, STAGES), (InvalidInput,))
    assert not spec.data.source.startswith("/")
