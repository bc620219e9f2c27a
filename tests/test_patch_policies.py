"""Which patches a training view keeps: cached, drawn, online; and what a tickets artifact is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision import data, image_folder, network
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.patch_tickets import center_ranks, kept_patches, ranks_from_scores, saliency
from sievit.stages.vision import tickets
from sievit.stages.vision.batches import Batch, Pool
from sievit.stages.vision.dataset import Splits, load_splits
from sievit.stages.vision.evaluate import logits
from sievit.stages.vision.patches import Cached, Drawn, Online, PatchPolicy, Views
from sievit.stages.vision.preprocessing import Normaliser, Preprocessing
from sievit.stages.vision.ranking import ByAttention, ranker, write_tables
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.training import fit
from sievit.stages.vision.vit import drops_for

CPU = torch.device("cpu")
GRID = (4, 4)
NORMALISE = Normaliser((0.4,) * 3, (0.3,) * 3, CPU)
STILL = Augmentation(shift=0, flip=False)
METHODS = ("attention", "inverse", "saliency", "center", "random_fixed", "random")


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=12)
    return load_splits(data(str(folder), test_fraction=0.25, calibration=0.2), Path())


def by_attention() -> ByAttention:
    net = network("distilled")
    return ByAttention(net.with_tokens(drops_for(net.architecture, (0, 2), 0.6)).eval(), NORMALISE)


def written(folder: Path, splits: Splits, method: str, view: str, kept: int = 6) -> Path:
    """A tickets artifact as the stage leaves it."""
    folder.mkdir()
    selector = by_attention()
    if method in ("attention", "inverse"):
        tickets.save_selector(selector.selector, Preprocessing(32, (0.4,) * 3, (0.3,) * 3, ("a",)), folder)
    write_tables(folder, splits, method, GRID, selector, CPU, seed=0, training=view == "cached" and method != "random")
    np.save(folder / "kept.npy", np.arange(len(splits.train)))
    chosen = {"method": method, "view": view, "kept_per_image": kept, "of": 16, "grid": GRID}
    tickets.write_record(folder, splits, examples={}, patches=chosen, cost={})
    return folder


def policy(folder: Path, seed: int = 0) -> PatchPolicy:
    made = tickets.policy(tickets.load(folder), seed=seed, device=CPU)
    assert made is not None
    return made


def batches_of(splits: Splits, patches: PatchPolicy, augment: Augmentation = STILL, **recipe: Any) -> list[Batch]:
    """Two epochs of a training run, as its network sees them."""
    seen: list[Batch] = []

    def objective(net: Any, batch: Batch) -> Tensor:
        seen.append(batch)
        return torch.nn.functional.cross_entropy(net(batch.images, batch.kept), batch.targets)

    settings = {"epochs": 2, "batch_size": 6, **recipe}
    pool = Pool(splits.train, np.arange(len(splits.train)), patches)
    torch.manual_seed(0)
    fit(
        network(classes=2), pool, Recipe(augment=augment, **settings),
        seed=1, device=CPU, normalise=Normaliser((0.0,) * 3, (1.0,) * 3, CPU), objective=objective,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("method", METHODS[:4])
def test_online_equals_cached_when_the_view_is_the_plain_image(method: str, splits: Splits, tmp_path: Path) -> None:
    cached = batches_of(splits, policy(written(tmp_path / "c", splits, method, "cached")))
    online = batches_of(splits, policy(written(tmp_path / "o", splits, method, "online")))
    assert len(cached) == len(online) > 2
    for a, b in zip(cached, online, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.kept is not None and b.kept is not None
        assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_an_online_selector_ranks_the_very_view_that_the_student_sees(
    mix: dict[str, float], splits: Splits, tmp_path: Path
) -> None:
    chosen = policy(written(tmp_path / "o", splits, "attention", "online"))
    augment = Augmentation(shift=0.2, flip=True, erase=0.5, rand="rand-m9-n2")
    selector = by_attention()
    for batch in batches_of(splits, chosen, augment, **mix):
        with torch.no_grad():
            expected = kept_patches(selector(batch.images), 6)  # the student's normalisation is the identity here
        assert batch.kept is not None
        assert torch.equal(batch.kept, expected)
        assert not batch.kept.is_inference()


def test_an_online_selector_learns_nothing_and_draws_no_random_number(splits: Splits, tmp_path: Path) -> None:
    chosen = policy(written(tmp_path / "o", splits, "attention", "online"))
    assert isinstance(chosen, Online) and isinstance(chosen.rank, ByAttention)
    before = {name: t.clone() for name, t in chosen.rank.selector.state_dict().items()}
    batches_of(splits, chosen)
    assert all(torch.equal(before[name], t) for name, t in chosen.rank.selector.state_dict().items())
    assert not chosen.rank.selector.training
    state = torch.get_rng_state()
    chosen.kept(views(np.arange(4)))
    assert torch.equal(state, torch.get_rng_state())
    assert chosen.macs == chosen.rank.selector.architecture.selector_macs() > 0


def views(indices: np.ndarray, epoch: int = 0, share: float = 1.0, images: Tensor | None = None) -> Views:
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(len(indices), -1, -1)
    return Views(indices, still, share, epoch, torch.zeros(len(indices), 3, 32, 32) if images is None else images)


def test_random_gives_an_image_the_same_patches_in_an_epoch_whatever_the_batch() -> None:
    draw = Drawn(16, 6, seed=7)
    alone = [draw.kept(views(np.array([i]), epoch=3))[0].tolist() for i in range(20)]
    assert draw.kept(views(np.arange(20), epoch=3)).tolist() == alone
    assert draw.kept(views(np.array([11, 3]), epoch=3)).tolist() == [alone[11], alone[3]]
    assert draw.kept(views(np.arange(20), epoch=4)).tolist() != alone
    assert Drawn(16, 6, seed=8).kept(views(np.arange(20), epoch=3)).tolist() != alone


def test_random_is_drawn_anew_each_epoch_and_random_fixed_is_not(splits: Splits, tmp_path: Path) -> None:
    for method, same in (("random", False), ("random_fixed", True)):
        seen = batches_of(splits, policy(written(tmp_path / method, splits, method, "cached")))
        half = len(seen) // 2
        tickets_of: list[dict[bytes, list[int]]] = []
        for epoch in (seen[:half], seen[half:]):
            rows = [(image.numpy().tobytes(), row) for b in epoch if b.kept is not None
                    for image, row in zip(b.images, b.kept.tolist(), strict=True)]  # fmt: skip
            tickets_of.append(dict(rows))
        assert tickets_of[0].keys() == tickets_of[1].keys()
        assert (tickets_of[0] == tickets_of[1]) == same


@pytest.mark.parametrize(("method", "view"), [("random", "cached"), ("attention", "online")])
def test_a_killed_run_on_these_tickets_ends_with_the_same_bits(
    method: str, view: str, splits: Splits, tmp_path: Path
) -> None:
    chosen = policy(written(tmp_path / "t", splits, method, view))
    recipe = Recipe(epochs=2, batch_size=6, cutmix=1.0, augment=Augmentation(zoom=0.7, rand="rand-m5"))

    class Killed(BaseException):
        pass

    def trained(**more: Any) -> Tensor:
        torch.manual_seed(0)
        pool = Pool(splits.train, np.arange(len(splits.train)), chosen)
        fitted = fit(network(classes=2), pool, recipe, seed=1, device=CPU, normalise=NORMALISE, **more)
        weight: Tensor = fitted.network.body.blocks[1].mlp.fc1.weight
        return weight.detach().clone()

    def kill(steps: int, values: Any) -> None:
        calls.append(steps)
        if len(calls) == 4:
            raise Killed

    calls: list[int] = []
    kept = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        trained(**kept, tick=kill)
    assert torch.equal(trained(**kept), trained())


def test_a_mixture_keeps_by_the_mixture_of_both_ranks() -> None:
    table = np.stack([np.random.default_rng(i).permutation(16) for i in range(4)]).astype(np.uint8)
    kept = Cached(table, 5, GRID).kept(views(np.array([2, 0]), share=0.7))
    for row, (own, other) in enumerate(((2, 0), (0, 2))):
        mixed = [0.7 * float(table[own, p]) + 0.3 * float(table[other, p]) for p in range(16)]
        best = sorted(range(16), key=lambda p: (np.float32(mixed[p]), p))[:5]
        assert kept[row].tolist() == sorted(best)


def test_a_student_on_its_ticket_equals_the_masked_network() -> None:
    """Oracle: all patches embedded, attention to the others forbidden, only kept ones read."""
    net, kept = network("distilled"), torch.tensor([[0, 3, 4, 9], [1, 7, 8, 15]])
    x = torch.rand(2, 3, 32, 32)
    body, prefix = net.body, 2
    allowed = torch.zeros(2, 18, dtype=torch.bool)
    allowed[:, :prefix] = True
    allowed.scatter_(1, kept + prefix, True)
    tokens = body._pos_embed(body.patch_embed(x))
    for block in body.blocks:
        a, y = block.attn, block.norm1(tokens)
        q, k, v = a.qkv(y).view(2, 18, 3, 3, 16).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * a.scale).masked_fill(~allowed[:, None, None], float("-inf"))
        y = a.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 18, 48))
        tokens = tokens + y
        tokens = tokens + block.mlp(block.norm2(tokens))
    assert torch.allclose(net(x, kept), body.forward_head(body.norm(tokens)), atol=1e-5)


def test_stored_tables_are_the_rankers_answers_image_by_image(splits: Splits, tmp_path: Path) -> None:
    for method in METHODS[:4]:
        folder = written(tmp_path / method, splits, method, "cached")
        for name, part in (("ranks", splits.train), ("ranks_test", splits.test)):
            ranks = np.load(folder / f"{name}.npy")
            assert ranks.dtype == np.uint8
            rank = ranker(method, GRID, by_attention())
            for i in (0, len(part) - 1):
                view = torch.from_numpy(part[i].copy()).permute(2, 0, 1).float()[None] / 255
                with torch.no_grad():
                    assert ranks[i].tolist() == rank(view)[0].tolist()
    assert (np.load(tmp_path / "center" / "ranks.npy") == center_ranks(GRID).numpy()).all()
    first = torch.from_numpy(splits.train[0].copy()).permute(2, 0, 1).float()[None] / 255
    expected = ranks_from_scores(saliency(first, GRID))[0]
    assert np.load(tmp_path / "saliency" / "ranks.npy")[0].tolist() == expected.tolist()


def test_only_what_is_needed_is_stored(splits: Splits, tmp_path: Path) -> None:
    for method, view, expected in (
        ("attention", "cached", {"ranks.npy", "selector"}),
        ("inverse", "online", {"selector"}),
        ("saliency", "online", set()),
        ("random", "cached", set()),
        ("random_fixed", "cached", {"ranks.npy"}),
    ):
        folder = written(tmp_path / f"{method}-{view}", splits, method, view)
        always = {"kept.npy", "tickets.json", "ranks_test.npy", "ranks_calibration.npy"}
        assert {p.name for p in folder.iterdir()} == always | expected


def test_the_selector_of_an_artifact_ranks_as_the_one_that_made_it(splits: Splits, tmp_path: Path) -> None:
    loaded = tickets.load_selector(written(tmp_path / "t", splits, "attention", "cached"), CPU)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), by_attention()(x))
    assert not any(p.requires_grad for p in loaded.selector.parameters())


def test_a_network_answers_on_test_tickets_as_on_the_selectors_choice(splits: Splits, tmp_path: Path) -> None:
    loaded = tickets.load(written(tmp_path / "t", splits, "attention", "online"))
    net = network(classes=2)
    answers = logits(net, splits.test, NORMALISE, CPU, ranks=loaded.ranks_test, patches=6)
    views = torch.from_numpy(splits.test.pixels()).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = net(NORMALISE(views), kept_patches(by_attention()(views), 6))
    assert torch.allclose(answers, expected, atol=1e-5)


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return act


def set_entry(place: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def act(table: np.ndarray) -> np.ndarray:
        table[place] = value
        return table

    return act


def record(**changed: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        facts = json.loads((folder / "tickets.json").read_text())
        facts["patches"] |= changed
        (folder / "tickets.json").write_text(json.dumps(facts))

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("ranks.npy", set_entry((3, 4), 16)), "rank 16, 16 patches have ranks 0 to 15"),
        (edit("ranks.npy", set_entry((3, 4), 15)), "1 rows are no order of 16 patches, first row 3"),
        (edit("ranks.npy", lambda t: t[:-1]), r"\(13, 16\) of uint8, expected \(14, 16\)"),
        (edit("ranks_test.npy", lambda t: t[:, :9]), r"\(6, 9\)"),
        (edit("ranks.npy", lambda t: t.astype(np.float32)), "float32"),
        (edit("kept.npy", set_entry(2, 14)), "image 14, the training split has images 0 to 13"),
        (edit("kept.npy", set_entry(2, -1)), "image -1"),
        (edit("kept.npy", set_entry(2, 3)), "14 images, 1 of them twice"),
        (edit("kept.npy", lambda t: t[:0]), "keep no image"),
        (record(grid=[2, 8]), "2 x 8 patches of an image, the network has 4 x 4"),
    ],
)
def test_damaged_tickets_are_refused_with_the_numbers_that_disagree(
    damage: Callable[[Path], None], message: str, splits: Splits, tmp_path: Path
) -> None:
    folder = written(tmp_path / "t", splits, "random_fixed", "cached")
    tickets.check(tickets.load(folder), splits, GRID, 0.0)
    damage(folder)
    with pytest.raises(InvalidInput, match=message) as caught:
        tickets.check(tickets.load(folder), splits, GRID, 0.0)
    assert caught.value.hint


def test_tickets_of_other_data_are_refused_by_its_content(splits: Splits, tmp_path: Path) -> None:
    loaded = tickets.load(written(tmp_path / "t", splits, "random_fixed", "cached"))

    def refused(other: Splits) -> str:
        with pytest.raises(InvalidInput) as caught:
            tickets.check(loaded, other, GRID, 0.0)
        return str(caught.value)

    assert "32 px, data.image_size is 64" in refused(replace(splits, train=replace(splits.train, size=64)))
    fewer = replace(splits.test, members=splits.test.members[:-1])
    assert "test split of 6 images, this one has 5" in refused(replace(splits, test=fewer))
    turned = replace(splits.train, members=splits.train.members[::-1])
    assert "another train split" in refused(replace(splits, train=turned))
    renamed = replace(splits.calibration, listing=replace(splits.calibration.listing, classes=("ant", "wasp")))
    assert "another calibration split" in refused(replace(splits, calibration=renamed))


@pytest.mark.parametrize(
    ("method", "view", "allowed"),
    [
        ("attention", "cached", False),
        ("attention", "online", True),
        ("random", "cached", True),
        ("center", "cached", False),
    ],
)
def test_cutmix_goes_with_tickets_that_do_not_know_one_image_only(
    method: str, view: str, allowed: bool, splits: Splits, tmp_path: Path
) -> None:
    loaded = tickets.load(written(tmp_path / "t", splits, method, view))
    if allowed:
        tickets.check(loaded, splits, GRID, 1.0)
    else:
        with pytest.raises(InvalidInput, match="cutmix"):
            tickets.check(loaded, splits, GRID, 1.0)
    made = tickets.policy(loaded, seed=0, device=CPU)
    assert made is not None and made.follows_image != allowed
