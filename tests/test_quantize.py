"""INT8 is chosen only where it is as good and faster; what stays float stays float; equal input gives equal bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from test_benchmark import Folder, Listening

from sievit.pipeline.errors import SievitError
from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context, Part, Stage
from sievit.stages import forms, quantize, ranges
from sievit.stages.deploy import block_sensitivity, eight_bit
from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.child import ChildFailed
from sievit.stages.deploy.eight_bit import Form, Workshop
from sievit.stages.deploy.predict import Accuracy, accuracy, scores
from sievit.stages.deploy.preprocess import normalise
from sievit.stages.deploy.quantized_graph import describe, fold_scales, linear_layers, name_nodes
from sievit.stages.forms import Candidate, Forge
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.dataset import load_split

DATA = DataConfig(source="builtin:digits", image_size=8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = tmp_path_factory.mktemp("export")
    path = tiny_onnx.transformer(folder / "model.onnx", classes=10)
    tiny_onnx.sidecar(path, classes=10, parameters=17_000, macs=70_000)
    return Folder(folder, key="a" * 12, digest="b" * 64)


def context(
    tmp_path: Path, exported: Folder, name: str = "first", tickets: Folder | None = None, **config: Any
) -> Context:
    out, work = tmp_path / name / "out", tmp_path / name / "work"
    out.mkdir(parents=True)
    work.mkdir()
    inputs: dict[str, Any] = {"onnx": exported} | ({"tickets": tickets} if tickets else {})
    ctx = Context(
        config=quantize.QuantizeConfig(**({"calibration_images": 32, "seconds": 0.2} | config)),
        data=DATA,
        model=ModelConfig(),
        seed=0,
        device="cpu",
        arm="main",
        entry="quantize",
        base=tmp_path,
        out=out,
        work=work,
        inputs=inputs,
        many=(),
        references={},
        progress=Listening(),  # type: ignore[arg-type]
    )

    def part(stage: Stage, config: Any, *, role: str, model: object = None, reads: Sequence[str] = ()) -> Part:
        folder = work.with_name(role)
        made = not folder.exists()
        if made:
            folder.mkdir()
            given = {name: inputs[name] for name in reads if name in inputs}
            stage.run(replace(ctx, config=config, out=folder, inputs=given, metrics={}, ledger={}, figures=[]))
        return Part(Folder(folder), made)  # type: ignore[arg-type]

    ctx.part = part
    return ctx


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, exported: Folder) -> Context:
    """A run that takes INT8 whatever its speed."""
    ctx = context(tmp_path_factory.mktemp("chosen"), exported, max_drop=1.0, min_speedup=None)
    quantize.run(ctx)
    return ctx


def exactly(path: Path, batch: NDArray[np.generic]) -> NDArray[np.float32]:
    """The answers of the products as the file states them. Without VNNI, ONNX Runtime's default adds u8 x s8 in 16
    bits, where pairs saturate: the file's answers would be the host's.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": batch})[0])


def test_the_product_is_an_int8_bundle_that_plain_onnxruntime_runs(chosen: Context, exported: Folder) -> None:
    assert sorted(path.name for path in chosen.out.iterdir()) == ["model.json", "model.onnx"]
    made = open_bundle(chosen.out / "model.onnx")
    assert made.sidecar is not None
    assert made.sidecar.precision == "int8"
    assert made.sidecar.parameters == 17_000
    assert made.sidecar.source == {"stage": "export", "key": "a" * 12, "digest": "b" * 64}
    images = load_split(DATA.model_dump(), chosen.base, "calibration")
    theirs = scores(exported.file("model.onnx"), images.pixels())
    ours = exactly(made.path, normalise(images.pixels(), made.sidecar.preprocessing))
    cosine = (ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())
    assert cosine > 0.99
    assert not np.array_equal(ours, theirs)
    session = ort.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((3, 3, 8, 8), np.float32)})[0].shape == (3, 10)


