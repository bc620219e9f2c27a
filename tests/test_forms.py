"""The forms of a float file compute what the float file computes: attention as one operator exactly, 8 bits nearly,
layers that were made float again exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_onnx
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from test_export import variant
from tiny_vision import images, swin

from sievit.stages.deploy import eight_bit
from sievit.stages.deploy.attention_fusion import fuse_attention, fuse_projection
from sievit.stages.deploy.block_sensitivity import divergence, fewest, rank
from sievit.stages.deploy.eight_bit import Form, Workshop, ranges_on, record_ranges, weight_bits
from sievit.stages.deploy.predict import log_probabilities
from sievit.stages.deploy.quantized_graph import describe, linear_layers, make_unsigned, name_nodes
from sievit.stages.vision.onnx_export import export

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@cache
def exported(kind: str, folder: Path) -> Path:
    path = folder / f"{kind.replace(' ', '-')}.onnx"
    export(swin() if kind == "swin" else variant(kind), path, 20)
    return path


def answers(model: onnx.ModelProto | Path, batch: int = 3) -> Array:
    """Exact sums of 8-bit products, whatever the processor has."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": images(batch, seed=5).numpy()})[0])


def count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


@pytest.mark.parametrize("kind", ["dense", "pruned distilled", "reduced", "lv-vit"])
def test_attention_as_one_operator_gives_the_answers_of_the_plain_graph(kind: str, folder: Path) -> None:
    path = exported(kind, folder)
    model = onnx.load(path)
    assert fuse_attention(model) == count(model, "MultiHeadAttention") == 3
    onnx.checker.check_model(model)
    np.testing.assert_allclose(answers(model), answers(path), atol=2e-5)
    assert count(model, "MatMul") == count(onnx.load(path), "MatMul") - 2 * 3


@pytest.mark.parametrize(("kind", "whole"), [("dense", 3), ("pruned distilled", 3), ("reduced", 1)])
def test_attention_with_its_projection_gives_the_answers_of_the_plain_graph(
    kind: str, whole: int, folder: Path
) -> None:
    """Uneven widths after a cut too. Blocks whose queries and keys also score tokens keep their projection."""
    path = exported(kind, folder)
    model = onnx.load(path)
    name_nodes(model)
    assert len(fuse_projection(model)) == count(model, "Attention") == whole
    onnx.checker.check_model(model)
    np.testing.assert_allclose(answers(model), answers(path), atol=2e-5)


@pytest.mark.slow
def test_attention_with_a_bias_is_left_alone(folder: Path) -> None:
    before = onnx.load(exported("swin", folder))
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert fuse_attention(after) == 0
    assert not fuse_projection(after)
    assert after == before


def test_layers_are_grouped_by_the_half_block_they_belong_to(folder: Path) -> None:
    model = onnx.load(exported("pruned distilled", folder))
    name_nodes(model)
    groups = [layer.group for layer in linear_layers(model)]
    halves = [f"blocks.{block}.{half}" for block in range(3) for half in ("attn", "attn", "mlp", "mlp")]
    assert groups[:12] == halves
    assert groups[12:] == ["head", "head_dist"]


class Made:
    """The forms of one file whose calibration images are normal noise in bytes."""

    def __init__(self, path: Path, folder: Path, bits: int = 8) -> None:
        self.pixels = pixels = folder / "pixels.npy"
        np.save(pixels, tiny_onnx.pictures(8, size=32))
        tiny_onnx.sidecar(path, classes=5, preprocessing=tiny_onnx.PREPROCESSING | {"size": 32})
        self.source = path
        self.workshop = Workshop(path, folder, bits, 300.0, ranges_on(pixels, path, folder, bits, 300.0))
        model = onnx.load(path)
        name_nodes(model)
        self.layers = linear_layers(model)

    def file(self, form: Form) -> onnx.ModelProto:
        made = self.workshop.make(form)
        assert made is not None
        return onnx.load(made)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(exported("pruned distilled", folder), tmp_path_factory.mktemp("forms"))


