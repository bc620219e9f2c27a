"""Swin V1 and V2 against timm, against slow loops, and what their tickets promise."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_vision import SWIN_ARGS, SWINS, data, image_folder, images, swin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.pipeline.errors import SievitError
from sievit.pipeline.plan import make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.mosaic import blank, pack
from sievit.stages.methods.patch_tickets import kept_patches
from sievit.stages.methods.regularisers import head_norms
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.methods.windows import join, legal_squares, partition, pyramid, relative_index, shift_mask
from sievit.stages.vision.architecture import SwinArchitecture, load_architecture
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import load_splits
from sievit.stages.vision.evaluate import logits
from sievit.stages.vision.network import create, outline, rebuild
from sievit.stages.vision.onnx_export import check_parameters, export
from sievit.stages.vision.patches import Cached
from sievit.stages.vision.penalty import WeightPenalty
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.ranking import by_chance
from sievit.stages.vision.recipe import Recipe
from sievit.stages.vision.swin import Swin, TicketUse
from sievit.stages.vision.training import fit
from sievit.stages.vision.weights import load_network, save_network

CPU = torch.device("cpu")
GRID = (4, 4)  # of the tickets: a ViT with patches of 8 px
BOTH = pytest.mark.parametrize("family", list(SWINS))


def ticket(batch: int, kept: int, seed: int = 0) -> Tensor:
    """(B, K) ascending patches of GRID."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([np.sort(rng.permutation(16)[:kept]) for _ in range(batch)]))


def by_hand(views: Tensor, kept: Tensor) -> Tensor:
    """The pixels of all other 8 x 8 patches set to 0, one by one."""
    result = torch.zeros_like(views)
    for image, patches in enumerate(kept.tolist()):
        for patch in patches:
            rows, columns = slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8)
            result[image, :, rows, columns] = views[image, :, rows, columns]
    return result


# ---- the network


@BOTH
@pytest.mark.parametrize("fused", [True, False])
def test_without_tickets_it_computes_what_timm_computes(family: str, fused: bool) -> None:
    ours = swin(family)
    set_fused(ours, fused)
    name, args = SWINS[family]
    theirs = timm.create_model(name, num_classes=5, img_size=32, **args).eval()
    theirs.load_state_dict(ours.body.state_dict())
    expected = theirs(images(3))
    assert expected.std() > 0.1
    assert torch.allclose(ours(images(3)), expected, atol=1e-5)


@BOTH
def test_a_network_of_four_stages_with_windows_as_large_as_a_stage_equals_timm_s(family: str) -> None:
    args = {**SWIN_ARGS, "depths": [1, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    ours = swin(family, depths=args["depths"], num_heads=args["num_heads"])
    theirs = timm.create_model(SWINS[family][0], num_classes=5, img_size=32, **args).eval()
    theirs.load_state_dict(ours.body.state_dict())
    assert torch.allclose(ours(images(2)), theirs(images(2)), atol=1e-5)
    assert ours.architecture.windows == (4, 4, 4, 2)


@BOTH
def test_saved_and_rebuilt_it_answers_as_before(family: str, tmp_path: Path) -> None:
    net = swin(family)
    save_network(net, tmp_path)
    again = load_network(tmp_path)
    assert isinstance(again, Swin) and again.architecture == net.architecture
    assert torch.equal(again(images(2)), net(images(2)))
    record = json.loads((tmp_path / "architecture.json").read_text())
    assert record["family"] == "swin" and [s["window"] for s in record["stages"]] == [4, 4]
    assert rebuild(net.architecture, device="meta").parameter_count() == net.parameter_count()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda r: r["stages"][0].update(window=5), "do not tile"),
        (lambda r: r["stages"][0].update(window=8), "windows"),
        (lambda r: r["stages"][1]["blocks"][0].update(mlp=40), r"weights do not fit.*mlp\.fc1\.weight"),
        (lambda r: r["stages"][1].update(dim=40), r"weights do not fit.*reduction\.weight"),
        (lambda r: r["stages"][1]["blocks"].pop(), r"unexpected layers\.1\.blocks\.1"),
        (lambda r: r["stages"][1]["blocks"][1].update(place=2), "block 2 of stage 1"),
        (lambda r: r["stages"][1]["blocks"][1].update(place=0), "do not rise"),
        (lambda r: r.update(generation=2), "generation"),
        (lambda r: r.update(family="cnn"), "'cnn'"),
        (lambda r: r.pop("stages"), "stages"),
    ],
)
def test_a_record_that_is_not_the_network_s_is_refused(damage: Any, part: str, tmp_path: Path) -> None:
    save_network(swin(), tmp_path)
    record = json.loads((tmp_path / "architecture.json").read_text())
    damage(record)
    (tmp_path / "architecture.json").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match=part):
        load_network(tmp_path)