def test_only_linear_layers_become_8_bit(chosen: Context, exported: Folder) -> None:
    """Two blocks of six products with weights, and the head; their weights are stored as int8."""
    before = open_bundle(exported.file("model.onnx")).nodes
    floats = chosen.metrics["float_nodes"]
    assert chosen.metrics["quantized_nodes"] == 2 * 6 + 1
    assert chosen.metrics["astray"] == {}
    for operator in ("Add", "LayerNormalization", "Softmax", "Gelu", "Conv", "ReduceMean"):
        assert floats[operator] >= before[operator]
    assert floats["MatMul"] == 2 * 2  # scores and mixing of two blocks
    model = onnx.load(chosen.out / "model.onnx")
    eight = [
        tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(eight) == 13
    assert chosen.metrics["bytes"]["int8"] < chosen.metrics["bytes"]["fp32"]


def test_top1_is_judged_on_the_calibration_split(chosen: Context, exported: Folder) -> None:
    images = load_split(DATA.model_dump(), chosen.base, "calibration")
    for name, path in (("fp32", exported.file("model.onnx")), ("int8", chosen.out / "model.onnx")):
        assert chosen.metrics["top1"][name] == accuracy(scores(path, images.pixels()), images.labels).top1
    assert chosen.metrics["drop"] == chosen.metrics["top1"]["fp32"] - chosen.metrics["top1"]["int8"]


def test_a_second_run_gives_the_same_bytes_quietly_and_never_opens_the_test_split(
    chosen: Context,
    exported: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    def remembering(data: Any, base: Path, split: Any) -> Any:
        asked.append(split)
        return load_split(data, base, split)

    monkeypatch.setattr("sievit.stages.vision.dataset.load_split", remembering)
    again = context(tmp_path, exported, max_drop=1.0, min_speedup=None)
    quantize.run(again)
    for name in ("model.onnx", "model.json"):
        assert (again.out / name).read_bytes() == (chosen.out / name).read_bytes()
    assert set(asked) == {"calibration"}
    assert capfd.readouterr() == ("", "")  # nncf's bars and lines stay in its own process


@pytest.mark.usefixtures("ready")
def test_float_is_kept_when_int8_is_not_faster_and_the_int8_file_stays_beside_it(
    exported: Folder, tmp_path: Path
) -> None:
    ctx = context(tmp_path, exported, max_drop=1.0, min_speedup=1000.0)
    quantize.run(ctx)
    assert ctx.metrics["chosen"] == "fp32"
    assert "more than 1000" in ctx.metrics["reason"]
    assert ctx.metrics["speedup"].keys() == {"ratio", "low", "high", "noise"}
    assert sorted(path.name for path in ctx.out.iterdir()) == ["int8.json", "int8.onnx", "model.json", "model.onnx"]
    for name in ("model.onnx", "model.json"):
        assert (ctx.out / name).read_bytes() == exported.file(name).read_bytes()
    sidecar = open_bundle(ctx.out / "int8.onnx").sidecar
    assert sidecar is not None
    assert sidecar.precision == "int8"
    assert any("float is kept" in note for note in ctx.progress.notes)  # type: ignore[attr-defined]


@pytest.fixture
def ready(chosen: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every INT8 file is the one of `chosen`, instead of another run of nncf."""

    def copied(workshop: Workshop, form: Form) -> Path | None:
        target = workshop._path(form)
        if form.attention != "plain":
            return None
        if form.scheme is not None:
            shutil.copyfile(chosen.out / "model.onnx", target)
        return target

    monkeypatch.setattr(Workshop, "make", copied)


@pytest.mark.usefixtures("ready")
def test_a_resumed_run_keeps_the_decision_that_was_taken(exported: Folder, tmp_path: Path) -> None:
    ctx = context(tmp_path, exported, max_drop=1.0, schemes=("static",), fuse_attention=False)
    speed = {"ratio": 0.5, "low": 0.4, "high": 0.6, "noise": 1.01}
    decision = {"chosen": None, "reason": "it was slower before the kill", "speeds": {"static": speed}}
    (ctx.work / "decision.json").write_text(json.dumps(decision))
    quantize.run(ctx)
    assert (ctx.metrics["chosen"], ctx.metrics["reason"]) == ("fp32", "it was slower before the kill")
    assert ctx.metrics["speedup"] == speed
    assert (ctx.out / "model.onnx").read_bytes() == exported.file("model.onnx").read_bytes()


def spoil(monkeypatch: pytest.MonkeyPatch, good: Callable[[Form], bool]) -> list[str]:
    """Let files of forms that are not `good` lose 90 points; the forms that are judged are in the answer."""
    judged: list[str] = []
    real = Forge._judged

    def judge(forge: Forge, path: Path, form: Form, left: tuple[str, ...]) -> Candidate:
        judged.append(form.text())
        top1 = forge.before.top1 if good(form) else forge.before.top1 - 0.9
        return replace(real(forge, path, form, left), accuracy=Accuracy(0, 10, top1, 0.0, 1.0))

    monkeypatch.setattr(Forge, "_judged", judge)
    return judged


@pytest.mark.usefixtures("ready")
def test_float_is_kept_when_int8_loses_too_much_and_smoothing_was_tried(
    exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = spoil(monkeypatch, lambda form: False)
    ctx = context(tmp_path, exported, schemes=("static",), revert_seconds=0.0, fuse_attention=False)
    quantize.run(ctx)
    assert judged == ["static", "static, SmoothQuant 0.5"]
    assert ctx.metrics["chosen"] == "fp32"
    assert ctx.metrics["reason"] == "INT8 loses 90.0 points of top-1 on the calibration split, 1.0 are allowed"
    assert ctx.metrics["speedup"] is None


@pytest.mark.usefixtures("ready")
def test_float_is_kept_when_more_than_linear_layers_became_8_bit(
    exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = {"quantized_nodes": 13, "float_nodes": {}, "astray": {"Add": 4}}
    real = Forge._judged
    monkeypatch.setattr(Forge, "_judged", lambda *arguments: replace(real(*arguments), graph=graph))
    ctx = context(tmp_path, exported, max_drop=1.0, min_speedup=None, schemes=("static",))
    quantize.run(ctx)
    assert (ctx.metrics["chosen"], ctx.metrics["reason"]) == (
        "fp32",
        "more than linear layers became 8-bit (4 Add)",
    )


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_the_half_block_that_spoils_the_answers_stays_float_and_it_alone(
    scheme: str, exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is good if one layer computes in float, which bisection over the ranked layers has to find."""
    model = onnx.load(exported.file("model.onnx"))
    name_nodes(model)
    groups = {layer.node: layer.group for layer in linear_layers(model)}
    guilty = "fc2_1_product"
    culprits = {node for node, group in groups.items() if group == guilty}
    assert culprits
    spoil(monkeypatch, lambda form: culprits <= form.kept_float)
    monkeypatch.setattr(
        block_sensitivity, "rank", lambda names, *_: dict.fromkeys(dict.fromkeys([guilty, *names]), 0.0)
    )
    ctx = context(tmp_path, exported, schemes=(scheme,), smooth_quant="off", min_speedup=None)
    quantize.run(ctx)
    assert ctx.metrics["chosen"] == "int8"
    assert ctx.metrics["left_float"] == [guilty]
    assert ctx.metrics["quantized_nodes"] == len(groups) - len(culprits)
    assert ctx.metrics["sensitivity"][scheme].keys() == set(groups.values())
    float_weights = {t.name for t in onnx.load(ctx.out / "model.onnx").graph.initializer if len(t.dims) == 2}
    kept = {name for node in model.graph.node if node.name in culprits for name in node.input}
    assert len(kept & float_weights) == len(culprits)


@pytest.mark.usefixtures("ready")
def test_a_resumed_search_leaves_float_what_was_ranked_before_the_kill(
    exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search has so many seconds, and what a second look would rank first need not be what the first one did."""
    model = onnx.load(exported.file("model.onnx"))
    name_nodes(model)
    groups = list(dict.fromkeys(layer.group for layer in linear_layers(model)))
    first = groups[len(groups) // 2]
    culprits = {layer.node for layer in linear_layers(model) if layer.group == first}
    spoil(monkeypatch, lambda form: culprits <= form.kept_float)
    ranked: list[object] = []
    monkeypatch.setattr(block_sensitivity, "rank", lambda *_: ranked.append(_) or dict.fromkeys(groups, 0.0))
    ctx = context(tmp_path, exported, schemes=("static",), smooth_quant="off", min_speedup=None)
    costs = dict.fromkeys([first, *groups], 0.25)
    (ctx.work / "sensitivity-static.json").write_text(json.dumps(costs))
    quantize.run(ctx)
    assert ctx.metrics["left_float"] == [first]
    assert ctx.metrics["sensitivity"]["static"] == costs
    assert not ranked


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("ratios", "product"),
    [
        ({"static": 1.2, "dynamic": 1.4, "half": 1.1}, "dynamic"),
        ({"static": 1.4, "dynamic": 1.2, "half": 1.1}, "static"),
        ({"static": 1.2, "dynamic": 1.1, "half": 1.3}, "half"),
        ({"static": 1.02, "dynamic": 0.9, "half": 0.5}, "float"),  # 1.03 is noise
    ],
)
def test_the_fastest_good_form_is_the_product_if_it_is_beyond_the_noise(
    ratios: dict[str, float], product: str, exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Folder(tmp_path / "export")
    beside.root.mkdir()
    for name, precision in (("model", "fp32"), ("fp16", "fp16")):
        shutil.copyfile(exported.file("model.onnx"), beside.file(f"{name}.onnx"))
        tiny_onnx.sidecar(beside.file(f"{name}.onnx"), classes=10, precision=precision)
    asked: list[str] = []

    def speeds(ctx: Context, config: Any, source: Any, candidates: list[Candidate]) -> dict[str, quantize.Speed]:
        asked.extend(made.form.text() for made in candidates)
        return {name: quantize.Speed(ratios[name], ratios[name] - 0.01, ratios[name] + 0.01, 1.03) for name in asked}

    monkeypatch.setattr(quantize, "_speeds", speeds)
    ctx = context(tmp_path, beside, max_drop=1.0)
    quantize.run(ctx)
    assert sorted(asked) == sorted(ratios)
    assert ctx.metrics["product"] == product
    assert [row["form"] for row in ctx.metrics["forms"] if row["chosen"]] == [product][: product != "float"]
    sidecar = open_bundle(ctx.out / "model.onnx").sidecar
    assert sidecar is not None
    assert sidecar.precision == {"half": "fp16", "float": "fp32"}.get(product, "int8")
    assert (ctx.out / "int8.onnx").is_file() == (product in ("half", "float"))


FUSED = "float, attention fused"


@pytest.mark.parametrize(
    ("dynamic", "fused", "product"),
    [(1.4, 1.2, "dynamic"), (1.1, 1.4, FUSED), (0.9, 1.4, FUSED), (0.9, 1.0, None)],
)
def test_float_with_attention_as_one_operator_competes_with_int8(
    dynamic: float, fused: float, product: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, graph = Accuracy(93, 100, 0.93, 0.9, 0.95), {"astray": {}, "quantized_nodes": 4, "weight_only_nodes": 0}
    ratios = {"dynamic": dynamic, FUSED: fused}
    speeds = {name: quantize.Speed(ratio, ratio - 0.01, ratio + 0.01, 1.03) for name, ratio in ratios.items()}
    monkeypatch.setattr(quantize, "_speeds", lambda *_: speeds)
    made = [Candidate(Path(), form, graph, accuracy) for form in (Form("dynamic"), Form(None, "fused"))]
    given: Any = None
    config = quantize.QuantizeConfig(schemes=("dynamic",))
    chosen, reason, _ = quantize._decide(given, config, given, made[:1], made, accuracy)
    assert (chosen.form.text() if chosen else None) == product
    assert f"INT8 (dynamic) is {dynamic:.2f} times as fast" in reason
    assert (f"attention as one operator is {fused:.2f} times" in reason) == (product == FUSED)


def test_what_is_not_shown_to_be_faster_does_not_stand_before_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = Accuracy(9, 10, 0.9, 0.8, 1.0)
    graph = {"astray": {}, "quantized_nodes": 3, "weight_only_nodes": 0}
    vague, sure = (Candidate(Path("x"), Form(scheme), graph, accuracy) for scheme in ("dynamic", "static"))
    speeds = {"dynamic": quantize.Speed(1.50, 0.95, 2.30, 1.05), "static": quantize.Speed(1.48, 1.44, 1.52, 1.05)}
    monkeypatch.setattr(quantize, "_speeds", lambda *_: speeds)

    def decided(*candidates: Candidate) -> tuple[Candidate | None, str]:
        made = list(candidates)
        return quantize._decide(None, quantize.QuantizeConfig(), None, made, made, accuracy)[:2]  # type: ignore[arg-type]

    best, reason = decided(sure, vague)
    assert best is sure and reason == "INT8 (static) is 1.48 times as fast as float here (1.44 to 1.52)"
    best, reason = decided(vague)
    assert best is None and "more than 1 and beyond the noise of 5.0 % is asked" in reason
    other = Candidate(Path("x"), Form("static", "fused"), graph, accuracy)
    assert decided(sure, other)[0] is sure, "a form that the provider does not run has no speed"
    monkeypatch.setattr(quantize, "_speeds", lambda *_: {})
    assert decided(sure) == (None, "cpu runs none of the forms")


def test_a_loss_of_just_what_is_allowed_is_allowed() -> None:
    """0.93 - 0.92 is more than 0.01 to a computer."""
    graph = {"astray": {}, "quantized_nodes": 4, "weight_only_nodes": 0}
    config = quantize.QuantizeConfig(max_drop=0.01)
    for images in (100, 300, 450):
        for correct in range(images // 2, images):
            before, after = (Accuracy(n, images, n / images, 0.0, 1.0) for n in (correct, correct - images // 100))
            told = forms.reason_against(config, before, Candidate(Path(), Form("static"), graph, after))
            assert told is None, (images, correct)
            worse = replace(after, correct=correct - images // 100 - 1, top1=(correct - images // 100 - 1) / images)
            assert forms.reason_against(config, before, Candidate(Path(), Form("static"), graph, worse)) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schemes": ("static", "static")}, "static stands there twice"),
        ({"schemes": ("weights",)}, "makes a file smaller and not faster"),
        ({"schemes": ("static", "weights"), "min_speedup": None}, "name it alone"),
        ({"schemes": ("dynamic",), "provider": "cuda"}, "dynamic is for provider: cpu"),
    ],
)
def test_schemes_that_cannot_give_what_is_asked_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize.QuantizeConfig(**fields)


def test_calibration_takes_ticket_examples_only_and_all_classes_alike(exported: Folder, tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), [100, 50, 10, 2])
    members = np.arange(0, 162, 2)
    chosen = ranges.balanced(labels, members, 20, seed=3)
    assert np.isin(chosen, members).all()
    assert len(np.unique(chosen)) == 20
    assert np.bincount(labels[chosen]).tolist() == [7, 7, 5, 1]
    np.testing.assert_array_equal(chosen, ranges.balanced(labels, members[::-1], 20, seed=3))
    assert len(ranges.balanced(labels, members, 1000, seed=3)) == len(members)

    tickets = Folder(tmp_path / "tickets")
    tickets.root.mkdir()
    kept = np.array([1, 5, 9, 700])
    np.save(tickets.file("kept.npy"), kept)
    ctx = context(tmp_path, exported, tickets=tickets)
    pixels, origin = ranges.calibration_images(ctx, ctx.config.calibration_images)
    assert origin == "ticket examples"
    np.testing.assert_array_equal(pixels, load_split(DATA.model_dump(), tmp_path, "train").pixels(kept))
    np.save(tickets.file("kept.npy"), np.array([1, 10**6]))
    with pytest.raises(InvalidInput, match="do not belong to this training split"):
        ranges.calibration_images(ctx, ctx.config.calibration_images)


def test_ranges_are_recorded_once_for_every_quantize_of_a_file_that_asks_alike(
    exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    real = eight_bit.record_ranges

    def counted(source: Path, target: Path, pixels: Path, alpha: float | None, *more: Any, **named: Any) -> Path:
        recorded.append((alpha, len(np.load(pixels))))
        return real(source, target, pixels, alpha, *more, **named)

    monkeypatch.setattr(eight_bit, "record_ranges", counted)
    asked: dict[str, Any] = {"schemes": ("static",), "min_speedup": None, "smooth_quant": "off", "revert_seconds": 0}
    first, again = (
        context(tmp_path, exported, name, max_drop=drop, **asked) for name, drop in (("a", 1.0), ("b", 0.9))
    )
    again.part = first.part  # one store
    for ctx in (first, again):
        quantize.run(ctx)
    assert recorded == [(None, 32)]
    assert again.metrics["forms"] == first.metrics["forms"]


def test_a_quantized_residual_is_noticed() -> None:
    """The oracle is a graph written by hand: a linear layer as it should be, an addition that reads 8-bit numbers."""
    scale, zero = numpy_helper.from_array(np.float32(1), "s"), numpy_helper.from_array(np.int8(0), "z")
    weight = numpy_helper.from_array(np.zeros((4, 4), np.int8), "w")

    def pair(x: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{x}_q"], name=f"{x}_q"),
            helper.make_node("DequantizeLinear", [f"{x}_q", "s", "z"], [f"{x}_dq"], name=f"{x}_dq"),
        ]

    nodes = [
        *pair("x"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["w_dq"], name="w_dq"),
        helper.make_node("Transpose", ["x_dq"], ["turned"], name="turned"),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"], name="y"),
        helper.make_node("Add", ["y", "x"], ["sum"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [scale, zero, weight])
    model = helper.make_model(graph)
    assert describe(model) == {
        "quantized_nodes": 1,
        "weight_only_nodes": 0,
        "float_nodes": {"Transpose": 1, "Add": 1},
        "astray": {},
    }
    graph.node[-1].input[1] = "turned"
    assert describe(helper.make_model(graph))["astray"] == {"Add": 1}


def test_folding_a_scale_into_a_norm_changes_no_output(tmp_path: Path) -> None:
    """One norm may take its scale; the other is read elsewhere too and must not."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("LayerNormalization", ["input", "g1", "b1"], ["n1"], axis=-1),
        helper.make_node("Mul", ["n1", "s1"], ["m1"]),
        helper.make_node("LayerNormalization", ["m1", "g2", "b2"], ["n2"], axis=-1),
        helper.make_node("Mul", ["n2", "s2"], ["m2"]),
        helper.make_node("Add", ["m2", "n2"], ["logits"]),
    ]
    constants = [constant(f"{name}{index}", 8) for name in "gb" for index in (1, 2)]
    constants += [constant("s1", 1, 1, 8), constant("s2", 1, 1, 8)]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, constants, ["b", 3, 8, 8], ["b", 3, 8, 8])
    inputs = {"input": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    before = ort.InferenceSession(str(path)).run(None, inputs)[0]
    model = onnx.load(path)
    assert fold_scales(model) == 1
    after = ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    assert [node.op_type for node in model.graph.node].count("Mul") == 1
    assert "s1" not in [tensor.name for tensor in model.graph.initializer]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_an_int8_file_is_not_quantized_again(chosen: Context, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is int8 already, and quantize starts from fp32"):
        quantize.run(context(tmp_path, Folder(chosen.out)))


def test_a_graph_that_nncf_cannot_take_gives_its_own_message(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    weight = numpy_helper.from_array(np.zeros((192, 10), np.float32), "w")
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [weight], ["batch", 3, 8, 8], ["batch", 10], opset=9)
    tiny_onnx.sidecar(path, classes=10)
    with pytest.raises(SievitError) as error:
        quantize.run(context(tmp_path, Folder(tmp_path), schemes=("static",)))
    assert "quantizer: static failed" in error.value.message
    assert "opset version < 10" in error.value.message


def unknown_to_the_runtime(path: Path) -> Path:
    """A valid file whose product is of a type that ONNX Runtime does not multiply on a CPU."""
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [192, 10], np.zeros(1920))
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["rounded"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["rounded", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=TensorProto.FLOAT),
    ]
    return tiny_onnx.save(path, nodes, [weight], ["batch", 3, 8, 8], ["batch", 10])


@pytest.mark.parametrize("fault", ["no file", "no runtime"])
def test_a_scheme_that_fails_is_left_out_with_its_reason_and_the_others_are_tried(
    exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def make(workshop: Workshop, form: Form) -> Path | None:
        if form.scheme != "static":
            return real(workshop, form)
        if fault == "no file":
            raise ChildFailed("quantizer: static failed: it fell over")
        return unknown_to_the_runtime(workshop._path(form))

    real = Workshop.make
    monkeypatch.setattr(Workshop, "make", make)
    asked: dict[str, Any] = {"max_drop": 1.0, "min_speedup": None}
    ctx = context(tmp_path, exported, **asked)
    quantize.run(ctx)
    assert ctx.metrics["product"] == "dynamic" and [row["form"] for row in ctx.metrics["forms"]] == ["dynamic"]
    (told,) = ctx.progress.warnings  # type: ignore[attr-defined]
    assert told.startswith("static is left out: ")
    why = "it fell over" if fault == "no file" else "does not load with provider cpu"
    assert why in told
    with pytest.raises(SievitError, match=why):
        quantize.run(context(tmp_path, exported, name="alone", **asked, schemes=("static",)))


@pytest.mark.slow
def test_ranges_are_those_of_the_images_whatever_batch_the_file_takes(
    chosen: Context, exported: Folder, tmp_path: Path
) -> None:
    """One that takes four images at once is shown each image four times; its speed is judged in fours too."""
    four = tmp_path / "four"
    four.mkdir()
    model = onnx.load(exported.file("model.onnx"))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, four / "model.onnx")
    tiny_onnx.sidecar(four / "model.onnx", classes=10)
    asked: dict[str, Any] = {"schemes": ("static",), "fuse_attention": False, "max_drop": 1.0, "seconds": 0.05}
    ctx = context(tmp_path, Folder(four), **asked)
    quantize.run(ctx)
    expected, found = (
        {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in onnx.load(one.work.with_name("ranges") / ranges.FILE).graph.initializer
        }
        for one in (chosen, ctx)
    )
    assert found.keys() == expected.keys() and any("scale" in name for name in expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)
    assert ctx.metrics["speedup"] is not None
    assert "speed is judged in batches of 4: the file takes no others" in ctx.progress.notes  # type: ignore[attr-defined]


def test_answers_of_a_file_of_fixed_batch_are_not_those_of_the_company_an_image_is_in(tmp_path: Path) -> None:
    """With 8-bit ranges of each call, four images at once would share one range."""
    path = tiny_onnx.linear(tmp_path / "model.onnx", classes=10, batch=4)
    with Workshop(path, tmp_path, 8, 300.0, lambda alpha: path) as workshop:
        made = workshop.make(Form("dynamic"))
    assert made is not None
    tiny_onnx.sidecar(made, classes=10)
    pixels = tiny_onnx.pictures(6)
    pixels[1] //= 8  # of a small range of its own
    alone = np.concatenate([scores(made, pixels[index : index + 1]) for index in range(6)])
    np.testing.assert_array_equal(scores(made, pixels), alone)