FORMS = [
    Form("static"),
    Form("static", alpha=0.5),
    Form("static", "fused"),
    Form("static", "fused", alpha=0.5),
    Form("dynamic"),
    Form("dynamic", "fused"),
    Form("dynamic", "whole"),
]


@pytest.mark.parametrize("form", FORMS, ids=Form.text)
def test_8_bit_forms_round_all_linear_layers_and_nothing_else(form: Form, made: Made) -> None:
    model = made.file(form)
    onnx.checker.check_model(model)
    graph = describe(model)
    assert graph["quantized_nodes"] == len(made.layers) == 3 * 4 + 2
    assert graph["weight_only_nodes"] == 0
    assert graph["astray"] == {}
    expected, found = answers(made.source), answers(model)
    assert not np.array_equal(found, expected)
    assert (found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum()) > 0.995


@pytest.mark.parametrize("form", [f for f in FORMS if f.attention == "plain"], ids=Form.text)
def test_attention_as_one_operator_changes_no_8_bit_answer(form: Form, made: Made) -> None:
    fused = made.file(Form(form.scheme, "fused", form.alpha))
    assert count(fused, "MultiHeadAttention") == 3
    # Not to the last digit: a value at the border between two steps may round to the other one.
    np.testing.assert_allclose(answers(fused), answers(made.file(form)), atol=0.02)


def test_unsigned_activations_give_the_very_answers_of_signed_ones(made: Made) -> None:
    """Both kinds of zero points, and weights, which stay signed. Exact sums, so that not a bit may differ."""
    signed = onnx.load(made.workshop._ranges(None))
    unsigned = onnx.ModelProto.FromString(signed.SerializeToString())
    assert make_unsigned(unsigned) == count(signed, "QuantizeLinear") > 0
    onnx.checker.check_model(unsigned, full_check=True)
    np.testing.assert_array_equal(answers(unsigned, 9), answers(signed, 9))
    kinds = Counter(tensor.data_type for tensor in unsigned.graph.initializer if tensor.name.endswith("_unsigned"))
    assert set(kinds) == {onnx.TensorProto.UINT8}
    assert [t for t in unsigned.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert make_unsigned(unsigned) == 0, "there is nothing left to change"


def test_a_symmetric_form_has_no_zero_points_and_stays_signed(made: Made, tmp_path: Path) -> None:
    """TensorRT takes no others."""
    path = record_ranges(made.source, tmp_path / "s.onnx", made.pixels, None, 8, 300.0, symmetric=True)
    model = onnx.load(path)
    before = model.SerializeToString()
    assert make_unsigned(model) == 0 and model.SerializeToString() == before
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = [constants[node.input[2]] for node in pairs if len(node.input) == 3]
    assert len(points) >= 2 * len(made.layers) and {point.dtype for point in points} == {np.dtype(np.int8)}
    assert not any(point.any() for point in points)
    assert describe(model)["quantized_nodes"] == len(made.layers)


@pytest.mark.parametrize("form", [f for f in FORMS if f.attention != "fused"], ids=Form.text)
def test_layers_that_are_made_float_again_compute_what_they_did(form: Form, made: Made) -> None:
    """All of them: the float file's answers. All but one: that layer alone is rounded, and its error is smaller than
    that of all.
    """
    names = frozenset(layer.node for layer in made.layers)
    nothing = made.file(Form(form.scheme, form.attention, form.alpha, names))
    assert describe(nothing)["quantized_nodes"] == 0
    np.testing.assert_allclose(answers(nothing), answers(made.source), atol=2e-5)
    one = made.file(Form(form.scheme, form.attention, form.alpha, names - {made.layers[4].node}))
    assert describe(one)["quantized_nodes"] == 1
    expected = answers(made.source)
    error = [np.abs(answers(model) - expected).mean() for model in (one, made.file(Form(form.scheme, form.attention)))]
    assert 0 < error[0] < error[1]


def test_weights_alone_take_a_quarter_of_the_size_and_hardly_move_the_answers(made: Made) -> None:
    model = made.file(Form("weights"))
    graph = describe(model)
    assert (graph["quantized_nodes"], graph["weight_only_nodes"], graph["astray"]) == (0, len(made.layers), {})
    stored = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    assert len(stored) == len(made.layers)
    assert not [
        t.name for t in model.graph.initializer if len(t.dims) == 2 and min(t.dims) > 16
    ]  # no float matrix left
    np.testing.assert_allclose(answers(model), answers(made.source), atol=0.02)


def test_seven_bits_of_weight_leave_the_eighth_unused(folder: Path, tmp_path: Path) -> None:
    seven = Made(exported("pruned distilled", folder), tmp_path, bits=7)
    for form in (Form("static"), Form("dynamic"), Form("dynamic", "whole")):
        eight = [
            t for t in seven.file(form).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
        ]
        assert len(eight) == len(seven.layers)
        assert max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in eight) <= 64


