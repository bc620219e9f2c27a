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
from onnx import numpy_helper
from test_surgery import AXES, kept_of
from tiny_vision import FAMILIES, images, network

from sievit.stages.methods import InvalidInput
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.network import Network, create
from sievit.stages.vision.onnx_export import check_parameters, export
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
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "distilled",
                "registers",
                "reduced fused",
                "merged",
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
    # A batch norm's scale and shift become one bias: three of them, of four channels, in the stem of an LV-ViT.
    assert check_parameters(net, path) == net.parameter_count() - (12 if "lv-vit" in kind else 0)
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


def test_a_file_that_lost_or_gained_a_weight_is_refused(tmp_path: Path) -> None:
    net = network(depth=1)
    path = tmp_path / "m.onnx"
    export(net, path, 20)
    count = net.parameter_count()
    assert check_parameters(net, path) == count
    model = onnx.load(path)
    extra = model.graph.initializer.add()
    for values, held in ((np.zeros(3, np.float32), count + 3), (np.zeros((), np.float32), count)):
        extra.CopyFrom(numpy_helper.from_array(values, "extra"))
        onnx.save(model, path)
        if held == count:
            assert check_parameters(net, path) == count, "a single number is a constant"
        else:
            with pytest.raises(InvalidInput, match=f"holds {held:,} weights, the network {count:,}"):
                check_parameters(net, path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "body.head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), bias.name))
    onnx.save(model, path)
    with pytest.raises(InvalidInput, match=f"holds {count - 1:,} weights"):
        check_parameters(net, path)


def test_tensors_that_are_equal_may_stand_in_the_file_once(tmp_path: Path) -> None:
    """Before the first step: all biases are zeros, and may be missing, and all norms ones."""
    name, args = FAMILIES["deit"]
    net = create(name, classes=5, image_size=32, args={**args, "depth": 1}).eval()
    export(net, tmp_path / "m.onnx", 20)
    assert check_parameters(net, tmp_path / "m.onnx") < net.parameter_count()


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
