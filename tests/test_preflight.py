"""What a user sees for settings that are refused before anything runs, as whole printed texts; and that nothing was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from tiny_vision import image_folder

from sievit.pipeline.errors import SievitError
from sievit.pipeline.forecast import forecast
from sievit.pipeline.plan import Plan, make_plan
from sievit.pipeline.preflight import check_settings
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run, run_stage
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Preflight, Stage
from sievit.pipeline.store import Store
from sievit.stages import checkup
from sievit.stages.__main__ import STAGES
from sievit.stages.deploy import sessions
from sievit.stages.methods import InvalidInput


class Project:
    """A pipeline file, and what running it prints."""

    def __init__(self, folder: Path, text: str, stages: Sequence[Stage] = STAGES) -> None:
        self.folder, self.stages = folder, stages
        (folder / "pipeline.yaml").write_text(text)
        self.store = Store(folder / "artifacts")

    def plan(self, *overrides: str) -> Plan:
        plan = make_plan(load_pipeline(self.folder / "pipeline.yaml", self.stages, overrides), self.stages)
        check_settings(plan, (InvalidInput,))
        return plan

    def run(self, *overrides: str, alone: str = "", force: bool = False, **options: Any) -> None:
        manner = Manner(Silent(), (InvalidInput,), force)
        plan = self.plan(*overrides)
        if alone:
            node = plan.node("main", alone)
            assert node is not None
            run_stage(plan, node, self.store, manner, **options)
        else:
            run(plan, self.store, manner, **options)

    def refused(self, *overrides: str, **options: Any) -> str:
        """What a run prints, the folder of the file taken off."""
        return self._refused(self.run, *overrides, **options)

    def unplanned(self, *overrides: str) -> str:
        """What a plan already prints."""
        return self._refused(self.plan, *overrides)

    def _refused(self, command: Callable[..., object], *overrides: str, **options: Any) -> str:
        with pytest.raises(SievitError) as caught:
            command(*overrides, **options)
        assert caught.value.exit_code == 3
        return caught.value.text().replace(f"{self.folder}/", "")


# ---- the seam, on stages that need no torch


def with_preflight(name: str, preflight: Callable[[Preflight], None]) -> tuple[Stage, ...]:
    return tuple(replace(s, preflight=preflight) if s.name == name else s for s in fakes.STAGES)


def no_opset_18(seen: Preflight) -> None:
    if seen.config.opset == 18:
        raise InvalidInput("18 does not go", "take 20", field=seen.at("opset"))


def test_nothing_is_written_when_the_last_stage_refuses(tmp_path: Path) -> None:
    project = Project(tmp_path, fakes.PIPELINE.replace("opset: 20", "opset: 18"), with_preflight("export", no_opset_18))
    assert (
        project.refused()
        == """\
invalid pipeline: 18 does not go
  --> pipeline.yaml:10:22
   |
10 |   export:    {opset: 18}
   |                      ^^
  help: take 20"""
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]


def test_a_refusal_of_an_override_is_shown_in_the_option(tmp_path: Path) -> None:
    project = Project(tmp_path, fakes.PIPELINE, with_preflight("export", no_opset_18))
    assert (
        project.refused("export.opset=18")
        == """\
invalid pipeline: 18 does not go
  --> --set export.opset=18
                         ^^
  help: take 20"""
    )


def test_a_refusal_in_an_arm_is_shown_where_the_arm_says_it(tmp_path: Path) -> None:
    text = fakes.PIPELINE.replace("gates:", "  old: {export: {opset: 18}}\ngates:")
    project = Project(tmp_path, text, with_preflight("export", no_opset_18))
    assert (
        project.refused()
        == """\
invalid pipeline: 18 does not go (arm 'old')
  --> pipeline.yaml:16:25
   |
16 |   old: {export: {opset: 18}}
   |                         ^^
  help: take 20"""
    )
    project.run(arms=("random",))  # the mistake of an arm that is not asked for is not this run's


def test_every_stage_is_asked_before_the_first_one_runs_and_cached_ones_are_not(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    stages = tuple(replace(s, preflight=lambda seen: asked.append((seen.arm, seen.entry))) for s in fakes.STAGES)
    project = Project(tmp_path, fakes.PIPELINE, stages)
    project.run()
    assert {"ticket", "train", "prune", "finetune", "export", "quantize", "benchmark"} == {
        entry for arm, entry in asked if arm == "main"
    }
    asked.clear()
    project.run()
    assert asked == []
    project.run(alone="export")
    assert asked == []
    project.run(alone="export", force=True)
    assert asked == [("main", "export")]


def test_a_stage_sees_the_stages_that_it_reads_and_the_artifacts_that_it_is_given(tmp_path: Path) -> None:
    seen: list[Preflight] = []
    project = Project(tmp_path, fakes.PIPELINE, with_preflight("finetune", seen.append))
    project.run()
    main = seen[0]
    assert {role: other.entry for role, other in main.reads.items()} == {
        "model": "prune",
        "tickets": "ticket",
        "teacher": "train",
    }
    assert main.reads["model"].reads["model"].config.epochs == 20
    assert not main.inputs
    seen.clear()
    project.run("finetune.epochs=3", alone="finetune", inputs_override={"model": "train@1"})
    assert not seen[0].reads
    assert seen[0].inputs["model"].ref == "train@1"
    seen.clear()
    project.run("finetune.distill.teacher=train@1", "finetune.epochs=5")
    assert seen[0].inputs["teacher"].ref == "train@1"
    assert set(seen[0].reads) == {"model", "tickets"}


# ---- networks that cannot be built

VIT = """\
data:  {source: "builtin:digits", image_size: 32}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  ticket: {patches: {keep: 0.5}}
  train: {epochs: 1}
  finetune: {epochs: 1}
