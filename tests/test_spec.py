"""What a user sees for a wrong pipeline.yaml, as whole printed texts; and that a right one means what it says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from fakes import PIPELINE, STAGES, TRAIN
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sievit.pipeline.document import parse
from sievit.pipeline.errors import SievitError, SpecError
from sievit.pipeline.plan import make_plan
from sievit.pipeline.spec import DataConfig, ModelConfig, PipelineSpec, json_schema, load_pipeline
from sievit.pipeline.stage import Config
from sievit.pipeline.validation import validate, words


def load(tmp_path: Path, text: str, *overrides: str) -> PipelineSpec:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return load_pipeline(path, STAGES, overrides)


def failure(tmp_path: Path, text: str, *overrides: str) -> SievitError:
    with pytest.raises(SievitError) as caught:
        load(tmp_path, text, *overrides)
    return caught.value


def printed(tmp_path: Path, text: str, *overrides: str) -> str:
    """The printed error, with the folder of the file taken off."""
    return failure(tmp_path, text, *overrides).text().replace(f"{tmp_path}/", "")


def told(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The messages of all mistakes."""
    error = failure(tmp_path, text, *overrides)
    return [error.message, *(e.message for e in getattr(error, "also", ()))]


# ---- Whole printed texts


def test_an_unknown_key_is_answered_as_a_compiler_answers(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE.replace("macs: 0.5", "macz: 0.5"))
        == """\
invalid pipeline: unknown key 'macz' in stages.prune.target
  --> pipeline.yaml:8:44
   |
 8 |   prune:     {importance: taylor, target: {macz: 0.5}}
   |                                            ^^^^
  help: did you mean 'macs'? valid keys: macs, params"""
    )


def test_the_gutter_fits_two_digit_lines(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE.replace("opset: 20", "opset: 99"))
        == """\
invalid pipeline: stages.export.opset must be a whole number from 17 to 23, got 99
  --> pipeline.yaml:10:22
   |
10 |   export:    {opset: 99}
   |                      ^^"""
    )


def test_a_wrong_choice_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE.replace("taylor", "tailor"))
        == """\
invalid pipeline: stages.prune.importance must be one of taylor, l1, random, got the text 'tailor'
  --> pipeline.yaml:8:27
   |
 8 |   prune:     {importance: tailor, target: {macs: 0.5}}
   |                           ^^^^^^
  help: did you mean 'taylor'?"""
    )


def test_a_contradiction_points_to_the_field_that_its_validator_names(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE.replace("macs: 0.5", "macs: 0.5, params: 0.5"))
        == """\
invalid pipeline: stages.prune.target.params: contradicts macs
  --> pipeline.yaml:8:55
   |
 8 |   prune:     {importance: taylor, target: {macs: 0.5, params: 0.5}}
   |                                                       ^^^^^^
  help: give one of the two"""
    )


def test_a_contradiction_without_a_field_points_to_the_entry(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, "stages:\n  train: {epochs: 1, steps: 2}\n")
        == """\
invalid pipeline: stages.train: give exactly one of epochs and steps
  --> pipeline.yaml:2:3
   |
 2 |   train: {epochs: 1, steps: 2}
   |   ^^^^^"""
    )


def test_an_unknown_stage_is_answered_once_though_arms_spell_it_right(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE.replace("  train: ", "  trian: "))
        == """\
invalid pipeline: 'trian' is no stage
  --> pipeline.yaml:7:3
   |
 7 |   trian:     {epochs: 20, weights: {method: group_lasso, strength: 1.0e-4}}
   |   ^^^^^
  help: did you mean 'train'? valid stages: ticket, train, prune, finetune, export, quantize, benchmark; \
to give a stage another name write 'trian: {uses: <stage>}'"""
    )


def test_an_unknown_field_of_an_arm_is_shown_in_the_arms_own_line(tmp_path: Path) -> None:
    text = PIPELINE.replace("random: {ticket: {examples: {method:", "random: {ticket: {examples: {metod:")
    assert (
        printed(tmp_path, text)
        == """\
invalid pipeline: unknown key 'metod' in arms.random.ticket.examples
  --> pipeline.yaml:15:32
   |
15 |   random: {ticket: {examples: {metod: random}, patches: {method: random}}}
   |                                ^^^^^
  help: did you mean 'method'? valid keys: method, keep"""
    )