def test_a_record_without_a_family_is_a_vit_s(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    vit = outline("deit_tiny_patch16_224", image_size=32, args={"patch_size": 8, "depth": 1})
    vit.save(path)
    record = json.loads(path.read_text())
    assert record.pop("family") == "vit"
    path.write_text(json.dumps(record))
    assert load_architecture(path) == vit


@BOTH
def test_local_weights_load_and_a_head_of_another_size_stays_random(family: str, tmp_path: Path) -> None:
    name, args = SWINS[family]
    theirs = timm.create_model(name, num_classes=7, img_size=32, **args).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    whole = create(name, classes=7, image_size=32, args=args, weights=tmp_path / "w.safetensors").eval()
    assert torch.allclose(whole(images(2)), theirs(images(2)), atol=1e-6)
    other = create(name, classes=5, image_size=32, args=args, weights=tmp_path / "w.safetensors")
    assert other.body.head.fc.weight.shape == (5, 32)
    assert torch.equal(other.body.norm.weight, theirs.norm.weight)


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 5, "patch_size": 2}, "one of 2, 4, 8, 16"),
        ("swin_tiny_patch4_window7_224", {"patch_size": 8}, "multiple of 8: change data.image_size"),
        ("swin_tiny_patch4_window7_224", {**SWIN_ARGS, "strict_img_size": False}, "strict_img_size"),
        ("swin_tiny_patch4_window7_224", {**SWIN_ARGS, "always_partition": True}, "fitted to small stages"),
        ("swinv2_tiny_window8_256", {**SWIN_ARGS, "num_heads": [2, 5]}, "5 heads"),
        ("swin_tiny_patch4_window7_224", {**SWIN_ARGS, "depht": 1}, "depht"),
    ],
)
def test_what_needs_padding_or_is_not_known_is_refused(name: str, args: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        create(name, classes=5, image_size=32, args=args)
    assert part in f"{caught.value} {caught.value.hint}"


# ---- windows


def slow_index(window: int, table: int) -> Tensor:
    rows = [[0] * window**2 for _ in range(window**2)]
    for a in range(window**2):
        for b in range(window**2):
            dy, dx = a // window - b // window, a % window - b % window
            rows[a][b] = (dy + table - 1) * (2 * table - 1) + dx + table - 1
    return torch.tensor(rows)


@pytest.mark.parametrize(("window", "table"), [(1, 1), (3, 3), (2, 4), (3, 7)])
def test_an_offset_has_one_place_in_the_table_whatever_the_window(window: int, table: int) -> None:
    assert torch.equal(relative_index(window, table), slow_index(window, table))


def test_windows_are_cut_and_joined_without_loss() -> None:
    x = torch.arange(2 * 6 * 6 * 3).view(2, 6, 6, 3)
    cut = partition(x, 2)
    assert cut[1, 4, 3].tolist() == x[1, 3, 3].tolist()  # fifth window of 3 a row, its last token
    assert torch.equal(join(cut, 2, 6), x)


def four_stages(side: int, window: int, depth: int = 2) -> Any:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=4 * side, window_size=window, embed_dim=4,
        depths=[depth] * 4, num_heads=[1] * 4, num_classes=1,
    )  # fmt: skip


