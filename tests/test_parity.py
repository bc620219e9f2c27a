"""The gate tells a file that answers or sieves otherwise from one that does not, and a tie from a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
import torch
from onnx import numpy_helper
from tiny_vision import network

from sievit.stages.deploy.bundle import write_sidecar
from sievit.stages.deploy.probe import magnitudes
from sievit.stages.parity import compare_sets, parity
from sievit.stages.vision.architecture import TokenDrop
from sievit.stages.vision.network import Network
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.preprocessing import Preprocessing
from sievit.stages.vision.vit import drops_for

RECORD = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), tuple("abcde"))
PIXELS = tiny_onnx.pictures(20, size=32)


def dense() -> Any:
    return network()


def reducing(method: Any = "attention", fuse: bool = False) -> Any:
    net: Any = network()
    return net.with_tokens(drops_for(net.architecture, (0, 1), 0.6, method, fuse=fuse)).eval()


def described(path: Path) -> Path:
    write_sidecar(
        path,
        preprocessing=RECORD.deployed(),
        classes=RECORD.classes,
        precision="fp32",
        parameters=1,
        macs=1,
        source={},
    )
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Network], Path]:
    """The file of a network's architecture, with the weights of `network()`; each is exported once."""
    made: dict[Any, Path] = {}

    def file_of(net: Network) -> Path:
        known = net.architecture.tokens
        if known not in made:
            made[known] = tmp_path_factory.mktemp("exported") / "model.onnx"
            export(net, made[known], 20)
            described(made[known])
        return made[known]

    return file_of


Exported = Callable[[Network], Path]


def compared(net: Network, path: Path) -> dict[str, Any]:
    return parity(net, path, RECORD, PIXELS, 7, 1e-3)


@pytest.mark.parametrize(
    ("method", "fuse"),
    [
        ("attention", False),
        pytest.param("tome", False, marks=pytest.mark.slow),
        pytest.param("attention", True, marks=pytest.mark.slow),
    ],
)
def test_the_file_of_a_network_keeps_its_tokens_and_gives_its_answers(
    method: str, fuse: bool, exported: Exported
) -> None:
    net = reducing(method, fuse)
    path = exported(net)
    found = compared(net, path)
    assert found["kept_sets"] == {"blocks": 2, "equal": 1.0, "agreement": 1.0, "tied": 0, "wrong": 0}
    assert found["max_abs"] == max(found["by_attention"].values()) < 1e-5
    assert set(found["by_attention"]) == {"plain", "fused"}
    assert (found["top1_agreement"], found["images"], found["batches"]) == (1.0, 20, [1, 7])
    assert [file.name for file in sorted(path.parent.iterdir())] == ["model.json", "model.onnx"], "a probe was left"


@pytest.mark.parametrize("method", ["attention", "tome"])
def test_a_network_of_other_weights_keeps_other_tokens_than_the_file(method: str, exported: Exported) -> None:
    net = reducing(method)
    path = exported(net)
    with torch.no_grad():
        net.body.blocks[0].attn.qkv.weight.mul_(-1.5)
        net.body.blocks[0].attn.qkv.bias.add_(0.5)
    found = compared(net, path)["kept_sets"]
    assert found["wrong"] > 10 and found["agreement"] == 1 - found["wrong"] / 20


@pytest.mark.parametrize("path_of_attention", ["plain", "fused"])
def test_a_network_of_other_weights_answers_otherwise_on_both_paths(path_of_attention: str, exported: Exported) -> None:
    net = dense()
    path = exported(net)
    with torch.no_grad():
        net.body.head.bias[0] += 3
    found = compared(net, path)
    assert found["by_attention"][path_of_attention] == pytest.approx(3, rel=1e-3)
    assert found["kept_sets"] is None and found["top1_agreement"] < 1


def test_one_attention_path_that_errs_is_enough(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    net = dense()
    path = exported(net)
    product = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **named: 1.5 * product(*args, **named)
    )
    found = compared(net, path)
    assert found["by_attention"]["plain"] < 1e-5 < 1e-3 < found["by_attention"]["fused"] == found["max_abs"]


def test_a_sidecar_of_another_mean_is_caught_by_the_logits(exported: Exported) -> None:
    net = dense()
    found = parity(net, exported(net), replace(RECORD, mean=(0.5, 0.4, 0.31)), PIXELS, 7, 1e-3)
    assert found["max_abs"] > 1e-3


def test_a_nan_of_the_file_is_not_lost(tmp_path: Path, exported: Exported) -> None:
    net = dense()
    model = onnx.load(exported(net))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "body.head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(5, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    found = compared(net, described(tmp_path / "model.onnx"))
    assert np.isnan(found["max_abs"]) and found["top1_agreement"] < 1


# ---- sets, by hand: of 16 patches 3 are kept, then 2


def architecture(*drops: TokenDrop) -> Any:
    return replace(reducing().architecture, tokens=drops)