def test_an_override_of_a_stage_that_is_not_there_is_shown_in_the_arm(tmp_path: Path) -> None:
    text = "stages:\n  train: {epochs: 1}\narms:\n  dense:\n    prune: null\n    trian: {epochs: 2}\n"
    assert (
        printed(tmp_path, text)
        == """\
invalid pipeline: arm 'dense' overrides 'prune', which is not there
  --> pipeline.yaml:5:5
   |
 5 |     prune: null
   |     ^^^^^
  help: valid names: train, data, model, seed

invalid pipeline: arm 'dense' overrides 'trian', which is not there
  --> pipeline.yaml:6:5
   |
 6 |     trian: {epochs: 2}
   |     ^^^^^
  help: did you mean 'train'? valid names: train, data, model, seed"""
    )


def test_an_arm_that_is_equal_to_main_is_refused(tmp_path: Path) -> None:
    text = "stages:\n  train: {epochs: 1}\narms:\n  same: {train: {epochs: 1}}\n"
    assert (
        printed(tmp_path, text)
        == """\
invalid pipeline: arm 'same' is equal to the main arm: it compares nothing
  --> pipeline.yaml:4:3
   |
 4 |   same: {train: {epochs: 1}}
   |   ^^^^
  help: give it a setting that differs"""
    )


def test_a_wrong_override_is_shown_in_the_option(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE, "prune.target.macz=0.4")
        == """\
invalid pipeline: unknown key 'macz' in stages.prune.target
  --> --set prune.target.macz=0.4
                         ^^^^
  help: did you mean 'macs'? valid keys: macs, params"""
    )


def test_a_wrong_value_of_an_override_is_shown_in_the_option(tmp_path: Path) -> None:
    assert (
        printed(tmp_path, PIPELINE, "train.epochs=1e3")
        == """\
invalid pipeline: stages.train.epochs must be a whole number from 1 to 100000 or null, got 1000.0
  --> --set train.epochs=1e3
                         ^^^
  help: write 1000"""
    )


def test_an_override_of_an_unknown_stage_names_the_nearest(tmp_path: Path) -> None:
    error = failure(tmp_path, PIPELINE, "prun.target.macs=0.4")
    assert error.message == "'prun' is no stage or field of this pipeline"
    assert error.hint.startswith("did you mean 'prune'? valid names: ticket,")


def test_an_override_without_a_value_is_a_usage_error(tmp_path: Path) -> None:
    error = failure(tmp_path, PIPELINE, "prune.target.macs")
    assert error.exit_code == 2
    assert (
        error.text()
        == """\
error: an override is field=value
  --> --set prune.target.macs
            ^^^^^^^^^^^^^^^^^
  help: for example --set prune.target.macs=0.4"""
    )


def test_independent_mistakes_are_told_together_and_each_once(tmp_path: Path) -> None:
    text = (
        PIPELINE.replace("image_size: 32", "image_sise: 32")
        .replace("keep: 0.8", "keep: 8")
        .replace("opset: 20", "opset: 99")
        .replace("speedup: 2.0", "speedup: fast")
    )
    assert told(tmp_path, text) == [
        "unknown key 'image_sise' in data",
        "gates.speedup must be a number above 0 or null, got the text 'fast'",
        "stages.ticket.examples.keep must be a number above 0 and at most 1, got 8",
        "stages.export.opset must be a whole number from 17 to 23, got 99",
    ]


def test_ten_mistakes_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    text = "stages: {train: {epochs: 1}}\n" + "".join(f"wrong{i}: 1\n" for i in range(15))
    messages = told(tmp_path, text)
    assert len(messages) == 11
    assert messages[-1] == "5 more mistakes are not shown"


def test_the_json_of_an_error_holds_every_mistake(tmp_path: Path) -> None:
    error = failure(tmp_path, PIPELINE.replace("macs: 0.5", "macz: 0.5").replace("opset: 20", "opset: 99"))
    document = json.loads(json.dumps(error.as_json()))
    assert document["code"] == 3
    assert document["message"] == document["diagnostics"][0]["message"]
    assert document["where"].endswith("pipeline.yaml:8:44")
    assert [d["message"].split(" ")[0] for d in document["diagnostics"]] == ["unknown", "stages.export.opset"]


def test_an_escape_code_in_a_path_does_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred.yaml"
    path.write_text("stages: {trian: {}}")
    with pytest.raises(SpecError) as caught:
        load_pipeline(path, STAGES)
    assert "\x1b" not in caught.value.text()


