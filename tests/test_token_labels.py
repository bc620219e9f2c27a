"""Token labels against loops over patches and pixels: provenance through mixing and tickets, and who may label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from test_benchmark import Folder, Listening
from test_training import CPU, NORMALISE, Killed, state
from tiny_vision import FAMILIES, data, image_folder, images, network
from torch import Tensor

from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import train
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.token_labels import (
    labels_of,
    mixed_labels,
    on_grid,
    patch_shares,
    token_label_losses,
    top_labels,
)
from sievit.stages.vision import annotator
from sievit.stages.vision.augment import Mixer
from sievit.stages.vision.batches import Batch, Pool
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.loss_settings import TokenLabels
from sievit.stages.vision.network import create
from sievit.stages.vision.objective import create as create_objective
from sievit.stages.vision.patches import Cached
from sievit.stages.vision.preprocessing import Preprocessing
from sievit.stages.vision.processes import share
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.training import fit
from sievit.stages.vision.weights import load_network, save_network


def soft(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0)])
def test_every_patch_gets_the_share_that_its_pixels_have_of_their_own_image(mixup: float, cutmix: float) -> None:
    """Images of one colour each: what a mixed pixel shows says whose it is."""
    labels, grid = soft(4, 16, 5), (4, 4)
    shades = torch.tensor([0.1, 0.2, 0.6, 0.9])
    fractions = set()
    for seed in range(12):
        views = shades.view(4, 1, 1, 1).expand(4, 3, 32, 32).clone()
        mixed = Mixer(mixup, cutmix, 0.0, 5)(views, torch.arange(4), torch.Generator().manual_seed(seed))
        shares = patch_shares(mixed.own, grid)
        ours = mixed_labels(labels, shares)
        for image in range(4):
            own, other = shades[image], shades[3 - image]
            for patch in range(16):
                row, column = divmod(patch, 4)
                pixels = mixed.images[image, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                share = ((pixels - other) / (own - other)).mean()
                expected = share * labels[image, patch] + (1 - share) * labels[3 - image, patch]
                assert torch.allclose(ours[image, patch], expected, atol=1e-5)
        assert float(shares.mean()) == pytest.approx(mixed.share, abs=1e-5)
        fractions |= {round(float(s), 4) for s in shares}
    assert len(fractions) > 2, "boxes that cut through patches were among them"


def test_labels_after_the_gather_are_those_of_a_loop_over_the_ticket() -> None:
    labels, logits = soft(3, 16, 5), torch.randn(3, 6, 5)
    ticket = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    kept = labels_of(labels, ticket)
    losses = token_label_losses(logits, kept)
    for image in range(3):
        total = 0.0
        for place, patch in enumerate(ticket[image].tolist()):
            assert torch.equal(kept[image, place], labels[image, patch])
            total -= float((labels[image, patch] * logits[image, place].log_softmax(0)).sum())
        assert float(losses[image]) == pytest.approx(total / 6, rel=1e-5)


def test_a_ticket_of_all_patches_changes_nothing_in_the_loss() -> None:
    net, x = network("lv-vit").train(), images(4)
    for block in (net.body.patch_embed.bn1, net.body.patch_embed.bn2, net.body.patch_embed.bn3):
        block.eval()
    net.set_token_training(True)
    labels = soft(4, 16, 5)
    every = torch.arange(16).expand(4, -1)
    objective = create_objective(TokenLabels(source="train@1", weight=0.7), each=False)
    targets = soft(4, 5, seed=1)
    whole = objective(net, Batch(x, targets, None, torch.arange(4), np.arange(4), None, 1.0, share(4), 4, labels))
    ticketed = objective(
        net, Batch(x, targets, every, torch.arange(4), np.arange(4), None, 1.0, share(4), 4, labels_of(labels, every))
    )
    of_class, of_patches = net(x)
    by_hand = -(targets * of_class.log_softmax(1)).sum(1).mean()
    by_hand = by_hand - 0.7 * (labels * of_patches.log_softmax(2)).sum(2).mean()
    assert torch.allclose(whole, by_hand, atol=1e-6)
    assert torch.allclose(whole, ticketed, atol=1e-6)


def test_the_highest_classes_stay_and_sum_to_1() -> None:
    labels = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert torch.allclose(top_labels(labels, 2), torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))
    assert top_labels(labels, None) is labels


def test_a_map_of_another_grid_is_resized_and_stays_a_distribution() -> None:
    maps = torch.zeros(1, 2, 2, 2)
    maps[:, 0, :, 0] = maps[:, 1, :, 1] = 1.0  # class 0 on the left, class 1 on the right
    labels = on_grid(maps, (4, 4)).view(4, 4, 2)
    assert torch.allclose(labels.sum(-1), torch.ones(4, 4))
    assert (labels[:, 0, 0] > 0.9).all() and (labels[:, 3, 1] > 0.9).all()
    assert torch.equal(on_grid(maps, (2, 2))[0, 1], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("family", ["deit", "distilled", "layer scale", "registers, average pool", "lv-vit"])
def test_a_network_labels_each_patch_with_its_head_on_that_patch(family: str) -> None:
    net: Any = network(family)
    x = images(2)
    tokens = net.body.norm(net._through(x, None).x)
    answers = net.place_logits(x).flatten(2).transpose(1, 2)
    for patch in range(16):
        token = tokens[:, net.architecture.prefix + patch]
        expected = {
            "lv-vit": lambda t: net.body.aux_head(t),
            "distilled": lambda t: (net.body.head(t) + net.body.head_dist(t)) / 2,
        }.get(family, lambda t: net.body.head(net.body.fc_norm(t)))(token)
        assert torch.allclose(answers[:, patch], expected, atol=1e-5)


def test_a_swin_labels_each_place_of_its_last_stage() -> None:
    sizes = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
    net: Any = create("swin_tiny_patch4_window7_224", classes=5, image_size=32, args=sizes).eval()
    x = images(3)
    maps = net.place_logits(x)
    assert maps.shape == (3, 5, 4, 4)
    assert torch.allclose(maps.mean((2, 3)), net(x), atol=1e-5), "a linear head after an average over places"


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("resnet18", (2, 2)),
        ("convnext_atto", (2, 2)),
        ("vit_tiny_patch16_224", (4, 4)),
        ("swin_tiny_patch4_window7_224", (2, 2)),
    ],
)
def test_a_network_of_timm_answers_at_every_place_as_it_pools(name: str, places: tuple[int, int]) -> None:
    """Where the head is linear after an average over places, the mean of the places' logits is the network's answer."""
    size = {"img_size": 64} if ("vit" in name or "swin" in name) else {}
    net = timm.create_model(name, num_classes=5, **size).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = annotator.place_logits(net, x)
    assert maps.shape == (2, 5, *places)
    if name in ("resnet18", "swin_tiny_patch4_window7_224"):
        assert torch.allclose(maps.mean((2, 3)), net(x), atol=1e-4)


def test_a_network_whose_end_is_no_grid_cannot_label() -> None:
    with pytest.raises(InvalidInput, match="neither a map nor"):
        annotator.place_logits(timm.create_model("pit_ti_224", img_size=32), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return load_splits(data(str(image_folder(tmp_path_factory.mktemp("data") / "i", per_class=12))), Path()).train


def labelling(pictures: Images, folder: Path, *, ticketed: bool, batches: list[Batch], **more: Any) -> Any:
    teacher = network("deit", classes=2, seed=7)
    folder.mkdir(exist_ok=True)
    save_network(teacher, folder)
    Preprocessing(32, (0.5,) * 3, (0.5,) * 3, pictures.classes).save(folder)
    label = annotator.from_artifact(folder, "train@1", pictures.classes, CPU, image_size=32, grid=(4, 4), top=None)
    torch.manual_seed(5)
    student = network("lv-vit", classes=2, drop_path_rate=0.2)
    student.set_token_training(True)
    plain = create_objective(TokenLabels(source="train@1"), each=False)

    def objective(net: Any, batch: Batch) -> Tensor:
        batches.append(batch)
        return plain(net, batch)

    ranks = np.stack([np.random.default_rng(i).permutation(16) for i in range(len(pictures))]) if ticketed else None
    pool = Pool(pictures, np.arange(len(pictures)), None if ranks is None else Cached(ranks, 9, (4, 4)))
    recipe = Recipe(
        epochs=2, batch_size=6, mixup=0.4, cutmix=0.0 if ticketed else 1.0, ema=0.9, drop_path=0.2,
        augment=Augmentation(flip=True, zoom=0.8),
    )  # fmt: skip
    fitted = fit(
        student, pool, recipe, seed=3, device=CPU, normalise=NORMALISE, objective=objective, annotate=label, **more
    )
    return fitted, label


@pytest.mark.parametrize("ticketed", [False, True])
def test_a_killed_run_with_token_labels_ends_with_the_same_bits(
    pictures: Images, tmp_path: Path, ticketed: bool
) -> None:
    batches: list[Batch] = []
    expected, label = labelling(pictures, tmp_path / "a", ticketed=ticketed, batches=batches)
    for batch in batches:
        assert batch.token_labels is not None
        assert batch.token_labels.shape == (len(batch.images), 9 if ticketed else 16, 2)
        assert torch.allclose(batch.token_labels.sum(-1), torch.ones(batch.token_labels.shape[:2]), atol=1e-5)
    assert label.macs > network("deit", classes=2).architecture.macs()
    steps = 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == 3:
            raise Killed

    kept: dict[str, Any] = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        labelling(pictures, tmp_path / "b", ticketed=ticketed, batches=[], tick=tick, **kept)
    again, _ = labelling(pictures, tmp_path / "b", ticketed=ticketed, batches=[], **kept)
    wanted = state(expected.network)
    assert all(torch.equal(wanted[name], t) for name, t in state(again.network).items())


def test_labels_are_those_of_the_views_that_the_student_sees(pictures: Images, tmp_path: Path) -> None:
    """Without mixing, the annotator asked about the very views of a batch gives the batch's labels."""
    batches: list[Batch] = []
    teacher = network("deit", classes=2, seed=7)
    save_network(teacher, tmp_path)
    Preprocessing(32, (0.4,) * 3, (0.3,) * 3, pictures.classes).save(tmp_path)
    label = annotator.from_artifact(tmp_path, "train@1", pictures.classes, CPU, image_size=32, grid=(4, 4), top=1)

    def objective(net: Any, batch: Batch) -> Tensor:
        batches.append(batch)
        return net(batch.images)[0].sum()  # type: ignore[no-any-return]

    student = network("lv-vit", classes=2)
    student.set_token_training(True)
    recipe = Recipe(steps=2, batch_size=6, augment=Augmentation(shift=0.1, erase=0.5))
    fit(
        student, Pool(pictures, np.arange(len(pictures))), recipe,
        seed=3, device=CPU, normalise=NORMALISE, objective=objective, annotate=label,
    )  # fmt: skip
    for batch in batches:
        assert batch.token_labels is not None
        views = batch.images * 0.5 + 0.5
        best = teacher.place_logits((views - 0.4) / 0.3).argmax(1).flatten(1)
        assert torch.equal(batch.token_labels.argmax(-1), best)
        assert torch.equal(batch.token_labels.amax(-1), torch.ones(best.shape))