@pytest.mark.parametrize(("grid", "window", "cell"), [(14, 7, 4), (16, 8, 4), (12, 6, 4), (8, 16, 8)])
def test_legal_mosaics_are_those_for_which_timm_does_not_pad(grid: int, window: int, cell: int) -> None:
    """All sides tried: timm resizes its network, and its own blocks say whether their side is whole windows."""
    theirs, side = four_stages(grid * cell, window), grid * cell
    windows = [stage.blocks[0].window_size[0] for stage in theirs.layers]
    legal = []
    for k in range(1, grid + 1):
        theirs.set_input_size(img_size=(4 * k * cell, 4 * k * cell))
        entering = [stage.input_resolution[0] for stage in theirs.layers]  # before the merging
        blocks = [block for stage in theirs.layers for block in stage.blocks]
        fits = all(b.input_resolution[0] % b.window_size[0] == 0 for b in blocks)
        if fits and not any(side % 2 for side in entering[1:]):
            legal.append(k)
            found = pyramid(k * cell, windows, reference=side)
            assert found is not None
            for stage, level in zip(theirs.layers, found, strict=True):
                shifted = stage.blocks[1]
                assert (level.side,) * 2 == tuple(shifted.input_resolution)
                assert ((level.window,) * 2, (level.shift,) * 2) == (shifted.window_size, shifted.shift_size)
                mask = shift_mask(level)
                if mask is None:
                    assert shifted.attn_mask is None
                else:
                    assert torch.equal(mask, shifted.attn_mask)
    assert legal_squares(grid, cell, windows) == legal
    assert grid in legal


# ---- tickets


@pytest.mark.parametrize("kept", [1, 4, 9, 16])
def test_patches_are_packed_in_raster_order_as_a_slow_loop_packs_them(kept: int) -> None:
    views, chosen = images(3), ticket(3, kept)
    side = math.isqrt(kept)
    expected = torch.empty(3, 3, 8 * side, 8 * side)
    for image in range(3):
        for place, patch in enumerate(chosen[image].tolist()):
            top, left = place // side * 8, place % side * 8
            y, x = patch // 4 * 8, patch % 4 * 8
            expected[image, :, top : top + 8, left : left + 8] = views[image, :, y : y + 8, x : x + 8]
    assert torch.equal(pack(views, chosen, GRID), expected)
    assert torch.equal(blank(views, chosen, GRID), by_hand(views, chosen))


@BOTH
def test_zero_is_the_image_with_its_other_pixels_at_zero(family: str) -> None:
    net, views, chosen = swin(family), images(3), ticket(3, 7)
    answers = net.with_tickets(TicketUse("zero", GRID, 7))(views, chosen)
    assert torch.equal(answers, net(by_hand(views, chosen)))
    assert not torch.allclose(answers, net(views), atol=1e-3)


@BOTH
def test_a_mosaic_of_all_patches_is_the_image(family: str) -> None:
    net = swin(family)
    assert torch.equal(net.with_tickets(TicketUse("mosaic", GRID, 16))(images(2), ticket(2, 16)), net(images(2)))


@BOTH
@pytest.mark.parametrize("kept", [4, 9])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mosaic_is_what_timm_computes_at_its_size_with_the_biases_of_equal_offsets(
    family: str, kept: int, fused: bool
) -> None:
    """timm stretches V1's table when windows shrink, so its middle is put in by hand; V2 is told the whole window."""
    name, args = SWINS[family]
    net, chosen = swin(family), ticket(2, kept)
    set_fused(net, fused)
    told = {} if family == "swin" else {"pretrained_window_sizes": [4, 4]}
    theirs = timm.create_model(name, num_classes=5, img_size=32, **args, **told).eval()
    theirs.load_state_dict(net.body.state_dict())
    side = 8 * math.isqrt(kept)
    theirs.set_input_size(img_size=(side, side))
    window = 4 * side // 32
    if family == "swin":
        with torch.no_grad():
            for ours, block in zip(net.blocks, [b for s in theirs.layers for b in s.blocks], strict=True):
                table = ours.attn.relative_position_bias_table.view(7, 7, -1)
                middle = table[4 - window : 3 + window, 4 - window : 3 + window]
                block.attn.relative_position_bias_table.copy_(middle.flatten(0, 1))
    answers = net.with_tickets(TicketUse("mosaic", GRID, kept))(images(2), chosen)
    assert torch.allclose(answers, theirs(pack(images(2), chosen, GRID)), atol=1e-5)