# ---- Root cause first, cascades not at all


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("staegs: {train: {}}", ["unknown key 'staegs'"]),
        ("train: {epochs: 1}", ["unknown key 'train'"]),
        ("name: x", ["'stages' is missing: there is nothing to run"]),
        ("stages:", ["'stages' is empty: there is nothing to run"]),
        ("stages: {}", ["'stages' is empty: there is nothing to run"]),
        ("stages: [train]", ["'stages' must be a mapping, got a list"]),
        ("stages: {train: }", ["'train:' has nothing behind it"]),
        ("stages: {train: 3}", ["'train' must be a mapping of its settings, or null, got 3"]),
        ("stages: {a: {uses: trian, epochs: 1}}", ["stages.a.uses: there is no stage 'trian'"]),
        ("stages: {a: {uses: [train]}}", ["stages.a.uses must be the name of a stage, got a list"]),
        (
            "stages: {train: {epochs: 1, needs: 3}}",
            ["stages.train.needs must be a stage of this pipeline or a list of them, got 3"],
        ),
        ("stages: {train: {epochs: 1, needs: [a, a]}}", ["stages.train.needs names 'a' twice"]),
        ("stages: {model: {uses: train, epochs: 1}}", ["'model' is a reserved word, not a stage name"]),
        ("stages: {train: {epochs: 1}}\narms: {main: {seed: 1}}", ["'main' is a reserved word, not an arm name"]),
        ("stages: {train: {epochs: 1}}\narms: {a: }", ["arm 'a' overrides nothing"]),
        ("stages: {train: {epochs: 1}}\narms: {a: [1]}", ["arm 'a' must be a mapping, got a list"]),
        ("stages: {train: {epochs: 1}}\narms: {a: {train: }}", ["'train:' has nothing behind it"]),
        (
            "stages: {train: {epochs: 1}}\narms: {a: {seed: x}}",
            ["arms.a.seed must be a whole number from 0 to 4294967295, got the text 'x'"],
        ),
        ("stages: {train: {epochs: 1}}\narms: {a: {data: {sorce: x}}}", ["unknown key 'sorce' in arms.a.data"]),
        (
            "stages: {train: {epochs: 1}}\narms: {a: {train: {uses: prune}}}",
            ["arm 'a' makes another stage of 'train', which is 'train'"],
        ),
        (
            "stages: {benchmark: {}}\narms: {a: {benchmark: null}}",
            ["'benchmark' stands once for all arms; arm 'a' cannot override it"],
        ),
        # wrong in main, so wrong in each arm that overrides the same stage: told once
        (
            "stages: {train: {steps: 1, epochs: 1}}\narms: {a: {train: {weights: {}}}}",
            ["stages.train: give exactly one of epochs and steps"],
        ),
        (
            "stages: {train: {epochs: x}}\narms: {a: {train: {pause: 1.0}}, b: {seed: 1}}",
            ["stages.train.epochs must be a whole number from 1 to 100000 or null, got the text 'x'"],
        ),
        (
            "data: {source: }\nstages: {train: {epochs: 1}}\narms: {a: {data: {workers: 1}}}",
            ["data.source must be text that is not empty, got nothing"],
        ),
    ],
)
def test_one_mistake_is_told_once(tmp_path: Path, text: str, messages: list[str]) -> None:
    assert told(tmp_path, text) == messages


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("data: {mean: [0.5, 0.5]}", "data.mean must be a list of 3 numbers, got a list of 2"),
        ("data: {std: [1, 1, 1, 1]}", "data.std must be a list of 3 numbers or null, got a list of 4"),
        ("data: {std: [1, 0, 1]}", "data.std: must be above 0 in every channel"),
        ("data: {image_size: 4096}", "data.image_size must be a whole number from 8 to 1024, got 4096"),
        ("data: {test: x}", "data.test: builtin:digits brings its own test split"),
        ("data: {in_memory: 'no'}", "data.in_memory must be true or false or null, got the text 'no'"),
        ("data: 3", "'data' must be a mapping, got 3"),
        (
            "model: {weights: a.safetensors, pretrained: true}",
            "model.weights: contradicts 'pretrained: true'",
        ),
        ("model: {args: {checkpoint_path: x.pth}}", "model.args.checkpoint_path: is set by model.weights, not here"),
        ("device: gpu", "device must be one of auto, cpu, cuda, got the text 'gpu'"),
        ("gates: {accuracy_drop: 3}", "gates.accuracy_drop must be a number from 0 to 1 or null, got 3"),
    ],
)
def test_the_sections_are_checked(tmp_path: Path, section: str, message: str) -> None:
    assert told(tmp_path, f"{section}\nstages: {{train: {{epochs: 1}}}}") == [message]