"""


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("deit_tiny", "deit_tiney")).refused()
        == """\
invalid pipeline: model.name: Unknown model (deit_tiney_patch16_224)
  --> pipeline.yaml:2:15
   |
 2 | model: {name: deit_tiney_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
   |               ^^^^^^^^^^^^^^^^^^^^^^
  help: did you mean deit_tiny_patch16_224, vit_tiny_patch16_224, deit_base_patch16_224?"""
    )


def test_trained_weights_that_timm_does_not_have_are_refused(tmp_path: Path) -> None:
    text = VIT.replace("deit_tiny_patch16_224, args", "lvvit_t, pretrained: true, args")
    told = Project(tmp_path, text).refused("model.args={}", "data.image_size=224")
    assert told.startswith("invalid pipeline: model.pretrained: timm has no trained weights of lvvit_t\n")
    assert "pipeline.yaml:2:36" in told and told.endswith("name a file of your own: model.weights")


def test_an_argument_that_timm_does_not_know_is_named(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT).refused("model.args.depht=3")
        == """\
invalid pipeline: model.args: deit_tiny_patch16_224 does not take 'depht'
  --> --set model.args.depht=3
                             ^
  help: they go to the model's class in timm as keyword arguments"""
    )


def test_a_width_that_heads_cannot_share_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("embed_dim: 48", "embed_dim: 50")).refused()
        == """\
invalid pipeline: model.args: embed_dim 50 is no multiple of num_heads 3
  --> pipeline.yaml:2:71
   |
 2 | model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 50, depth: 3, num_heads: 3}}
   |                                                                       ^^
  help: every head takes an equal share of the width"""
    )


def test_an_image_that_patches_do_not_cover_is_refused_also_with_the_models_own_patch_size(tmp_path: Path) -> None:
    text = VIT.replace("image_size: 32", "image_size: 40").replace("patch_size: 8, ", "")
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: data.image_size 40 is no multiple of patch_size 16
  --> pipeline.yaml:1:47
   |
 1 | data:  {source: "builtin:digits", image_size: 40}
   |                                               ^^
  help: patches must cover the image exactly: 32 does"""
    )


def test_a_family_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    from sievit.stages.vision.families import WORKING

    text = VIT.replace(
        "deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}", "resnet18"
    )
    assert (
        Project(tmp_path, text).refused()
        == f"""\
invalid pipeline: resnet18 is of no family that is known here
  --> pipeline.yaml:2:15
   |
 2 | model: {{name: resnet18}}
   |               ^^^^^^^^
  help: {WORKING}"""
    )


def test_pit_is_refused_with_the_reason(tmp_path: Path) -> None:
    from sievit.stages.vision.families import REASONS, WORKING

    text = VIT.replace(
        "deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}", "pit_s_224"
    )
    assert (
        Project(tmp_path, text).refused()
        == f"""\
invalid pipeline: pit_s_224 cannot be used: {REASONS["pit"]}
  --> pipeline.yaml:2:15
   |
 2 | model: {{name: pit_s_224}}
   |               ^^^^^^^^^
  help: {WORKING}"""
    )


def test_token_labels_for_a_network_without_a_head_for_patches_are_refused(tmp_path: Path) -> None:
    text = VIT.replace("train: {", "train: {token_labels: {source: timm:resnet18}, ")
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: token_labels: deit_tiny_patch16_224 has no head that answers for its patch tokens
  --> pipeline.yaml:5:11
   |
 5 |   train: {token_labels: {source: timm:resnet18}, epochs: 1}
   |           ^^^^^^^^^^^^
  help: leave token_labels out, or use lvvit_t, lvvit_s or lvvit_m"""
    )