@pytest.mark.parametrize(("mode", "kept"), [("zero", 6), ("mosaic", 4)])
def test_the_random_baseline_is_masked_too(mode: Any, kept: int, tmp_path: Path) -> None:
    """The authors' scripts train this baseline on whole images."""
    split = load_splits(data(str(image_folder(tmp_path / "i")), image_size=32), Path()).test
    net = swin(classes=2).with_tickets(TicketUse(mode, GRID, kept))
    normalise = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
    ranks = by_chance(len(split), 16, 3)
    answers = logits(net, split, normalise, CPU, ranks=ranks, patches=kept)
    views = torch.from_numpy(split.pixels()).permute(0, 3, 1, 2).float() / 255
    chosen = kept_patches(torch.from_numpy(ranks), kept)
    shown = by_hand(normalise(views), chosen) if mode == "zero" else normalise(views)
    plain = swin(classes=2)
    expected = plain(shown) if mode == "zero" else net(shown, chosen)
    assert torch.allclose(answers, expected, atol=1e-5)
    assert not torch.allclose(answers, plain(normalise(views)), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "grid"), [("swin_tiny_patch4_window7_224", 224, 14), ("swinv2_tiny_window8_256", 256, 16)]
)
def test_every_keep_rate_that_a_refusal_names_is_taken(name: str, size: int, grid: int) -> None:
    args = {"embed_dim": 8, "num_heads": [1, 1, 1, 1], "depths": [2, 2, 2, 2]}
    net = rebuild(outline(name, image_size=size, args=args), device="meta")
    with pytest.raises(InvalidInput, match="fill no square") as caught:
        net.with_tickets(TicketUse("mosaic", (grid, grid), keep_count(grid**2, 0.9)))
    rates = [float(part.split()[0]) for part in caught.value.hint.split(": ")[1].split(";")[0].split(", ")]
    assert rates[0] == 1 and len(rates) == grid // 2
    for rate in rates:
        kept = keep_count(grid**2, rate)
        with torch.device("meta"):
            mosaic = net.with_tickets(TicketUse("mosaic", (grid, grid), kept))
            assert mosaic(torch.zeros(1, 3, size, size), torch.zeros(1, kept, dtype=torch.long)).shape == (1, 2)


def test_the_paper_s_mosaic_of_144_patches_has_windows_of_6() -> None:
    """Data-LTH: 0.9 three times leaves 144 of 196 patches, 192 px; 0.85 leaves 121, which fits no pyramid."""
    architecture = outline("swin_tiny_patch4_window7_224", image_size=224, args={})
    assert isinstance(architecture, SwinArchitecture)
    levels = architecture.levels(48)
    assert levels is not None and [(at.side, at.window) for at in levels] == [(48, 6), (24, 6), (12, 6), (6, 6)]
    assert architecture.levels(44) is None
    assert 1 - architecture.macs(48) / architecture.macs() == pytest.approx(0.27, abs=0.01)


@pytest.mark.parametrize("grid", [(5, 5), (32, 32), (4, 8)])
def test_tickets_whose_patches_do_not_cover_whole_patches_are_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="cover whole patches"):
        swin().with_tickets(TicketUse("zero", grid, 4))


def test_single_patches_cannot_be_left_out_without_a_choice() -> None:
    with pytest.raises(InvalidInput, match="cannot leave out single patches"):
        swin()(images(1), ticket(1, 4))


