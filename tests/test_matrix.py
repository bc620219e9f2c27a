"""The matrix: networks whose answers follow from the patches they see, the tests against scipy, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from sievit.pipeline.errors import SievitError
from sievit.pipeline.forecast import forecast
from sievit.pipeline.plan import make_plan
from sievit.pipeline.preflight import check_settings
from sievit.pipeline.progress import Silent
from sievit.pipeline.report.facts import collect
from sievit.pipeline.report.page import render_html, render_markdown
from sievit.pipeline.report.sections import sections
from sievit.pipeline.runner import Manner
from sievit.pipeline.runner import run as run_plan
from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Context, Labelled
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.matrix import RANDOM, MatrixConfig, run
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.paired_tests import accuracy_interval, equal, greater, mcnemar
from sievit.stages.vision.budget import Spent
from sievit.stages.vision.dataset import load_split
from sievit.stages.vision.network import create
from sievit.stages.vision.preprocessing import Preprocessing
from sievit.stages.vision.ranking import by_chance
from sievit.stages.vision.tickets import SCHEMA
from sievit.stages.vision.weights import save_network

KEPT, PATCHES = 5, 16  # patches of an image that have the colour of its class, and all
DATA = DataConfig(source="images", image_size=32, test_fraction=0.5)
SEEDS = (3, 8)

# ---- A network that answers with the colour most of its patches have, and images whose full view lies


def coloured_images(root: Path) -> None:
    """Two classes, red and green: 5 of 16 patches have the colour of the class, the other 11 the other one."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("red", "green")):
        (root / name).mkdir(parents=True)
        for index in range(24):
            own = rng.permutation(PATCHES) < KEPT
            colour = np.where(own, number, 1 - number).reshape(4, 4).repeat(8, 0).repeat(8, 1)
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = 255 * (colour == 0), 255 * (colour == 1)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")


def majority(answers: tuple[float, float]) -> Any:
    """A ViT that averages its patches and answers `answers` where they are red rather than green."""
    network = create(
        "vit_base_patch16_reg4_gap_256",
        classes=2,
        image_size=32,
        args={"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
    )
    with torch.no_grad():
        for parameter in network.body.parameters():
            parameter.zero_()
        network.body.patch_embed.proj.weight[0, 0] = 1
        network.body.patch_embed.proj.weight[1, 1] = 1
        network.body.fc_norm.weight.fill_(1)
        network.body.head.weight[:, 0] = torch.tensor(answers)
        network.body.head.weight[:, 1] = -torch.tensor(answers)
    return network.eval()


@dataclass
class Folder:
    """As much of an artifact as the stage sees."""

    root: Path
    manifest: dict[str, Any]
    kind_of_stage: str


def model(root: Path, network: Any, data: DataConfig = DATA, **spent: Any) -> Folder:
    root.mkdir(parents=True)
    save_network(network, root)
    Preprocessing(32, (0.5,) * 3, (0.5,) * 3, ("green", "red")).save(root)
    record = {"budget": "steps", "steps": 7, "examples": 5, "of": 9, "images": 35, "macs": 100, "scoring_macs": 11}
    Spent(**{**record, "allowed": None, **spent}).save(root)
    return Folder(root, {"writes": "model", "data": data.model_dump(), "config": {"patches": None}}, "train")


def tickets(root: Path, images: Any, *, grid: tuple[int, int] = (4, 4)) -> Folder:
    """The patches of the class's colour rank first."""
    root.mkdir(parents=True)
    middle = images.pixels()[:, 4::8, 4::8]
    green = middle[..., 1].reshape(len(images), -1) > 0
    own = np.where(images.labels[:, None] == 0, green, ~green)  # classes are in the order of their names
    ranks = np.argsort(np.argsort(~own, axis=1, kind="stable"), axis=1).astype(np.uint8)
    for name, values in (("ranks", ranks), ("ranks_test", ranks), ("kept", np.arange(4))):
        np.save(root / f"{name}.npy", values)
    patches = {
        "method": "attention",
        "keep": 0.3,
        "kept_per_image": KEPT,
        "of": PATCHES,
        "grid": grid,
        "view": "cached",
    }
    (root / "tickets.json").write_text(
        json.dumps({"schema": SCHEMA, "examples": {"kept": 4, "of": 4}, "patches": patches})
    )
    return Folder(root, {"writes": "tickets"}, "ticket")


def context(folder: Path, many: list[Labelled], **config: Any) -> Context:
    out = folder / "out"
    out.mkdir()
    return Context(
        config=MatrixConfig(**config), data=DATA, model=ModelConfig(), seed=3, device="cpu", arm="main", entry="matrix",
        base=folder, out=out, work=folder, inputs={}, many=many, references={}, progress=Silent(),
    )  # fmt: skip


NETWORKS = {"main": (-1.0, 1.0), "random": (1.0, -1.0), "full": (0.0, 0.0)}  # right, upside down, always green


def inputs(folder: Path, change: Callable[[str, dict[str, Any]], None] | None = None) -> list[Labelled]:
    coloured_images(folder / "images")
    images = load_split(DATA.model_dump(), folder, "test")
    chosen = tickets(folder / "ticket", images)
    many = []
    for seed, at in zip(SEEDS, ("", "@seed8"), strict=True):
        for arm, answers in NETWORKS.items():
            options: dict[str, Any] = {"network": majority(answers)}
            if change is not None:
                change(arm + at, options)
            made = model(folder / f"{arm}{at}", **options)
            many.append(Labelled(arm + at, "train", made, False, seed))  # type: ignore[arg-type]
        many.append(Labelled("main" + at, "ticket", chosen, True, seed))  # type: ignore[arg-type]
    return many


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Any]:
    folder = tmp_path_factory.mktemp("matrix")
    ctx = context(folder, inputs(folder))
    run(ctx)
    return ctx, load_split(DATA.model_dump(), folder, "test")