def test_a_model_of_an_arm_is_refused_in_the_arm(tmp_path: Path) -> None:
    text = VIT + "arms:\n  wide: {model: {args: {embed_dim: 50}}}\n"
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: model.args: embed_dim 50 is no multiple of num_heads 3 (arm 'wide')
  --> pipeline.yaml:8:36
   |
 8 |   wide: {model: {args: {embed_dim: 50}}}
   |                                    ^^
  help: every head takes an equal share of the width"""
    )


def test_a_proxy_that_cannot_be_built_is_refused_in_its_own_block(tmp_path: Path) -> None:
    from sievit.stages.vision.families import WORKING

    text = VIT.replace("{patches: {keep: 0.5}}", "{patches: {keep: 0.5}, proxy: {model: {name: resnet18}}}")
    assert (
        Project(tmp_path, text).refused()
        == f"""\
invalid pipeline: resnet18 is of no family that is known here
  --> pipeline.yaml:4:56
   |
 4 |   ticket: {{patches: {{keep: 0.5}}, proxy: {{model: {{name: resnet18}}}}}}
   |                                                        ^^^^^^^^
  help: {WORKING}"""
    )


def test_a_teacher_that_timm_does_not_have_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("finetune: {", 'finetune: {distill: {teacher: "timm:regnety_161"}, ')).refused()
        == """\
invalid pipeline: timm has no trained weights of 'regnety_161'
  --> pipeline.yaml:6:33
   |
 6 |   finetune: {distill: {teacher: "timm:regnety_161"}, epochs: 1}
   |                                 ^^^^^^^^^^^^^^^^^^
  help: did you mean regnety_160, regnety_016, regnety_120?"""
    )


@pytest.mark.parametrize("setting", ["benchmark.providers=[cpu, cuda]", "quantize.provider=cuda"])
def test_a_provider_that_is_installed_and_does_not_start_is_refused_with_its_reason(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def no_libraries(command: dict[str, Any]) -> dict[str, Any]:
        asked.append(command)
        raise InvalidInput("provider cuda did not start (not found: libcudnn.so.9)", "check its libraries")

    monkeypatch.setattr(checkup, "ask", no_libraries)
    monkeypatch.setattr(sessions, "require_serving", lambda *_: None)
    checkup._refusal.cache_clear()
    told = Project(tmp_path, VIT + "  export: {}\n  quantize: {schemes: [static]}\n  benchmark: {}\n").refused(setting)
    assert told.startswith("invalid pipeline: provider cuda did not start (not found: libcudnn.so.9)\n")
    assert f"\n  --> --set {setting}\n" in told and told.endswith("help: check its libraries")
    assert asked == [{"do": "provider", "name": "cuda"}], "once for all stages, and never for the CPU"
    checkup._refusal.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    project = Project(tmp_path, VIT)
    told = project.refused("device=cuda")
    assert told.startswith(
        "invalid pipeline: device is cuda, and torch sees no usable GPU here\n  --> --set device=cuda\n"
    )
    assert told.endswith("or set device: cpu") and told.count("invalid pipeline") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", [stage for stage in STAGES if "device" in stage.uses and "host" not in stage.uses])
def test_every_stage_that_computes_on_a_device_looks_for_it_first(stage: Stage) -> None:
    """Stages that judge files take providers, which are looked for in another way."""
    seen = Preflight(
        config=None, data=None, model=None, seed=0, arm="main", entry=stage.name, base=Path(), device="cuda"
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="torch sees no usable GPU here") as caught:
        stage.preflight(seen)
    assert caught.value.field == "device"


def test_a_provider_that_is_not_installed_is_refused_before_training_begins(tmp_path: Path) -> None:
    import onnxruntime

    name = next(
        n for n in ("tensorrt", "openvino") if not any(n in x.lower() for x in onnxruntime.get_available_providers())
    )
    told = Project(tmp_path, VIT + "  export: {}\n  benchmark: {}\n").refused(f"benchmark.providers=[cpu, {name}]")
    assert told.startswith(f"invalid pipeline: provider {name} is not in the installed onnxruntime")
    assert f"\n  --> --set benchmark.providers=[cpu, {name}]\n" in told
    assert "\n  help: pip uninstall onnxruntime" in told


@pytest.mark.parametrize(("setting", "value"), [("benchmark.threads", "[1, 1024]"), ("quantize.threads", "1024")])
def test_more_threads_than_cores_are_refused_before_training_begins(tmp_path: Path, setting: str, value: str) -> None:
    stages = "  export: {}\n  quantize: {}\n  benchmark: {}\n"
    told = Project(tmp_path, VIT + stages).refused(f"{setting}={value}")
    assert told.startswith("invalid pipeline: 1024 threads were asked for, this process may use ")
    assert f"\n  --> --set {setting}=" in told and "  help: ask for " in told


# ---- blocks that the network does not have


def test_token_reduction_beyond_the_last_block_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("finetune: {", "finetune: {tokens: {blocks: [1, 3], keep: 0.5}, ")).refused()
        == """\