# ---- cost


@BOTH
@pytest.mark.parametrize("kept", [None, 4, 9])
def test_macs_equal_torchs_counter(family: str, kept: int | None) -> None:
    net = swin(family)
    if kept is not None:
        net = net.with_tickets(TicketUse("mosaic", GRID, kept))
    set_fused(net, False)
    biases = 0
    if family == "swin v2":  # the network of biases, which sees no image: for every offset of the recorded window
        biases = sum(7 * 7 * (2 * 512 + 512 * attention.heads) for attention in net.attentions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32), None if kept is None else ticket(1, kept))
    expected = net.architecture.macs() if kept is None else net.ticket_cost(kept)[1]
    assert expected == counter.get_total_flops() // 2 - biases


@pytest.mark.parametrize(
    ("name", "size", "millions", "published"),
    [
        ("swin_tiny_patch4_window7_224", 224, 28.3, 4.5),
        ("swin_base_patch4_window7_224", 224, 87.8, 15.4),
        ("swinv2_tiny_window8_256", 256, 28.3, 5.9),
    ],
)
def test_size_and_cost_are_the_published_ones(name: str, size: int, millions: float, published: float) -> None:
    """Liu et al., ICCV 2021, table 1; the V2 row from the authors' repository."""
    with torch.device("meta"):
        net = create(name, classes=1000, image_size=size, args={})
    assert net.parameter_count() / 1e6 == pytest.approx(millions, abs=0.1)
    assert net.architecture.macs() / 1e9 == pytest.approx(published, abs=0.06)


def test_blanking_costs_the_whole_image_and_packing_less() -> None:
    net = swin()
    assert net.with_tickets(TicketUse("zero", GRID, 4)).ticket_cost(4) == (256, net.architecture.macs())
    tokens, macs = net.with_tickets(TicketUse("mosaic", GRID, 4)).ticket_cost(4)
    assert tokens == 64 and macs < net.architecture.macs() / 4 + 1


# ---- training


@BOTH
def test_the_penalty_sees_every_head_and_unit(family: str) -> None:
    net = swin(family)
    penalty = WeightPenalty("group_lasso", 0.5)
    expected = 0.0
    net.requires_grad_(False)
    for block in net.blocks:
        a, width = block.attn, block.attn.qkv.in_features
        for h in range(a.heads):
            rows = [slice(part * width + h * a.qk, part * width + (h + 1) * a.qk) for part in range(3)]
            squares = sum(float(a.qkv.weight[r].square().sum()) for r in rows)
            squares += float(a.proj.weight[:, h * a.v : (h + 1) * a.v].square().sum())
            expected += math.sqrt(4 * a.qk * width * squares)
        for unit in range(block.mlp.fc1.out_features):
            squares = float(block.mlp.fc1.weight[unit].square().sum() + block.mlp.fc2.weight[:, unit].square().sum())
            expected += math.sqrt(2 * width * squares)
        assert len(head_norms(a.qkv.weight, a.proj.weight, a.heads, a.qk, a.v)) == a.heads
    assert float(penalty(net)) == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["zero", "mosaic"])
def test_a_killed_run_on_tickets_ends_with_the_same_bits(mode: Any, tmp_path: Path) -> None:
    split = load_splits(data(str(image_folder(tmp_path / "i")), image_size=32), Path()).train
    ranks = np.stack([np.random.default_rng(i).permutation(16) for i in range(len(split))])

    def train(**more: Any) -> dict[str, Tensor]:
        net = swin("swin v2", classes=2, drop_path_rate=0.1).with_tickets(TicketUse(mode, GRID, 4))
        recipe = Recipe(steps=5, batch_size=4, ema=0.9)
        pool = Pool(split, np.arange(len(split)), Cached(ranks, 4, GRID))
        normalise = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
        fitted = fit(net, pool, recipe, seed=1, device=CPU, normalise=normalise, finish=0.4, **more)
        assert 0 < fitted.ticketed < fitted.images
        return fitted.network.body.state_dict()

    class Killed(Exception):
        pass

    def kill(steps: int, values: Any) -> None:
        nonlocal left
        left -= steps
        if left == 0:
            raise Killed

    expected, left = train(), 2
    with pytest.raises(Killed):
        train(checkpoint=tmp_path / "c", checkpoint_seconds=0, tick=kill)
    again = train(checkpoint=tmp_path / "c", checkpoint_seconds=0)
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.items())


