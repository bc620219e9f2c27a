"""Wiring: each stage reads what the rule says, and wiring that cannot work is refused where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import BENCHMARK, EXPORT, PIPELINE, STAGES

from sievit.pipeline.errors import SpecError
from sievit.pipeline.plan import Edge, Node, Plan, make_plan
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Config, Reads, Stage

CHAIN = "stages:\n  train: {epochs: 1}\n  prune: {}\n  finetune: {}\n  export: {}\n"


def plan(tmp_path: Path, text: str, *overrides: str, stages: Sequence[Stage] = STAGES) -> Plan:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return make_plan(load_pipeline(path, stages, overrides), stages)


def failure(tmp_path: Path, text: str, *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        plan(tmp_path, text, *overrides)
    assert caught.value.exit_code == 3
    return caught.value


def told(tmp_path: Path, text: str) -> list[tuple[str, str]]:
    """Message and line:column of every mistake."""
    error = failure(tmp_path, text)
    return [(e.message, ":".join(e.where.split(":")[-2:])) for e in (error, *error.also)]


def node(plan: Plan, entry: str, arm: str = "main") -> Node:
    found = plan.node(arm, entry)
    assert found is not None
    return found


def sources(plan: Plan, entry: str, arm: str = "main") -> dict[str, str]:
    """Role -> the entry of the same arm that it reads."""
    edges = node(plan, entry, arm).inputs
    assert all(edge.source is None or edge.source[0] == arm for edge in edges)
    return {edge.role: edge.source[1] if edge.source else str(edge.ref) for edge in edges}


# ---- What reads what


def test_a_stage_reads_the_nearest_earlier_one_that_writes_what_it_reads(tmp_path: Path) -> None:
    made = plan(tmp_path, PIPELINE)
    assert sources(made, "ticket") == {}
    assert sources(made, "train") == {"tickets": "ticket"}
    assert sources(made, "prune") == {"model": "train", "tickets": "ticket"}
    assert sources(made, "finetune") == {"model": "prune", "tickets": "ticket", "teacher": "train"}
    assert sources(made, "export") == {"model": "finetune"}
    assert sources(made, "quantize") == {"onnx": "export", "tickets": "ticket"}
    assert sources(made, "finetune", "dense") == {"model": "train", "tickets": "ticket", "teacher": "train"}


def test_main_comes_first_then_the_arms_then_what_stands_across_them(tmp_path: Path) -> None:
    made = plan(tmp_path, PIPELINE)
    arms = [n.arm for n in made.nodes]
    assert arms == ["main"] * 6 + ["dense"] * 4 + ["random"] * 6 + ["main"]
    assert made.nodes[-1].entry.name == "benchmark"


def test_every_node_stands_after_all_it_reads(tmp_path: Path) -> None:
    made = plan(tmp_path, PIPELINE)
    seen: set[tuple[str, str]] = set()
    for item in made.nodes:
        assert {edge.source for edge in item.inputs if edge.source} <= seen
        seen.add((item.arm, item.entry.name))


def test_the_benchmark_reads_every_file_of_every_arm(tmp_path: Path) -> None:
    edges = node(plan(tmp_path, PIPELINE), "benchmark").inputs
    assert [edge.source for edge in edges] == [
        ("main", "export"),
        ("main", "quantize"),
        ("dense", "export"),
        ("random", "export"),
        ("random", "quantize"),
    ]
    assert {edge.role for edge in edges} == {"onnx"}


def test_needs_of_the_benchmark_choose_what_it_measures(tmp_path: Path) -> None:
    made = plan(tmp_path, PIPELINE, "benchmark.needs=export")
    measured = [edge.source for edge in node(made, "benchmark").inputs]
    assert measured == [("main", "export"), ("dense", "export"), ("random", "export")]


def test_needs_choose_what_is_read_and_a_stage_may_branch(tmp_path: Path) -> None:
    made = plan(tmp_path, CHAIN + "  direct: {uses: export, needs: train}\n")
    assert sources(made, "direct") == {"model": "train"}
    assert sources(made, "export") == {"model": "finetune"}


def test_needs_for_one_input_leave_the_others_to_the_rule(tmp_path: Path) -> None:
    text = "stages: {ticket: {}, t2: {uses: ticket}, train: {epochs: 1, needs: [ticket]}, prune: {needs: train}}"
    made = plan(tmp_path, text)
    assert sources(made, "train") == {"tickets": "ticket"}
    assert sources(made, "prune") == {"model": "train", "tickets": "t2"}


def test_a_stage_may_stand_twice(tmp_path: Path) -> None:
    made = plan(tmp_path, "stages: {train: {epochs: 1}, prune: {}, again: {uses: prune}, export: {}}")
    assert sources(made, "again") == {"model": "prune"}
    assert sources(made, "export") == {"model": "again"}


def test_a_later_stage_may_be_needed_when_it_does_not_need_one_back(tmp_path: Path) -> None:
    text = "stages: {train: {epochs: 1}, export: {needs: other}, other: {uses: train, steps: 1}}"
    made = plan(tmp_path, text)
    assert [n.entry.name for n in made.nodes] == ["train", "other", "export"]


def test_an_arm_carries_its_own_seed_data_and_model(tmp_path: Path) -> None:
    text = CHAIN + "arms: {a: {seed: 7, data: {image_size: 64}, model: {name: vit}}}"
    item = node(plan(tmp_path, text), "train", "a")
    assert (item.seed, item.data.image_size, item.model.name) == (7, 64, "vit")


def test_an_arm_that_leaves_a_stage_out_reads_past_it(tmp_path: Path) -> None:
    made = plan(tmp_path, CHAIN + "arms: {a: {prune: null}}")
    assert sources(made, "finetune", "a") == {"model": "train"}


@pytest.mark.parametrize("text", ["train@7", "train@latest", "prune@3fa9", "timm:regnety_160"])
def test_a_reference_to_the_store_or_to_timm_is_left_alone(tmp_path: Path, text: str) -> None:
    made = plan(tmp_path, CHAIN.replace("finetune: {}", f"finetune: {{distill: {{teacher: '{text}'}}}}"))
    assert Edge("teacher", None, text) in node(made, "finetune").inputs


def test_a_reference_to_an_entry_is_an_edge_even_to_one_of_another_name(tmp_path: Path) -> None:
    text = "stages: {big: {uses: train, epochs: 1}, train: {epochs: 1}, finetune: {distill: {teacher: big}}}"
    assert sources(plan(tmp_path, text), "finetune") == {"model": "train", "teacher": "big"}


# ---- What cannot work (Y20)


def test_a_stage_whose_input_nobody_produces_is_refused(tmp_path: Path) -> None:
    error = failure(tmp_path, "stages:\n  export: {}\n  train: {epochs: 1}\n")
    assert (
        error.text().replace(f"{tmp_path}/", "")
        == """\