invalid pipeline: tokens.blocks: [1, 3] for a network of 3 blocks
  --> pipeline.yaml:6:23
   |
 6 |   finetune: {tokens: {blocks: [1, 3], keep: 0.5}, epochs: 1}
   |                       ^^^^^^
  help: use different numbers from 0 to 2"""
    )


def test_tokens_drawn_by_lot_are_refused_before_an_export_and_not_without_one(tmp_path: Path) -> None:
    text = """data:  {source: "builtin:digits", image_size: 32}
model: {name: vit_tiny_patch16_224, args: {patch_size: 8}}
stages:
  train: {epochs: 1, tokens: {blocks: [1], keep: 0.5, method: random}}
  export: {}
"""
    project = Project(tmp_path, text)
    assert (
        project.unplanned()
        == """\
invalid pipeline: train.tokens.method: random is a control: a file that draws lots answers differently each time
  --> pipeline.yaml:4:63
   |
 4 |   train: {epochs: 1, tokens: {blocks: [1], keep: 0.5, method: random}}
   |                                                               ^^^^^^
  help: use attention or tome, finish on all patches (finetune), or leave export out: export: null"""
    )
    project.plan("export=null")


def test_attention_connections_need_a_class_token(tmp_path: Path) -> None:
    text = """data:  {source: "builtin:digits", image_size: 32}
model: {name: vit_tiny_patch16_224, args: {patch_size: 8, class_token: false, global_pool: avg}}
stages:
  train: {epochs: 1, attention: {keep: 0.5, blocks: [1]}}
"""
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: attention: vit_tiny_patch16_224 has no prefix token, to which every patch token stays connected
  --> pipeline.yaml:4:22
   |
 4 |   train: {epochs: 1, attention: {keep: 0.5, blocks: [1]}}
   |                      ^^^^^^^^^
  help: leave attention out, or use a model with a class token"""
    )


def test_swaps_by_the_attention_of_a_class_token_need_one(tmp_path: Path) -> None:
    text = """data:  {source: "builtin:digits", image_size: 32}
model: {name: vit_tiny_patch16_224, args: {patch_size: 8, class_token: false, global_pool: avg}}
stages:
  train: {epochs: 4, examples: {policy: swap, mode: paper, every: 1, until: 2}}
"""
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: examples.mode: paper sorts by the attention of the class token, and vit_tiny_patch16_224 has none
  --> pipeline.yaml:4:53
   |
 4 |   train: {epochs: 4, examples: {policy: swap, mode: paper, every: 1, until: 2}}
   |                                                     ^^^^^
  help: use mode: corrected"""
    )


def test_a_selector_that_drops_beyond_the_last_block_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT).refused("ticket.selector.blocks=[2, 7]")
        == """\
invalid pipeline: selector.blocks [2, 7] do not fit a network of 3 blocks
  --> --set ticket.selector.blocks=[2, 7]
                            ^^^^^^
  help: use different numbers from 0 to 2"""
    )


# ---- images that are not there

DATA = VIT.replace('"builtin:digits"', "images")


def forecast_of(project: Project, *overrides: str) -> str:
    """What `sievit plan` prints for a mistake that no look at the settings alone can see."""
    return project._refused(lambda *given: forecast(project.plan(*given), project.store), *overrides)


def test_a_missing_folder_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    assert (
        forecast_of(Project(tmp_path, DATA))
        == """\
invalid pipeline: data.source: there is no 'images'
  --> pipeline.yaml:1:17
   |
 1 | data:  {source: images, image_size: 32}
   |                 ^^^^^^
  help: did you mean 'image'?"""
    )


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"1")
    assert (
        forecast_of(Project(tmp_path, DATA))
        == """\
invalid pipeline: data.source: 'images' holds images, but no folders
  --> pipeline.yaml:1:17
   |
 1 | data:  {source: images, image_size: 32}
   |                 ^^^^^^
  help: it needs a folder of images for each class"""
    )


def test_a_data_set_that_torchvision_does_not_have_is_refused(tmp_path: Path) -> None:
    told = forecast_of(Project(tmp_path, VIT), "data.source=torch/cifr10")
    assert told.startswith(
        """\
invalid pipeline: data.source: there is no 'torch/cifr10'
  --> --set data.source=torch/cifr10
                        ^^^^^^^^^^^^
  help: did you mean 'torch/cifar10'? valid names: """
    )


def test_a_data_set_of_torchvision_without_a_root_is_refused(tmp_path: Path) -> None:
    assert (
        forecast_of(Project(tmp_path, DATA.replace("images", "torch/cifar10")))
        == """\
invalid pipeline: data.source: torch/cifar10 needs a data.root
  --> pipeline.yaml:1:17
   |
 1 | data:  {source: torch/cifar10, image_size: 32}
   |                 ^^^^^^^^^^^^^
  help: set data.root to the folder that torchvision downloaded it to"""
    )


def test_an_unknown_builtin_of_an_arm_is_refused_in_the_arm(tmp_path: Path) -> None:
    text = VIT + 'arms:\n  other: {data: {source: "builtin:digit"}}\n'
    assert forecast_of(Project(tmp_path, text)).startswith(
        """\