def test_every_cell_holds_what_follows_from_the_patches_that_the_network_saw(matrix: tuple[Context, Any]) -> None:
    ctx, images = matrix
    cells = {(cell["arm"], cell["test"]): cell["top1"] for cell in ctx.metrics["matrix"]["cells"]}
    assert cells["main", "ticket"] == cells["random", "full"] == [1.0, 1.0]
    assert cells["main", "full"] == cells["random", "ticket"] == [0.0, 0.0]
    assert all(cells["full", patches] == [0.5, 0.5] for patches in ("ticket", "random", "full"))
    correct = np.load(ctx.out / "correct.npy")
    assert correct.shape == (3, 3, 2, len(images)) and correct.dtype == bool
    own = np.load(ctx.base / "ticket" / "ranks_test.npy") < KEPT
    for number, seed in enumerate(SEEDS):
        seen = by_chance(len(images), PATCHES, RANDOM + seed) < KEPT
        most = [(own[i] & seen[i]).sum() > KEPT / 2 for i in range(len(images))]
        assert (correct[0, 1, number] == most).all() and (correct[1, 1, number] == ~np.array(most)).all()


def test_verdicts_and_budgets_are_told_in_artifact_page_markdown_and_terminal(matrix: tuple[Context, Any]) -> None:
    ctx, images = matrix
    found = ctx.metrics["matrix"]
    assert json.loads((ctx.out / "matrix.json").read_text()) == json.loads(json.dumps(found))
    paper, _, as_good = found["claims"]
    assert [paper[name] for name in ("left", "right", "value", "verdict")] == [
        "main/ticket",
        "random/ticket",
        1,
        "holds",
    ]
    assert paper["mcnemar"] == [{"left": len(images), "right": 0, "p": pytest.approx(2 * 0.5 ** len(images))}] * 2
    assert (as_good["value"], as_good["verdict"]) == (0.5, "does not hold")
    assert found["budget"] == "steps" and found["arms"][0]["spent"][1]["macs"] == 100
    (section,) = sections(ctx.metrics)
    assert section.rows[0][0] == "main" and section.rows[0][1].startswith("100% (")
    assert section.rows[0][-2:] == ("7", "111")
    said = " ".join(section.remarks)
    assert "main/ticket is better than random/ticket: holds (difference +100.00 points" in said
    assert "Budget: equal steps" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"main": {"data": DATA.model_copy(update={"max_test": 20})}},
            "arm main has 20 test images that are not the 24",
        ),
        (
            {"full": {"network": "coarse"}},
            "the network of full/train sees 2 x 2 patches, the main arm's tickets rank 4 x 4",
        ),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def apply(arm: str, options: dict[str, Any]) -> None:
        options.update(change.get(arm, {}))
        if options["network"] == "coarse":
            args = {"patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
            options["network"] = create("vit_tiny_patch16_224", classes=2, image_size=32, args=args)

    with pytest.raises(InvalidInput, match=message):
        run(context(tmp_path, inputs(tmp_path, apply)))


def test_arms_of_other_seeds_are_refused(tmp_path: Path) -> None:
    many = [one for one in inputs(tmp_path) if one.arm != "full@seed8"]
    with pytest.raises(InvalidInput, match="different seeds: main 2, random 2, full 1"):
        run(context(tmp_path, many))


def test_the_network_is_the_one_that_train_made_last(tmp_path: Path) -> None:
    many = inputs(tmp_path)
    worse = model(tmp_path / "selector", majority((0.0, 0.0)))
    cut = model(tmp_path / "cut", majority((0.0, 0.0)))
    cut.kind_of_stage = "prune"
    around = [Labelled("main", "selector", worse, False, 3), *many, Labelled("main", "prune", cut, True, 3)]  # type: ignore[arg-type]
    ctx = context(tmp_path, around)
    run(ctx)
    assert ctx.metrics["matrix"]["cells"][0]["top1"] == [1.0, 1.0]


# ---- The tests behind the verdicts


def answers(*counts: int, images: int = 400) -> np.ndarray:
    """(S, M) with so many of the first images right under each seed."""
    return np.stack([np.arange(images) < count for count in counts])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_images_that_only_one_has_right(
    pairs: list[tuple[bool, bool]],
) -> None:
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    only_left = sum(a and not b for a, b in pairs)
    only_right = sum(b and not a for a, b in pairs)
    found = mcnemar(left, right)
    assert (found.left, found.right) == (only_left, only_right)
    unlike = only_left + only_right
    assert found.p == pytest.approx(stats.binomtest(only_left, unlike).pvalue if unlike else 1.0)
    assert mcnemar(right, left).p == pytest.approx(found.p)


COUNTS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=2, max_size=6).filter(
    lambda pairs: np.std([a - b for a, b in pairs], ddof=1) > 1
)