invalid pipeline: stages.export reads model, and no earlier stage writes it
  --> pipeline.yaml:2:3
   |
 2 |   export: {}
   |   ^^^^^^
  help: put one of these before it: train, prune, finetune"""
    )


def test_a_missing_input_that_was_left_out_names_where(tmp_path: Path) -> None:
    error = failure(tmp_path, CHAIN + "arms:\n  a: {train: null, prune: null, finetune: null}\n")
    assert error.message == "arms.a.export reads model, and no earlier stage of arm 'a' writes it"
    assert error.hint == "'train' writes it, and is left out (line 7)"


def test_a_dangling_need_names_the_nearest(tmp_path: Path) -> None:
    error = failure(tmp_path, CHAIN.replace("export: {}", "export: {needs: [prun]}"))
    assert (
        error.text().replace(f"{tmp_path}/", "")
        == """\
invalid pipeline: stages.export.needs: there is no stage 'prun' in this pipeline
  --> pipeline.yaml:5:20
   |
 5 |   export: {needs: [prun]}
   |                    ^^^^
  help: did you mean 'prune'? valid stages: train, prune, finetune"""
    )


def test_a_need_that_an_arm_leaves_out_is_refused_only_when_it_was_given(tmp_path: Path) -> None:
    arm = "arms:\n  a: {prune: null}\n"
    error = failure(tmp_path, CHAIN.replace("finetune: {}", "finetune: {needs: prune}") + arm)
    assert (
        error.text().replace(f"{tmp_path}/", "")
        == """\