invalid pipeline: data.source: there is no 'builtin:digit' (arm 'other')
  --> pipeline.yaml:8:26
   |
 8 |   other: {data: {source: "builtin:digit"}}
   |                          ^^^^^^^^^^^^^^^
  help: did you mean 'builtin:digits'? valid names: """
    )


def test_a_folder_of_one_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", per_class=2, classes=("ant",))
    assert (
        Project(tmp_path, DATA).refused()
        == """\
invalid pipeline: data: images has 1 class
  --> pipeline.yaml:1:17
   |
 1 | data:  {source: images, image_size: 32}
   |                 ^^^^^^
  help: classification needs a folder for each of two classes or more"""
    )
    assert not list((tmp_path / "artifacts").glob("[a-z]*"))


def test_a_data_set_that_was_not_downloaded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    text = DATA.replace("images", "torch/cifar10, root: .")
    assert (
        Project(tmp_path, text).refused()
        == f"""\
invalid pipeline: data.root: {tmp_path} does not hold torch/cifar10 (train: Dataset not found or corrupted)
  --> pipeline.yaml:1:38
   |
 1 | data:  {{source: torch/cifar10, root: ., image_size: 32}}
   |                                      ^
  help: set data.root to the folder that torchvision downloaded it to"""
    )


# ---- contradictions, which a plan already refuses


def test_cutmix_on_patch_tickets_is_refused_across_the_two_stages(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("train: {", "train: {cutmix: 1.0, ")).unplanned()
        == """\
invalid pipeline: stages.train.cutmix: cached patch tickets know one image, cutmix shows two
  --> pipeline.yaml:5:19
   |
 5 |   train: {cutmix: 1.0, epochs: 1}
   |                   ^^^
  help: set cutmix: 0, patches.view: online, or patches.keep: 1.0; mixup goes with all"""
    )


@pytest.mark.parametrize("patches", ["{keep: 0.5, view: online}", "{keep: 0.5, method: random}", "{keep: 1.0}"])
def test_cutmix_goes_with_tickets_of_the_view_and_with_whole_images(patches: str, tmp_path: Path) -> None:
    text = VIT.replace("{keep: 0.5}", patches).replace("train: {", "train: {cutmix: 1.0, ")
    Project(tmp_path, text).plan()


@pytest.mark.parametrize(
    ("patches", "selector", "message"),
    [
        ("{keep: 0.7}", "{keep_per_stage: 0.9}", "0.7 is overall, selector.keep_per_stage 0.9 of each stage"),
        ("{method: inverse}", "{}", "patches.method: inverse is named, and nothing says how many patches are kept"),
        ("{keep: 0.7, view: online, method: random_fixed}", "{}", "random_fixed draws once for each image"),
        ("{keep: 0.7}", "{mode: paper, adapt_epochs: 2.0}", "mode: paper does not adapt the selector"),
        ("{keep: 0.7, method: random, view: online}", "{}", "patches.view has no effect: patches.method is random"),
    ],
)
def test_ticket_settings_that_contradict_each_other_are_refused(
    patches: str, selector: str, message: str, tmp_path: Path
) -> None:
    ticket = f"{{patches: {patches}, selector: {selector}}}" if selector != "{}" else f"{{patches: {patches}}}"
    assert message in Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", ticket)).unplanned()


def test_a_keep_of_each_stage_counts_for_the_controls_too(tmp_path: Path) -> None:
    Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", "{selector: {keep_per_stage: 0.9}}")).plan()
    ticket = "{patches: {method: random}, selector: {keep_per_stage: 0.9}}"
    Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", ticket)).plan()


def test_a_contradiction_that_an_arm_brings_is_refused_for_that_arm(tmp_path: Path) -> None:
    text = VIT.replace("{patches: {keep: 0.5}}", "{}").replace("train: {", "train: {cutmix: 1.0, ")
    Project(tmp_path, text).plan()
    assert (
        Project(tmp_path, text + "arms:\n  fewer: {ticket: {patches: {keep: 0.5}}}\n").unplanned()
        == """\
invalid pipeline: stages.train.cutmix: cached patch tickets know one image, cutmix shows two (arm 'fewer')
  --> pipeline.yaml:5:19
   |
 5 |   train: {cutmix: 1.0, epochs: 1}
   |                   ^^^
  help: set cutmix: 0, patches.view: online, or patches.keep: 1.0; mixup goes with all"""
    )


def test_epochs_to_keep_that_never_come_are_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT).unplanned("train.keep_epochs=[1, 4]")
        == """\
invalid pipeline: stages.train.keep_epochs: names epoch 4, and training ends after 1
  --> --set train.keep_epochs=[1, 4]
                  ^^^^^^^^^^^
  help: name epochs from 1 to the last"""
    )


def test_a_learning_rate_that_would_rise_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("train: {", "train: {min_lr: 0.01, ")).unplanned()
        == """\
