"""Theorem 2: the ONNX file answers as the network does, on images neither has seen, at batch 1 and N."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from test_surgery import AXES, kept_of
from tiny_vision import images, network

from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.network import Network
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.surgery import cut
from sievit.stages.vision.vit import drops_for


def variant(kind: str) -> Network:
    named = {"distilled": "distilled", "registers": "registers, average pool", "lv-vit": "lv-vit"}
    net = network(next((family for part, family in named.items() if part in kind), "deit"))
    if "pruned" in kind:
        net = cut(net, kept_of(net, AXES["all"]))
    if "reduced" in kind:
        net = net.with_tokens(drops_for(net.architecture, (0, 1), 0.6, fuse="fused" in kind))
    if "merged" in kind:
        net = net.with_tokens(drops_for(net.architecture, (0, 1), 0.6, "tome"))
    return net.eval()


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "pruned distilled",
        "pruned reduced lv-vit",
        "reduced fused",
        "merged",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "distilled",
                "registers",
                "lv-vit",
                "pruned",
                "reduced",
                "pruned reduced",
                "merged distilled",
                "pruned merged registers",
            )
        ),
    ],
)
def test_the_file_answers_as_the_network_at_batch_1_and_n(kind: str, tmp_path: Path) -> None:
    net = variant(kind)
    path = tmp_path / "m.onnx"
    export(net, path, 20)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for fused in (True, False):
        set_fused(net, fused)
        for batch in (1, 2, 7):
            x = images(batch, seed=batch)
            with torch.no_grad():
                expected = net(x).numpy()
            answer = session.run(None, {"input": x.numpy()})[0]
            assert np.abs(answer - expected).max() < 1e-4
            assert (answer.argmax(1) == expected.argmax(1)).all()
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("LayerNormalization") == 7
    assert nodes.count("TopK") == (2 if "reduced" in kind or "merged" in kind else 0)


def test_equal_networks_give_equal_bytes_and_tell_nothing_about_the_machine(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(variant("pruned"), tmp_path / name / "m.onnx", 20)
        content = (tmp_path / name / "m.onnx").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())
        assert b".py" not in content
        assert str(Path.cwd()).encode() not in content
    assert len(digests) == 1


def test_equal_scores_keep_the_same_tokens_in_both_runtimes(tmp_path: Path) -> None:
    """A grey image: every patch without position gets the same score. The lower index wins in torch and in ONNX
    Runtime.
    """
    net: Any = variant("reduced")
    with torch.no_grad():
        net.body.pos_embed.zero_()
    export(net, tmp_path / "m.onnx", 20)
    grey = torch.zeros(2, 3, 32, 32)
    _, kept = net.select(grey)
    assert kept[0].tolist() == [list(range(10))] * 2
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert np.abs(session.run(None, {"input": grey.numpy()})[0] - net(grey).numpy()).max() < 1e-5