# ---- the exported file


@BOTH
def test_the_file_answers_as_the_network_at_batch_1_and_n_and_holds_the_biases_as_numbers(
    family: str, tmp_path: Path
) -> None:
    net = swin(family)
    export(net, tmp_path / "m.onnx", 20)
    # Two blocks each with 2 and 4 heads of 8 channels, windows of 4 x 4; masks of 16 and of 4 windows.
    heads = np.array([2, 2, 4, 4])
    gone = 49 * heads if family == "swin" else 512 * (2 + 1 + heads) - 8 * heads  # V2's keys get zeros for a bias
    written = net.parameter_count() - gone.sum() + 256 * heads.sum() + (16 + 4) * 256
    assert check_parameters(net, tmp_path / "m.onnx") == written
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for fused in (True, False):
        set_fused(net, fused)
        for batch in (1, 2, 7):
            with torch.no_grad():
                expected = net(images(batch, seed=batch)).numpy()
            answer = session.run(None, {"input": images(batch, seed=batch).numpy()})[0]
            assert np.abs(answer - expected).max() < 1e-4
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    # A block has four linear layers and two products; between the stages is one more, and no table is looked up.
    assert nodes["MatMul"] == 4 * 6 + 1
    assert nodes["Softmax"] == 4
    assert not {"Gather", "Relu", "Sigmoid", "Pad"} & set(nodes)
    assert nodes["LayerNormalization"] == 4 * 2 + 3
    assert all(attention.fixed is None for attention in net.attentions)


# ---- the chain

SWIN = """\
swin_tiny_patch4_window7_224,
        args: {patch_size: 2, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 4]}"""
PROXY = """\
, model: {name: deit_tiny_patch16_224,
                      args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}"""
PIPELINE = f"""\
name: windows
seed: 1
data:  {{source: images, image_size: 32, test_fraction: 0.3, calibration: 0.2}}
model: {{name: {SWIN}}}
stages:
  ticket:    {{patches: {{method: attention, keep: 0.25}},
              proxy: {{epochs: 1, batch_size: 8{PROXY}}}}}
  train:     {{epochs: 2, batch_size: 8, patches: mosaic, weights: {{strength: 1.0e-5}}}}
  finetune:  {{epochs: 1, batch_size: 8, distill: {{teacher: train}}}}
"""
REST = """\
  export:    {}
  quantize:  {max_drop: 0.5, min_speedup: null}
  benchmark: {batch_sizes: [1], seconds: 0.1}
"""
ARMS = """\
arms:
  v2: {model: {name: swinv2_tiny_window8_256}, train: {patches: zero}}
"""


def planned(folder: Path, text: str) -> tuple[Any, Store]:
    (folder / "pipeline.yaml").write_text(text)
    return make_plan(load_pipeline(folder / "pipeline.yaml", STAGES), STAGES), Store(folder / "artifacts")