invalid pipeline: stages.train.min_lr: min_lr 0.01 is above lr 0.001, the peak
  --> pipeline.yaml:5:11
   |
 5 |   train: {min_lr: 0.01, epochs: 1}
   |           ^^^^^^
  help: lower it or raise lr"""
    )
    assert (
        Project(tmp_path, VIT.replace("train: {", "train: {lr: 1.0e-6, ")).unplanned()
        == """\
invalid pipeline: stages.train.lr: min_lr 1e-05 is above lr 1e-06, the peak
  --> pipeline.yaml:5:11
   |
 5 |   train: {lr: 1.0e-6, epochs: 1}
   |           ^^
  help: lower it or raise lr"""
    )
    assert (
        Project(tmp_path, VIT).unplanned("ticket.selector.lr=1e-6")
        == """\
invalid pipeline: stages.ticket.selector.lr: 1e-06 is below proxy.min_lr 1e-05, where it ends
  --> --set ticket.selector.lr=1e-6
                            ^^
  help: lower that"""
    )


def test_passing_over_and_keeping_more_than_there_is_is_refused(tmp_path: Path) -> None:
    examples = "{examples: {keep: 0.8, skip_hardest: 0.3}, patches: {keep: 0.5}}"
    assert (
        Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", examples)).unplanned()
        == """\
invalid pipeline: stages.ticket.examples.skip_hardest: 0.3 with keep 0.8 is more than there is
  --> pipeline.yaml:4:34
   |
 4 |   ticket: {examples: {keep: 0.8, skip_hardest: 0.3}, patches: {keep: 0.5}}
   |                                  ^^^^^^^^^^^^
  help: together at most 1"""
    )


@pytest.mark.parametrize(
    ("written", "at", "said"),
    [
        ("{method: magnitude, keep: 0.5, pattern: '2:4'}", "pattern", "cannot have a pattern and another mask"),
        ("{method: rigl, keep: 0.5, pattern: '2:4'}", "pattern", "cannot have a pattern and another mask"),
        ("{method: sr_ste, keep: 0.5}", "keep", "keeps two weights of every four"),
        ("{method: magnitude, keep: 0.5, begin: 0.6, end: 0.4}", "end", "begin after 0.6 of the steps and end after"),
        ("{method: magnitude, keep: 0.5, begin: 0.8}", "begin", "begin after 0.8 of the steps and end after 0.7"),
        ("{method: magnitude, keep: 0.5, end: 1.2}", "end", "above 0 and at most 1"),
        ("{method: magnitude, keep: 0.5, schedule: one_shot, every: 4}", "every", "masks.schedule is one_shot"),
        ("{method: essential, steps: 5}", "method", "this one begins at random"),
        ("{method: broth, keep: 0.5}", "method", "broth"),
        ("{method: soup, keep: 0.5, steps: 3}", "method", "this one begins at random"),
        ("{method: hold}", "method", "this one begins at random"),
        ("{method: magnitude, keep: 0.5, also: [0.7]}", "also", "schedule: one_shot with begin: 1.0"),
    ],
)
def test_masks_that_contradict_each_other_are_refused(tmp_path: Path, written: str, at: str, said: str) -> None:
    text = Project(tmp_path, VIT.replace("train: {", f"train: {{masks: {written}, ")).unplanned()
    lines = text.splitlines()
    assert said in text and "pipeline.yaml:5:" in text
    shown, carets = next((a, b) for a, b in itertools.pairwise(lines) if set(b.strip(" |")) == {"^"})
    column = carets.index("^")
    assert at in (shown[column:].split(":")[0], shown[:column].rstrip(": '").split()[-1].strip("{")), text


def test_a_ramp_that_goes_up_is_refused_where_it_starts(tmp_path: Path) -> None:
    tokens = "train: {tokens: {blocks: [0], keep: 0.7, ramp: {start: 0.5}}, "
    assert (
        Project(tmp_path, VIT.replace("train: {", tokens)).unplanned()
        == """\
invalid pipeline: stages.train.tokens.ramp.start: a ramp from 0.5 to keep 0.7 does not go down
  --> pipeline.yaml:5:51
   |
 5 |   train: {tokens: {blocks: [0], keep: 0.7, ramp: {start: 0.5}}, epochs: 1}
   |                                                   ^^^^^
  help: start above keep"""
    )


def test_two_of_four_needs_whole_groups(tmp_path: Path) -> None:
    text = VIT.replace("embed_dim: 48", "embed_dim: 42").replace("train: {", "train: {masks: {method: sr_ste}, ")
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: masks.pattern: blocks.0.attn.qkv.weight has rows of 42 weights, which are no whole groups of four
  --> pipeline.yaml:5:11
   |
 5 |   train: {masks: {method: sr_ste}, epochs: 1}
   |           ^^^^^
  help: use widths that are multiples of 4, or the method magnitude"""
    )