invalid pipeline: arms.a.finetune.needs: arm 'a' leaves out 'prune' (line 7)
  --> pipeline.yaml:4:21
   |
 4 |   finetune: {needs: prune}
   |                     ^^^^^
  help: override arms.a.finetune.needs in that arm too"""
    )
    assert plan(tmp_path, CHAIN + arm)


def test_the_hint_for_a_left_out_need_works(tmp_path: Path) -> None:
    text = CHAIN.replace("finetune: {}", "finetune: {needs: prune}")
    made = plan(tmp_path, text + "arms:\n  a: {prune: null, finetune: {needs: train}}\n")
    assert sources(made, "finetune", "a") == {"model": "train"}


def test_a_need_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    text = "stages: {ticket: {}, train: {epochs: 1}, export: {needs: [train, ticket]}}"
    assert told(tmp_path, text) == [("stages.export.needs: 'ticket' writes tickets, which this does not read", "1:66")]


def test_two_needs_for_one_input_are_refused(tmp_path: Path) -> None:
    text = CHAIN.replace("export: {}", "export: {needs: [train, prune]}")
    assert told(tmp_path, text) == [("stages.export.needs names two that write model: 'train' and 'prune'", "5:27")]


def test_needs_and_references_to_the_benchmark_are_refused(tmp_path: Path) -> None:
    text = CHAIN + "  benchmark: {}\n"
    assert told(tmp_path, text.replace("finetune: {}", "finetune: {distill: {teacher: benchmark}}")) == [
        ("stages.finetune.distill.teacher: 'benchmark' stands once for all arms and runs after them", "4:33")
    ]
    assert told(tmp_path, text.replace("export: {}", "export: {needs: benchmark}")) == [
        ("stages.export.needs: 'benchmark' stands once for all arms and runs after them", "5:19")
    ]


@pytest.mark.parametrize(
    ("old", "new", "message", "where"),
    [
        ("finetune: {}", "finetune: {needs: finetune}", "'finetune' reads itself", "4:21"),
        ("finetune: {}", "finetune: {distill: {teacher: finetune}}", "'finetune' reads itself", "4:33"),
        (
            "finetune: {}",
            "finetune: {distill: {teacher: later}}",
            "these stages wait for each other: finetune -> later -> finetune",
            "4:33",
        ),
        (
            "prune: {}",
            "prune: {needs: later}",
            "these stages wait for each other: prune -> finetune -> later -> prune",
            "3:18",
        ),
    ],
)
def test_a_cycle_is_refused_naming_the_way_round(tmp_path: Path, old: str, new: str, message: str, where: str) -> None:
    text = CHAIN + "  later: {uses: finetune}\narms: {a: {seed: 1}, b: {seed: 2}}\n"
    assert told(tmp_path, text.replace(old, new, 1)) == [(message, where)], "once, though three arms share it"


def test_a_reference_that_names_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    error = failure(tmp_path, CHAIN.replace("finetune: {}", "finetune: {distill: {teacher: trian}}"))
    assert (
        error.text().replace(f"{tmp_path}/", "")
        == """\
invalid pipeline: stages.finetune.distill.teacher: 'trian' is no stage of this pipeline
  --> pipeline.yaml:4:33
   |
 4 |   finetune: {distill: {teacher: trian}}
   |                                 ^^^^^
  help: did you mean 'train'? valid stages: train, prune; \