@given(COUNTS)
@settings(deadline=None, max_examples=30)
def test_over_seeds_greater_is_scipys_paired_t_test_and_equal_its_two_one_sided_ones(
    pairs: list[tuple[int, int]],
) -> None:
    left, right = (answers(*side) for side in zip(*pairs, strict=True))
    ours, theirs = left.mean(1), right.mean(1)
    found, paired = greater(left, right), stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(paired.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval()))
    if ours.std() > 0.01:
        low, high = stats.t.interval(0.95, len(ours) - 1, loc=ours.mean(), scale=stats.sem(ours))
        assert accuracy_interval(list(ours), 400) == pytest.approx((max(0, low), min(1, high)))
    above = stats.ttest_1samp(ours - theirs, -0.01, alternative="greater").pvalue
    below = stats.ttest_1samp(ours - theirs, 0.01, alternative="less").pvalue
    assert equal(left, right, 0.01).p == pytest.approx(max(above, below))


@pytest.mark.parametrize(
    ("left", "right", "expect", "verdict"),
    [
        ((300, 310, 305), (280, 288, 285), "greater", "holds"),
        ((280, 288, 285), (300, 310, 305), "greater", "does not hold"),
        ((300, 310, 305), (310, 290, 306), "greater", "not decided"),
        ((300, 310, 305), (300, 311, 305), "equal", "holds"),
        ((300, 310, 305), (280, 288, 285), "equal", "does not hold"),
        ((300, 310, 305), (310, 290, 306), "equal", "not decided"),
        ((300,), (250,), "greater", "holds"),
        ((250,), (300,), "greater", "does not hold"),
        ((300,), (299,), "greater", "not decided"),
        ((300,), (300,), "equal", "holds"),
        ((300,), (250,), "equal", "does not hold"),
    ],
)
def test_a_claim_holds_does_not_hold_or_is_not_decided(
    left: tuple[int, ...], right: tuple[int, ...], expect: str, verdict: str
) -> None:
    sides = answers(*left), answers(*right)
    found = greater(*sides) if expect == "greater" else equal(*sides, 0.01)
    assert found.verdict == verdict
    assert found.low <= found.value <= found.high


def test_one_image_more_under_each_of_two_seeds_proves_nothing() -> None:
    """Equal differences have no spread, and would make any difference certain."""
    assert greater(answers(300, 310), answers(299, 309)).verdict == "not decided"
    low, high = accuracy_interval([0.75, 0.75], 400)
    assert low < 0.75 < high


# ---- In a pipeline

PIPELINE = """
name: proof
seeds: [0, 1]
data:  {source: "builtin:digits", image_size: 16, max_train: 40, max_test: 20, calibration: 0.05}
model: {name: vit_tiny_patch16_224, args: {patch_size: 4, embed_dim: 48, depth: 2, num_heads: 3}}
stages:
  ticket: {patches: {method: attention, keep: 0.5}, proxy: {epochs: 1, batch_size: 32}, selector: {adapt_epochs: 0}}
  train:  {epochs: 5, batch_size: 32, finish: 0, budget: macs}
  matrix: {}
arms:
  random: {ticket: {patches: {method: random}}}
  full:   {ticket: {patches: {keep: 1.0}}}
"""