@pytest.mark.parametrize(
    ("field", "values", "twice"),
    [("providers", "[cpu, cpu]", "cpu"), ("batch_sizes", "[1, 8, 1]", "1"), ("threads", "[2, 2]", "2")],
)
def test_a_setting_that_would_be_measured_twice_is_refused(tmp_path: Path, field: str, values: str, twice: str) -> None:
    assert (
        Project(tmp_path, VIT + "  export: {}\n  benchmark: {}\n").unplanned(f"benchmark.{field}={values}")
        == f"""\
invalid pipeline: stages.benchmark.{field}: {twice} stands there twice
  --> --set benchmark.{field}={values}
                      {"^" * len(field)}
  help: name each once"""
    )


def test_a_randaugment_text_that_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("train: {", "train: {augment: {rand: rand-k9}, ")).unplanned()
        == """\
invalid pipeline: stages.train.augment.rand: 'k9' is no section of timm's RandAugment
  --> pipeline.yaml:5:21
   |
 5 |   train: {augment: {rand: rand-k9}, epochs: 1}
   |                     ^^^^
  help: its sections are m9 n2 p0.5 mstd0.5 mmax10 inc1"""
    )


# ---- settings without effect


def test_a_selector_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    ticket = "{patches: {method: saliency, keep: 0.5}, selector: {adapt_epochs: 2.0}}"
    assert (
        Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", ticket)).unplanned()
        == """\
invalid pipeline: stages.ticket.selector has no effect: patches.method is saliency
  --> pipeline.yaml:4:52
   |
 4 |   ticket: {patches: {method: saliency, keep: 0.5}, selector: {adapt_epochs: 2.0}}
   |                                                    ^^^^^^^^
  help: remove it, or change what makes it idle"""
    )


def test_a_proxy_that_nobody_asks_is_refused(tmp_path: Path) -> None:
    assert (
        Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", "{proxy: {epochs: 2}}")).unplanned()
        == """\
invalid pipeline: stages.ticket.proxy has no effect: examples.keep is 1, and all patches are kept
  --> pipeline.yaml:4:12
   |
 4 |   ticket: {proxy: {epochs: 2}}
   |            ^^^^^
  help: remove it, or change what makes it idle"""
    )


def test_noise_that_random_examples_do_not_pass_over_is_refused(tmp_path: Path) -> None:
    ticket = "{examples: {method: random, keep: 0.5, skip_hardest: 0.1}}"
    assert (
        Project(tmp_path, VIT.replace("{patches: {keep: 0.5}}", ticket)).unplanned()
        == """\
invalid pipeline: stages.ticket.examples.skip_hardest has no effect: examples.method is random
  --> pipeline.yaml:4:64
   |
 4 |   ticket: {examples: {method: random, keep: 0.5, skip_hardest: 0.1}}
   |                                                                ^^^
  help: remove it, or change what makes it idle"""
    )


def test_a_temperature_of_a_hard_teacher_is_refused(tmp_path: Path) -> None:
    text = VIT.replace("finetune: {", "finetune: {distill: {kind: hard, temperature: 3.0}, ")
    assert (
        Project(tmp_path, text).unplanned()
        == """\
invalid pipeline: stages.finetune.distill.temperature has no effect: distill.kind is hard
  --> pipeline.yaml:6:49
   |
 6 |   finetune: {distill: {kind: hard, temperature: 3.0}, epochs: 1}
   |                                                 ^^^
  help: remove it, or change what makes it idle"""
    )


USED = VIT.replace("{patches: {keep: 0.5}}", "{examples: {keep: 0.5, skip_hardest: 0.1}, proxy: {epochs: 2}}")


def test_what_an_arm_inherits_may_lose_its_effect(tmp_path: Path) -> None:
    Project(tmp_path, USED + "arms:\n  random: {ticket: {examples: {method: random}}}\n").plan()


def test_what_main_has_no_use_for_may_be_there_for_an_arm(tmp_path: Path) -> None:
    text = USED.replace("{keep: 0.5,", "{method: random, keep: 0.5,")
    Project(tmp_path, text + "arms:\n  scored: {ticket: {examples: {method: el2n}}}\n").plan()


def test_what_an_arm_writes_must_have_an_effect_in_that_arm(tmp_path: Path) -> None:
    text = USED + "arms:\n  random: {ticket: {examples: {method: random}, proxy: {runs: 3}}}\n"
    assert (
        Project(tmp_path, text).unplanned()
        == """\
invalid pipeline: arms.random.ticket.proxy has no effect: examples.method is random, and all patches are kept
  --> pipeline.yaml:8:49
   |
 8 |   random: {ticket: {examples: {method: random}, proxy: {runs: 3}}}
   |                                                 ^^^^^
  help: remove it, or change what makes it idle"""
    )