or one of another arm such as dense/train, an artifact such as train@latest, or timm:<model>"""
    )


def test_a_stage_of_another_arm_is_read_under_the_same_seed_and_made_before(tmp_path: Path) -> None:
    text = CHAIN.replace("finetune: {}", "finetune: {distill: {teacher: dense/train}}")
    text += "arms: {dense: {train: {epochs: 2}, finetune: {distill: {teacher: train}}}}\nseeds: [3, 4]\n"
    made = plan(tmp_path, text)
    order = [(node.arm, node.entry.name) for node in made.nodes]
    for seed in ("", "@seed4"):
        taught = made.node(f"main{seed}", "finetune")
        assert taught is not None
        assert {edge.role: edge.source for edge in taught.inputs}["teacher"] == (f"dense{seed}", "train")
        assert order.index((f"dense{seed}", "train")) < order.index((f"main{seed}", "finetune"))
    assert [entry for arm, entry in order if arm == "main"] == ["train", "prune", "finetune", "export"], (
        "else as in the file"
    )


@pytest.mark.parametrize(
    ("teacher", "arms", "message"),
    [
        ("dence/train", "{dense: {train: {epochs: 2}}}", "there is no arm 'dence'"),
        ("dense/trian", "{dense: {train: {epochs: 2}}}", "'dense/trian' is no stage of this pipeline"),
        ("dense/prune", "{dense: {prune: null, finetune: null}}", "arm 'dense' leaves out 'prune' (line 6)"),
    ],
)
def test_a_stage_of_another_arm_that_is_not_there_is_refused(
    tmp_path: Path, teacher: str, arms: str, message: str
) -> None:
    text = CHAIN.replace("finetune: {}", f"finetune: {{distill: {{teacher: {teacher}}}}}") + f"arms: {arms}\n"
    assert (f"stages.finetune.distill.teacher: {message}", "4:33") in told(tmp_path, text)


def test_arms_that_wait_for_each_other_are_refused_naming_the_way_round(tmp_path: Path) -> None:
    text = CHAIN.replace("finetune: {}", "finetune: {distill: {teacher: a/finetune}}")
    text += "arms: {a: {finetune: {distill: {teacher: main/finetune}}}}\n"
    ((message, where),) = told(tmp_path, text)
    assert message == "these stages wait for each other: main/finetune -> a/finetune -> main/finetune"
    assert where in ("4:33", "5:33")


def test_a_reference_to_an_artifact_of_no_stage_is_refused(tmp_path: Path) -> None:
    text = CHAIN.replace("finetune: {}", "finetune: {distill: {teacher: trian@7}}")
    assert told(tmp_path, text) == [("stages.finetune.distill.teacher: there is no stage 'trian'", "4:33")]


def test_a_reference_that_is_left_at_its_default_points_to_the_entry(tmp_path: Path) -> None:
    text = "stages:\n  big: {uses: train, epochs: 1}\n  finetune: {distill: {}}\n"
    assert told(tmp_path, text) == [("stages.finetune: 'train' is no stage of this pipeline", "3:3")]


def test_a_reference_to_what_an_arm_leaves_out_points_to_the_reference(tmp_path: Path) -> None:
    text = CHAIN.replace("finetune: {}", "finetune: {distill: {teacher: prune}}") + "arms: {a: {prune: null}}\n"
    message = "arms.a.finetune.distill.teacher: arm 'a' leaves out 'prune' (line 6)"
    assert told(tmp_path, text) == [(message, "4:33")]


def test_a_benchmark_without_a_file_to_measure_is_refused(tmp_path: Path) -> None:
    text = "stages: {train: {epochs: 1}, benchmark: {}}"
    assert told(tmp_path, text) == [("stages.benchmark reads onnx, and no stage writes it", "1:30")]


def test_gates_without_a_dense_arm_or_a_benchmark_are_refused(tmp_path: Path) -> None:
    assert told(tmp_path, CHAIN + "gates: {speedup: 2}\n") == [
        ("gates need a benchmark, and 'stages:' has none", "6:1"),
        ("gates compare with the arm 'dense', and there is none", "6:1"),
    ]
    assert plan(tmp_path, CHAIN + "gates: {speedup: null}\n"), "a gate that is off asks for nothing"


def test_a_fault_of_the_command_line_is_shown_there(tmp_path: Path) -> None:
    error = failure(tmp_path, PIPELINE, "finetune.distill.teacher=tain")
    assert error.where == "--set finetune.distill.teacher=tain"
    assert error.excerpt == " " * len("  --> --set finetune.distill.teacher=") + "^^^^"


def test_the_engine_wires_stages_it_has_never_heard_of(tmp_path: Path) -> None:
    """The rule is about what is read and written; no stage is known by name."""

    class Empty(Config):
        pass

    odd = Stage("odd", 1, Empty, lambda ctx: None, (Reads("left", "model"), Reads("right", "onnx")), "model", "")
    source = Stage("source", 1, Empty, lambda ctx: None, (), "model", "")
    made = plan(tmp_path, "stages: {source: {}, export: {}, odd: {}}", stages=(odd, source, EXPORT, BENCHMARK))
    assert sources(made, "odd") == {"left": "source", "right": "export"}