def test_the_train_stage_labels_with_the_named_artifact_and_books_its_cost(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", per_class=12)
    block = DataConfig(source="images", image_size=32)
    classes = load_splits(block.model_dump(), tmp_path).train.classes
    labeller = Folder(tmp_path / "labeller", kind_of_stage="train")
    labeller.root.mkdir()
    save_network(network("deit", classes=2), labeller.root)
    Preprocessing(32, (0.5,) * 3, (0.5,) * 3, classes).save(labeller.root)
    name, args = FAMILIES["lv-vit"]
    config = train.TrainConfig(epochs=1, batch_size=8, token_labels=TokenLabels(source="train@1", top=1))
    assert train.STAGE.references(config) == {"annotator": "train@1"}
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    ctx = Context(
        config=config,
        data=block,
        model=ModelConfig(name=name, args=args),
        seed=0,
        device="cpu",
        arm="main",
        entry="train",
        base=tmp_path,
        out=tmp_path / "out",
        work=tmp_path / "work",
        inputs={"annotator": labeller},  # type: ignore[dict-item]
        many=(),
        references={},
        progress=Listening(),  # type: ignore[arg-type]
    )
    train.run(ctx)
    assert ctx.metrics["token_labels"] == {"source": "train@1", "weight": 0.5, "top": 1, "map": (4, 4)}
    # The labeller's head answers 16 patches, not one class token.
    per_image = network("deit", classes=2).architecture.macs() + 15 * 48 * 2
    assert ctx.ledger["teacher_macs"] == ctx.ledger["images"] * per_image
    assert ctx.ledger["scoring_macs"] == 0, "nothing was chosen"
    answers = load_network(tmp_path / "out").train()(images(2))
    assert answers.shape == (2, 2), "what is handed on answers once, in training too"


def test_an_annotator_of_other_classes_is_refused(pictures: Images, tmp_path: Path) -> None:
    save_network(network("deit", classes=3), tmp_path)
    Preprocessing(32, (0.5,) * 3, (0.5,) * 3, ("a", "b", "c")).save(tmp_path)
    with pytest.raises(InvalidInput, match="train@1 answers other classes"):
        annotator.from_artifact(tmp_path, "train@1", pictures.classes, CPU, image_size=32, grid=(4, 4), top=None)