@pytest.mark.parametrize(
    ("flags", "bits"),
    [(["avx2", "fma"], 7), (["avx2", "avx512f", "avx512_vnni"], 8), (["asimd"], 8), (["avx_vnni", "avx2"], 8)],
)
def test_weights_take_seven_bits_where_sums_of_products_saturate(
    flags: Sequence[str], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bit, "instruction_sets", lambda: list(flags))
    assert weight_bits() == bits
    assert weight_bits("cuda") == weight_bits("tensorrt") == 8


def test_divergence_is_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(scale=4, size=(6, 10)).astype(np.float32) for _ in range(2))
    expected = entropy(softmax(first.astype(float), axis=1), softmax(second.astype(float), axis=1), axis=1)
    found = divergence(*(log_probabilities(one, "logits") for one in (first, second)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_divergence_is_the_same_of_a_file_that_ends_in_softmax() -> None:
    """Its answers are probabilities, stored as float32; one of them was rounded to 0."""
    rng = np.random.default_rng(0)
    logits = [rng.normal(scale=4, size=(6, 10)).astype(np.float32) for _ in range(2)]
    expected = divergence(*(log_probabilities(one, "logits") for one in logits))
    logarithms = [log_softmax(one.astype(float), axis=1).astype(np.float32) for one in logits]
    shares = [np.exp(one) for one in logarithms]
    found = divergence(*(log_probabilities(one, "log_probabilities") for one in logarithms))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    found = divergence(*(log_probabilities(one, "probabilities") for one in shares))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    shares[1][0, 3] = 0
    found = divergence(*(log_probabilities(one, "probabilities") for one in shares))
    assert np.isfinite(found).all() and found[0] > expected[0]


@pytest.mark.parametrize("needed", range(1, 8))
def test_bisection_leaves_as_few_blocks_float_as_a_slow_search(needed: int) -> None:
    costs = {f"b{index}": 1.0 - index / 10 for index in range(7)}
    slow = next((k for k in range(1, 8) if k >= needed), None)
    found = fewest(costs, lambda left: len(left) >= needed)
    assert found == list(costs)[:slow]


def test_nothing_is_left_float_where_that_would_not_help() -> None:
    assert fewest({"a": 1.0, "b": 0.5}, lambda left: False) is None


def test_blocks_are_ranked_by_mean_cost_over_the_images_that_time_allows() -> None:
    clock = iter(range(100))
    seen: list[tuple[int, int]] = []

    def cost(group: str, start: int, stop: int) -> NDArray[np.float64]:
        seen.append((start, stop))
        return np.arange(start, stop) * {"a": 1.0, "b": 3.0}[group]

    ranked = rank(["a", "b"], cost, 70, seconds=1.5, now=lambda: float(next(clock)))
    assert list(ranked) == ["b", "a"]
    assert set(seen) == {(0, 16), (16, 32)}  # the third few would begin after 1.5 s
    assert ranked["b"] == pytest.approx(3 * np.arange(32).mean())