TWO = (TokenDrop(0, 3), TokenDrop(1, 2))
SCORES = [np.linspace(0.9, 0.1, 16, dtype=np.float32)[None], np.array([[0.1, 0.3, 0.5]], np.float32)]


def sets(*rows: list[int]) -> list[np.ndarray]:
    return [np.array([row]) for row in rows]


def test_order_within_a_set_does_not_matter_in_this_block_or_the_next() -> None:
    """3, 0, 2 are kept in any order; of these the next block keeps patches 2 and 3."""
    found = compare_sets(architecture(*TWO), SCORES, sets([0, 2, 3], [1, 2]), sets([3, 0, 2], [0, 2]), 1e-3)
    assert (found.equal, found.tied.sum(), found.wrong.sum()) == (1.0, 0, 0)
    found = compare_sets(architecture(*TWO), SCORES, sets([0, 2, 3], [1, 2]), sets([3, 0, 2], [1, 2]), 1e-3)
    assert found.wrong.all() and found.as_json()["agreement"] == 0


@pytest.mark.parametrize(("gap", "tied"), [(0.0, True), (4e-4, True), (1e-2, False)])
def test_tokens_may_be_exchanged_only_where_their_scores_are_as_good_as_equal(gap: float, tied: bool) -> None:
    scored = [np.array([[0.9, 0.5, 0.5 - gap, 0.1] + [0.5] * 12], np.float32), SCORES[1]]
    ours, theirs = sets([0, 1, 4], [0, 1]), sets([0, 2, 4], [1, 2])
    found = compare_sets(architecture(*TWO), scored, ours, theirs, 1e-3)
    assert found.tied.tolist() == [tied] and found.wrong.tolist() == [not tied]
    assert found.as_json()["agreement"] == float(tied)


def test_a_tie_in_one_image_excuses_no_other() -> None:
    scored = [np.full((2, 16), 0.5, np.float32), np.tile(SCORES[1], (2, 1))]
    scored[0][1, 0] = 0.9
    ours, theirs = np.array([[0, 1, 2], [0, 1, 2]]), np.array([[3, 1, 2], [3, 1, 2]])
    later = np.array([[0, 1], [0, 1]])
    found = compare_sets(architecture(*TWO), scored, [ours, later], [theirs, later], 1e-3)
    assert (found.tied.tolist(), found.wrong.tolist(), found.equal) == ([True, False], [False, True], 0.0)


def test_a_fused_token_is_known_as_such_wherever_it_stands() -> None:
    """It stands behind the kept ones, here at place 3, in both orders."""
    fusing = (TokenDrop(0, 3, "attention", True), TokenDrop(1, 2, "attention", True))
    scored = [SCORES[0], np.array([[0.5, 0.2, 0.1, 0.4]], np.float32)]
    found = compare_sets(architecture(*fusing), scored, sets([0, 2, 3], [0, 3]), sets([3, 2, 0], [2, 3]), 1e-3)
    assert found.equal == 1.0
    found = compare_sets(architecture(*fusing), scored, sets([0, 2, 3], [0, 3]), sets([3, 2, 0], [2, 1]), 1e-3)
    assert found.wrong.all()


@pytest.mark.parametrize(("gap", "tied"), [(0.0, True), (1e-2, False)])
def test_the_order_of_tokens_that_were_not_merged_counts_since_the_next_merging_splits_them(
    gap: float, tied: bool
) -> None:
    """Of 16 tokens the 8 even ones are ranked: 6 stay, in one order and with the last two exchanged. Then 14 are split
    anew; an image that already differs is not looked at again.
    """
    merging = (TokenDrop(0, 14, "tome"), TokenDrop(1, 13, "tome"))
    scored = [np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3 - gap]], np.float32), np.full((1, 7), 0.5, np.float32)]
    first, exchanged, then = [2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 7, 6], [1, 2, 3, 4, 5, 6]
    same = compare_sets(architecture(*merging), scored, sets(first, then), sets(first, then), 1e-3)
    assert same.equal == 1.0
    found = compare_sets(architecture(*merging), scored, sets(first, then), sets(exchanged, then), 1e-3)
    assert (found.tied.tolist(), found.wrong.tolist()) == ([tied], [not tied])


# ---- magnitudes


def test_the_largest_number_of_every_tensor_is_found_over_all_images(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    tiny_onnx.sidecar(path)
    pictures = tiny_onnx.pictures(20)
    found = {seen.tensor: seen for seen in magnitudes(path, pictures, batch=6)}
    mean, std = (np.array(tiny_onnx.PREPROCESSING[name], dtype=np.float64) for name in ("mean", "std"))
    flat = ((pictures / 255.0 - mean) / std).transpose(0, 3, 1, 2).reshape(20, -1)
    expected = {
        "weight": tiny_onnx.weights(), "flat": flat, "logits": flat @ tiny_onnx.weights().astype(np.float64),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].value == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert (found["weight"].node, found["weight"].operator) == ("head", "MatMul")