def planned(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    plan = make_plan(load_pipeline(path, STAGES, overrides), STAGES)
    check_settings(plan, (InvalidInput,))
    return plan


def test_a_pipeline_of_three_arms_and_two_seeds_ends_in_a_matrix_at_equal_macs(tmp_path: Path) -> None:
    plan, store = planned(tmp_path, PIPELINE), Store(tmp_path / "artifacts")
    record = run_plan(plan, store, Manner(Silent(), (InvalidInput,)))
    node = record.node("main", "matrix")
    artifact = store.find("matrix", str(node.key))
    assert artifact is not None
    found = artifact.metrics["matrix"]
    assert found["seeds"] == [0, 1] and found["budget"] == "macs"
    assert [len(cell["top1"]) for cell in found["cells"]] == [2] * 9
    spent = {arm["arm"]: arm["spent"] for arm in found["arms"]}
    for number in range(2):
        allowed = spent["full"][number]["macs"]
        assert spent["full"][number]["scoring_macs"] == 0 < spent["main"][number]["scoring_macs"]
        for arm in ("main", "random"):
            total = spent[arm][number]["macs"] + spent[arm][number]["scoring_macs"]
            assert spent[arm][number]["allowed"] == allowed and 0.9 * allowed < total <= allowed
        steps = [spent[arm][number]["steps"] for arm in ("random", "main", "full")]
        assert steps[0] > steps[1] and steps[0] > steps[2]
    facts = collect(record.as_json(), store)
    for page in (render_html(facts), render_markdown(facts)):
        assert "Tickets, random and full patches" in page
        assert "Trained to equal macs." in page
        assert all(claim["words"].partition("(")[0].strip() in page.replace("\\", "") for claim in found["claims"])
    assert [step.arms for step in facts.steps if step.stage == "matrix"] == ["all arms"]
    again = run_plan(plan, store, Manner(Silent(), (InvalidInput,)))
    assert again.did_nothing


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  full:   {ticket: {patches: {keep: 1.0}}}", "", "the claim on full/full needs an arm 'full'"),
        ("matrix: {}", "matrix: {claims: [{left: main/ticket, right: rnadom/ticket}]}", "needs an arm 'rnadom'"),
        ("matrix: {}", "matrix: {test: [full]}", "needs the patches 'ticket' in test"),
        ("matrix: {}", "matrix: {claims: [{left: main, right: random/full}]}", "claims[0].left"),
        ("{patches: {method: random}}", "{patches: {method: random, keep: 0.25}}",
         "arm 'random' keeps 0.25 by random of the patches: it is no random control of a main arm that keeps 0.5"),
        ("{patches: {method: random}}", "{patches: {keep: 1.0}, examples: {method: random, keep: 0.5}}",
         "arm 'random' keeps all of the patches"),
        ("{patches: {keep: 1.0}}", "{patches: {keep: 0.9}}", "arm 'full' keeps 0.9 of the patches"),
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_judge_is_refused_in_the_plan(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PIPELINE
    with pytest.raises(SievitError) as caught:
        planned(tmp_path, PIPELINE.replace(old, new))
    assert caught.value.exit_code == 3
    assert message in caught.value.text()


def test_without_patch_tickets_there_is_only_the_full_column(tmp_path: Path) -> None:
    text = "stages: {train: {epochs: 1}, matrix: {}}\narms: {full: {train: {lr: 0.1}}, random: {train: {lr: 0.2}}}"
    with pytest.raises(SievitError, match="the main arm keeps all patches: there is no ticket to test on"):
        planned(tmp_path, text)
    assert planned(tmp_path, text, "matrix.test=[full]", "matrix.claims=[]")


def test_a_ticket_that_costs_more_than_the_budget_is_refused_with_both_numbers(tmp_path: Path) -> None:
    plan = planned(tmp_path, PIPELINE, "train.epochs=1", "seeds=[0]")
    with pytest.raises(
        SievitError, match=r"choosing the ticket took [\d,]+ MACs, the dense network's budget is [\d,]+"
    ):
        run_plan(plan, Store(tmp_path / "artifacts"), Manner(Silent(), (InvalidInput,)))


@pytest.mark.parametrize("recipe", ["data_lth", "data_lth_full"])
def test_the_full_arm_of_the_recipes_is_the_very_network_that_selects(tmp_path: Path, recipe: str) -> None:
    path = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    digits = ["data.source=builtin:digits", "data.mean=null", "data.std=null", "data.root=null"]
    plan = make_plan(load_pipeline(path, STAGES, digits), STAGES)
    found = {(each.node.arm, each.node.entry.name): each for each in forecast(plan, Store(tmp_path / "artifacts"))}
    for at in ("", "@seed1", "@seed2"):
        full, dense = found[f"full{at}", "train"], found[f"main{at}", "dense"]
        assert (full.state, full.shared_with, full.key) == ("shared", f"main{at}", dense.key)
        assert (f"random{at}", "dense") not in found