def test_an_override_is_not_refused_for_what_the_file_thereby_loses_but_for_what_it_sets_in_vain(
    tmp_path: Path,
) -> None:
    Project(tmp_path, USED).plan("ticket.examples.keep=1.0")
    assert (
        Project(tmp_path, USED).unplanned("ticket.selector.lr=1e-4")
        == """\
invalid pipeline: stages.ticket.selector has no effect: all patches are kept
  --> --set ticket.selector.lr=1e-4
                   ^^^^^^^^
  help: remove it, or change what makes it idle"""
    )


def test_under_several_seeds_a_mistake_is_told_once(tmp_path: Path) -> None:
    text = "seeds: [0, 1]\n" + USED + "arms:\n  random: {ticket: {examples: {method: random}, proxy: {runs: 3}}}\n"
    told = Project(tmp_path, text).unplanned()
    assert told.count("invalid pipeline") == 1
    assert "\n  --> pipeline.yaml:9:49\n" in told


def test_defaults_are_never_refused(tmp_path: Path) -> None:
    for stage in (
        "ticket: {}",
        "ticket: {patches: {method: random, keep: 0.5}}",
        "ticket: {examples: {method: random, keep: 0.5}}",
    ):
        Project(tmp_path, VIT.replace("ticket: {patches: {keep: 0.5}}", stage)).plan()


@pytest.mark.parametrize(
    ("written", "at", "said"),
    [
        ("stop_early: {patience: 2}, budget: steps, epochs: 9", "stop_early", "spends no equal steps"),
        ("stop_early: {patience: 2}, budget: macs, epochs: 9", "stop_early", "spends no equal macs"),
        ("stop_early: {patience: 9}, epochs: 9", "patience", "9 epochs without a gain never come in 9"),
        ("stop_early: {patience: 2}, steps: 90", "stop_early", "give epochs instead of steps"),
        ("stop_early: {patience: 2}, keep_epochs: [1], epochs: 9", "keep_epochs", "may stop before these epochs"),
        ("stop_early: {patience: 2}, examples: {policy: infobatch}, epochs: 9", "stop_early", "infobatch owes"),
        ("compile: true, weights: {method: attention_log}, epochs: 9", "compile", "looks into the forward"),
        ("compile: true, examples: {policy: infobatch}, epochs: 9", "compile", "looks into the forward"),
        ("accumulate: 65, epochs: 9", "accumulate", "64 images a step make no 65 parts"),
        ("schedule: {shape: constant}, warmup: 0.0, min_lr: 1.0e-6, epochs: 9", "min_lr", "schedule.shape is constant"),
        ("schedule: {shape: linear, factor: 0.5}, epochs: 9", "factor", "linear has none"),
    ],
)
def test_settings_of_the_loop_that_contradict_each_other_are_refused_at_their_place(
    tmp_path: Path, written: str, at: str, said: str
) -> None:
    text = VIT.replace("train: {epochs: 1}", f"train: {{{written}}}")
    refusal = Project(tmp_path, text).unplanned()
    assert said in " ".join(refusal.split())
    line = next(number for number, one in enumerate(refusal.splitlines()) if one.startswith("   |  ") and "^" in one)
    marked = refusal.splitlines()[line]
    shown = refusal.splitlines()[line - 1]
    assert shown[marked.index("^") :].startswith(at) or at in shown[: marked.index("^")]
    assert "help: " in refusal


@pytest.mark.parametrize("stage", ["ticket", "train", "finetune"])
def test_compiling_without_a_compiler_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    field = "ticket.proxy.compile" if stage == "ticket" else f"{stage}.compile"
    refusal = Project(tmp_path, VIT.replace("data:", "device: cpu\ndata:")).refused(f"{field}=true")
    assert "compile: torch compiles for the CPU through a C++ compiler, and finds none" in refusal
    assert f"--set {field}=true" in refusal
    assert "CXX=" in refusal


def test_masks_without_room_in_the_most_steps_that_the_data_can_give_are_refused_by_the_plan(tmp_path: Path) -> None:
    text = """data:  {source: "builtin:digits", image_size: 32, max_train: 200}
model: {name: vit_tiny_patch16_224, args: {patch_size: 8}}
stages:
  train: {epochs: 2, batch_size: 50, masks: {method: rigl, keep: 0.5, every: 100}}
"""
    project = Project(tmp_path, text)
    assert (
        project.unplanned()
        == """\
invalid pipeline: stages.train.masks.every: an exchange every 100 steps, and they end at step 6 of 8: there would be \
none; every can be at most 5 (data.max_train 200 allows no more)
  --> pipeline.yaml:4:78
   |
 4 |   train: {epochs: 2, batch_size: 50, masks: {method: rigl, keep: 0.5, every: 100}}
   |                                                                              ^^^
  help: train longer, or lower every"""
    )
    project.plan("train.masks.every=5")
    project.plan("train.epochs=200")
    project.plan("data.max_train=null")