# ---- A right file


def test_the_pipeline_of_the_design_page_loads_and_its_arms_resolve(tmp_path: Path) -> None:
    spec = load(tmp_path, PIPELINE)
    assert (spec.name, spec.seeds, spec.device, spec.base) == ("digits", (0,), "auto", tmp_path)
    assert list(spec.arms) == ["main", "dense", "random"]
    assert spec.text == PIPELINE
    dense = spec.arms["dense"]
    assert [e.name for e in dense.entries] == ["ticket", "train", "finetune", "export", "benchmark"]
    assert set(dense.left_out) == {"prune", "quantize"}
    ticket = dense.entry("ticket")
    assert ticket is not None
    # deep merge: the method of main stays, keep is the arm's
    assert ticket.config_raw == {
        "examples": {"method": "el2n", "keep": 1.0},
        "patches": {"method": "attention", "keep": 1.0},
    }
    train = dense.entry("train")
    assert train is not None
    assert train.config.model_dump()["weights"] is None


def test_defaults_are_what_the_design_page_says(tmp_path: Path) -> None:
    spec = load(tmp_path, "stages: {train: {epochs: 1}}")
    assert spec.name == "pipeline"
    assert spec.data == DataConfig()
    assert (spec.data.source, spec.data.image_size, spec.data.calibration) == ("builtin:digits", 32, 0.1)
    assert spec.model == ModelConfig()
    assert spec.gates.model_dump() == {"accuracy_drop": None, "speedup": None}


def test_null_leaves_a_stage_out_and_an_arm_may_bring_it_back(tmp_path: Path) -> None:
    spec = load(tmp_path, "stages: {train: {epochs: 1}, prune: null, export: {}}\narms: {cut: {prune: {}}}")
    assert [e.name for e in spec.arms["main"].entries] == ["train", "export"]
    assert [e.name for e in spec.arms["cut"].entries] == ["train", "prune", "export"]


def test_lists_and_scalars_replace_and_mappings_merge(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        "model: {args: {depth: 6, sizes: [1, 2]}}\nstages: {train: {epochs: 1}}\n"
        "arms: {a: {model: {args: {sizes: [3], width: 2}}, seed: 5}}",
    )
    assert spec.arms["a"].model.args == {"depth": 6, "sizes": [3], "width": 2}
    assert (spec.arms["main"].seed, spec.arms["a"].seed) == (0, 5)


def test_an_entry_may_use_a_stage_under_another_name(tmp_path: Path) -> None:
    text = "stages: {train: {epochs: 1}, warm.up-2: {uses: train, steps: 9, needs: train}}"
    entry = load(tmp_path, text, "warm.up-2.steps=7").arms["main"].entry("warm.up-2")
    assert entry is not None
    assert (entry.uses, entry.needs, entry.config_raw) == ("train", ("train",), {"steps": 7})


def test_an_override_that_changes_nothing_is_fine(tmp_path: Path) -> None:
    assert load(tmp_path, PIPELINE, "seed=0").seeds == (0,)


def test_an_override_of_main_reaches_every_arm_that_does_not_override_the_field(tmp_path: Path) -> None:
    spec = load(tmp_path, PIPELINE, "ticket.examples.keep=0.3", "train.epochs=5", "model.args.depth=2", "seed=9")
    kept = {name: arm.entry("ticket").config_raw["examples"]["keep"] for name, arm in spec.arms.items()}  # type: ignore[union-attr]
    assert kept == {"main": 0.3, "dense": 1.0, "random": 0.3}
    assert {arm.entry("train").config_raw["epochs"] for arm in spec.arms.values()} == {5}  # type: ignore[union-attr]
    assert {arm.model.args["depth"] for arm in spec.arms.values()} == {2}
    assert {arm.seed for arm in spec.arms.values()} == {9}