def manifests(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    every = [json.loads(path.read_text()) for path in folder.glob("artifacts/*/*/manifest.json")]
    return {(one["arm"], one["stage"]): one for one in every}


def test_tickets_of_a_vit_train_both_generations_and_the_ledger_says_what_each_way_costs(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    plan, store = planned(tmp_path, PIPELINE + "  matrix:    {claims: []}\n" + ARMS)
    run(plan, store, Manner(Silent(), (InvalidInput,)))
    found = manifests(tmp_path)
    packed, blanked = found["main", "train"], found["v2", "train"]
    assert found["main", "ticket"]["metrics"]["patches"]["of"] == 16
    for one in (packed, blanked):
        assert set(one["metrics"]["top1"]) == {"all", "tickets", "random"}
    macs = blanked["metrics"]["macs"]
    assert blanked["ledger"]["tokens_per_image"] == 256
    assert blanked["ledger"]["train_macs"] == 3 * blanked["ledger"]["images"] * macs
    assert "no compute saved" in blanked["metrics"]["policy"]
    assert 64 < packed["ledger"]["tokens_per_image"] < 256
    assert packed["ledger"]["train_macs"] < 0.6 * 3 * packed["ledger"]["images"] * macs
    assert ("v2", "finetune") in found
    cells = found["main", "matrix"]["metrics"]["matrix"]["cells"]
    of_main = {cell["test"]: cell["mean"] for cell in cells if cell["arm"] == "main"}
    # The matrix draws its own random patches; the others are what train itself was tested on.
    assert of_main["ticket"] == packed["metrics"]["top1"]["tickets"]
    assert of_main["full"] == packed["metrics"]["top1"]["all"]


@pytest.mark.parametrize("method", ["random", "saliency"])
def test_tickets_without_a_selector_are_about_the_proxy_s_patches(method: str, tmp_path: Path) -> None:
    text = PIPELINE.replace("method: attention", f"method: {method}").replace("epochs: 1, batch_size: 8, ", "", 1)
    image_folder(tmp_path / "images")
    plan, store = planned(tmp_path, text.split("  train:")[0])
    run(plan, store, Manner(Silent(), (InvalidInput,)))
    record = json.loads(next(tmp_path.glob("artifacts/ticket/*/tickets.json")).read_text())
    assert record["patches"]["grid"] == [4, 4] and record["patches"]["kept_per_image"] == 4


@pytest.mark.slow
def test_the_whole_chain_runs_for_both_generations(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", per_class=24)
    text = PIPELINE.replace("  finetune:", "  prune:     {target: {macs: 0.6}, images: 8}\n  finetune:")
    plan, store = planned(tmp_path, text + REST + ARMS)
    run(plan, store, Manner(Silent(), (InvalidInput,)))
    found = manifests(tmp_path)
    for arm in ("main", "v2"):
        assert found[arm, "export"]["metrics"]["parity"]["top1_agreement"] == 1
        assert found[arm, "quantize"]["metrics"]["chosen"] == "int8"
        assert found[arm, "quantize"]["metrics"]["quantized_nodes"] == 4 * 4 + 2
    assert {row["arm"] for row in found["main", "benchmark"]["metrics"]["rows"]} == {"main", "v2"}


@pytest.mark.parametrize(
    ("written", "instead", "part", "help"),
    [
        ("keep: 0.25", "keep: 0.9", "15 of 16 patches fill no square", "0.5625 (9), 0.25 (4), 0.0625 (1)"),
        ("patches: mosaic, ", "", "cannot leave out single patches", "zero (blanks the others) or mosaic"),
        (PROXY, "", "a Swin, which ranks no patches", "a ViT whose"),
        ("patch_size: 8,", "patch_size: 1,", "do not cover whole patches", "multiple of 2 px"),
        (
            "distill: {teacher: train}",
            "tokens: {blocks: [1], keep: 0.5}",
            "its windows must stay whole",
            "leave tokens",
        ),
        (SWIN, "deit_tiny_patch16_224, args: {patch_size: 8}", "is for Swin", "leave it out"),
    ],
)
def test_what_a_swin_cannot_do_is_said_before_anything_runs(
    written: str, instead: str, part: str, help: str, tmp_path: Path
) -> None:
    assert written in PIPELINE
    text = PIPELINE.replace("source: images", 'source: "builtin:digits"').replace(written, instead)
    plan, store = planned(tmp_path, text)
    with pytest.raises(SievitError) as caught:
        run(plan, store, Manner(Silent(), (InvalidInput,)))
    assert part in caught.value.text() and help in caught.value.text()
    assert not (tmp_path / "artifacts").exists()