def test_overrides_reach_arms_gates_and_whole_stages(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        PIPELINE,
        "arms.random.ticket.examples.keep=0.2",
        "gates.speedup=null",
        "quantize=null",
        "prune.target={params: 0.3}",
        "benchmark.threads=[1, 2]",
        "name=other",
    )
    assert spec.name == "other"
    assert spec.gates.speedup is None
    assert spec.arms["main"].entry("quantize") is None
    assert spec.arms["random"].entry("ticket").config_raw["examples"]["keep"] == 0.2  # type: ignore[union-attr]
    assert spec.arms["main"].entry("prune").config_raw["target"] == {"params": 0.3}  # type: ignore[union-attr]


def test_one_override_within_another_is_refused(tmp_path: Path) -> None:
    error = failure(tmp_path, PIPELINE, "prune.target={macs: 0.4}", "prune.target.macs=0.3")
    assert (error.exit_code, error.message) == (2, "the same field is set twice")


@pytest.mark.parametrize(
    "override", ["=1", ".=1", "a..b=1", "prune.=1", "prune={", "prune=[1", "prune=*x", "prune=a\nb: 1"]
)
def test_overrides_of_any_shape_are_answered_and_never_crash(tmp_path: Path, override: str) -> None:
    assert failure(tmp_path, PIPELINE, override).exit_code in (2, 3)


def test_no_mutilated_file_ends_in_a_traceback(tmp_path: Path) -> None:
    """Characters cut out, pasted in and replaced at random: either it plans, or it is refused with a place."""
    rng = random.Random(0)
    pieces = [
        "{",
        "}",
        "[",
        "]",
        ": ",
        ",",
        "- ",
        "'",
        "&a ",
        "*a",
        "!!x ",
        "null",
        "\n",
        "\t",
        "#",
        "|",
        "~",
        "needs: train",
        "é",
    ]
    refused = 0
    for _ in range(300):
        start = rng.randrange(len(PIPELINE))
        text = PIPELINE[:start] + rng.choice(["", *pieces]) + PIPELINE[start + rng.choice([0, 1, 3, 30]) :]
        try:
            make_plan(load(tmp_path, text), STAGES)
        except SpecError as error:
            refused += 1
            assert error.where.startswith(str(tmp_path))
            assert "Input should" not in error.text()
    assert 100 < refused < 300


# ---- Words for what a field takes


class Left(BaseModel):  # settings that stages share are not the engine's own class
    model_config = ConfigDict(extra="forbid", strict=True)
    method: Literal["left"] = "left"
    width: int = Field(default=1, ge=1)


class Right(BaseModel):
    model_config = Left.model_config
    method: Literal["right"] = "right"
    depth: int


class Missing(Config):
    method: str
    depth: int = Field(ge=1, description="how many blocks")


class Unions(Config):
    keep: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    sizes: list[Annotated[int, Field(ge=1)]] | None = None
    side: Left | Right | None = None
    tagged: Annotated[Left | Right, Field(discriminator="method")] = Left()
    named: dict[str, int] = Field(default={})
    word: str = Field(default="a", max_length=3)
    some: tuple[Literal["a", "b"], ...] = Field(default=("a",), min_length=1)
    shape: Left | Literal["none"] = "none"

    @model_validator(mode="after")
    def coherent(self) -> Self:
        if self.named.get("x") == 1:
            raise ValueError("named.x: must not be 1")
        return self


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("{keep: 2}", "u.keep must be a number above 0 and below 1 or auto, got 2", 8),
        ("{keep: atuo}", "u.keep must be a number above 0 and below 1 or auto, got the text 'atuo'", 8),
        ("{sizes: 3}", "u.sizes must be a list of whole numbers of at least 1 or null, got 3", 9),
        ("{sizes: [1, 0]}", "u.sizes[1] must be a whole number of at least 1, got 0", 13),
        ("{side: {method: right, depth: x}}", "u.side.depth must be a whole number, got the text 'x'", 31),
        ("{side: 3}", "u.side must be a mapping or null, got 3", 8),
        ("{tagged: {method: left, width: 0}}", "u.tagged.width must be a whole number of at least 1, got 0", 32),
        ("{named: {a: x}}", "u.named.a must be a whole number, got the text 'x'", 13),
        ("{named: {x: 1}}", "u.named.x: must not be 1", 10),
        ("{word: abcd}", "u.word must be text of at most 3 characters, got the text 'abcd'", 8),
        ("{some: []}", "u.some must be a list of a, b that is not empty, got a list of 0", 8),
        ("{some: [c]}", "u.some[0] must be one of a, b, got the text 'c'", 9),
        ("{shape: {width: 0}}", "u.shape.width must be a whole number of at least 1, got 0", 17),
        ("{shape: nine}", "u.shape must be a mapping or none, got the text 'nine'", 9),
    ],
)
def test_what_a_field_takes_is_said_in_words(text: str, message: str, column: int) -> None:
    node = parse(text, "f")
    config, faults = validate(Unions, node, path="u", key=node.span)
    assert config is None
    assert [f.error.message for f in faults] == [message]
    assert faults[0].error.where == f"f:1:{column}"


def test_a_missing_field_is_named_with_what_it_takes() -> None:
    node = parse("{method: right}", "f")
    _, faults = validate(Missing, node, path="u", key=node.span)
    assert faults[0].error.message == "'depth' is missing in u"
    assert faults[0].error.hint == "it takes a whole number of at least 1 (how many blocks)"


def test_a_misspelt_key_is_not_told_as_a_missing_one_too() -> None:
    node = parse("{method: right, detph: 3, colour: red}", "f")
    _, faults = validate(Missing, node, path="u", key=node.span)
    assert [f.error.message for f in faults] == ["unknown key 'detph' in u", "unknown key 'colour' in u"]


def test_words_cover_the_annotations_that_configs_use() -> None:
    assert words(float) == "a number"
    assert words(tuple[float, float, float] | None) == "a list of 3 numbers or null"
    assert words(tuple[Literal["cpu", "cuda"], ...]) == "a list of cpu, cuda"
    assert words(dict[str, int]) == "a mapping"


# ---- The schema, and the price


def accepts(schema: Any, value: Any, root: Any) -> bool:
    """What a JSON schema says of a value, for the words that ours uses."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].split("/")[-1]], value, root)
    if "anyOf" in schema and not any(accepts(s, value, root) for s in schema["anyOf"]):
        return False
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    kind = schema.get("type")
    if kind == "null" and value is not None:
        return False
    if kind in kinds and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, int | float):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return bool(low <= value <= high and schema.get("exclusiveMinimum", value - 1) < value)
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if isinstance(value, dict):
        other = schema.get("additionalProperties", {})
        known = schema.get("properties", {})
        return all(k in value for k in schema.get("required", ())) and all(
            accepts(known[k], v, root) if k in known else accepts(other, v, root) for k, v in value.items()
        )
    return True


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        ("", "", True),
        ("  prune:  ", "  cut: {uses: prune}\n  prune:  ", True),
        ("seed: 0", "seed: 4", True),
        ("macs: 0.5", "macz: 0.5", False),
        ("macs: 0.5", "macs: 1.5", False),
        ("opset: 20", "opset: 99", False),
        ("  prune:  ", "  cut: {uses: prine}\n  prune:  ", False),
        ("prune: null", "prune: 3", False),
        ("{examples: {method: random}", "{examples: {metod: random}", False),
        ("gates:", "gats:", False),
    ],
)
def test_the_schema_takes_what_the_loader_takes(tmp_path: Path, old: str, new: str, good: bool) -> None:
    text = PIPELINE.replace(old, new, 1) if old else PIPELINE
    schema = json_schema(STAGES)
    assert accepts(schema, parse(text, "f").plain(), schema) is good
    if good:
        assert load(tmp_path, text)
    else:
        assert failure(tmp_path, text).exit_code == 3


def test_the_schema_describes_every_field_of_every_stage() -> None:
    schema = json_schema(STAGES)
    assert list(schema["properties"]["stages"]["properties"]) == [s.name for s in STAGES]
    train = schema["properties"]["stages"]["properties"]["train"]["anyOf"][0]
    assert set(train["properties"]) == {*TRAIN.config.model_fields, "uses", "needs"}
    assert all(DataConfig.model_fields[name].description for name in DataConfig.model_fields)
    arm = schema["properties"]["arms"]["anyOf"][0]["additionalProperties"]["properties"]
    assert "benchmark" not in arm, "it stands once for all arms"
    assert "required" not in json.dumps(arm)


def test_loading_and_planning_write_nothing_and_take_milliseconds(tmp_path: Path) -> None:
    load(tmp_path, PIPELINE)
    took = []
    for _ in range(5):
        started = time.perf_counter()
        make_plan(load_pipeline(tmp_path / "pipeline.yaml", STAGES), STAGES)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.03
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline.yaml"]


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, sievit.pipeline.spec, sievit.pipeline.plan;"
        "print([m for m in ('torch', 'numpy', 'onnx', 'timm', 'rich', 'typer', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
