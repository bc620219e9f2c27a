"""The export stage as a whole: what it writes, what it tells, and what its gate lets through."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from test_benchmark import Folder, Listening
from tiny_vision import network

from sievit.pipeline.errors import GateError
from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import export
from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.predict import scores
from sievit.stages.vision.dataset import load_split
from sievit.stages.vision.preprocessing import Preprocessing
from sievit.stages.vision.vit import drops_for
from sievit.stages.vision.weights import save_network

DATA = DataConfig(source="builtin:digits", image_size=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A network that drops tokens, as a file of pixels with a half-precision twin."""
    folder = tmp_path_factory.mktemp("export")
    net: Any = network(classes=10, depth=2)
    net = net.with_tokens(drops_for(net.architecture, (0,), 0.6))
    save_network(net, folder)
    images = load_split(DATA.model_dump(), folder, "calibration")
    Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), images.classes).save(folder)
    (folder / "out").mkdir()
    ctx = Context(
        config=export.ExportConfig(input="pixels", half=True, images=40),
        data=DATA,
        model=ModelConfig(),
        seed=0,
        device="cpu",
        arm="main",
        entry="export",
        base=folder,
        out=folder / "out",
        work=folder,
        inputs={"model": Folder(folder, kind_of_stage="finetune")},  # type: ignore[dict-item]
        many=(),
        references={},
        progress=Listening(),  # type: ignore[arg-type]
    )
    export.run(ctx)
    return ctx


def test_both_files_take_pixels_and_have_sidecars_of_one_preprocessing(finished: Context) -> None:
    written = sorted(path.name for path in finished.out.iterdir())
    assert written == ["fp16.json", "fp16.onnx", "model.json", "model.onnx"]
    product, half = (open_bundle(finished.out / f"{stem}.onnx") for stem in ("model", "fp16"))
    assert product.sidecar is not None and half.sidecar is not None
    assert product.signature.text() == half.signature.text() == "pixels uint8 [N,32,32,3] -> logits [N,10]"
    assert (product.sidecar.precision, half.sidecar.precision) == ("fp32", "fp16")
    digests = {product.sidecar.preprocessing.sha256, half.sidecar.preprocessing.sha256}
    assert digests == {finished.metrics["preprocessing_sha256"]}
    assert product.sidecar.preprocessing.mean == (0.5, 0.4, 0.3)
    assert product.sidecar.source["stage"] == "finetune"


def test_the_metrics_tell_parity_kept_sets_weights_and_the_twin(finished: Context) -> None:
    told = finished.metrics
    assert told["parity"]["max_abs"] < 1e-5 and told["parity"]["images"] == 40
    assert told["parity"]["kept_sets"] == {"blocks": 1, "equal": 1.0, "agreement": 1.0, "tied": 0, "wrong": 0}
    assert told["parameters_in_file"] == told["parameters"]
    assert told["half"]["written"] and told["half"]["largest"] < 100
    assert told["half"]["bytes"] < 0.75 * told["bytes"]
    progress: Any = finished.progress
    assert progress.steps == progress.total and not progress.warnings


def test_onnxruntime_alone_answers_from_raw_pictures(finished: Context) -> None:
    images = load_split(DATA.model_dump(), finished.base, "test").pixels()[:20]
    for stem, within in (("model", 1e-5), ("fp16", 1e-2)):
        session = ort.InferenceSession(finished.out / f"{stem}.onnx", providers=["CPUExecutionProvider"])
        (alone,) = session.run(None, {"pixels": images})
        np.testing.assert_allclose(alone, scores(finished.out / "model.onnx", images), atol=within)


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "another logit": ({"max_abs": 2e-3}, "logits differ by up to 2.00e-03"),
    "a number that is none": ({"max_abs": float("nan")}, "logits differ by up to nan"),
    "another class": ({"top1_agreement": 0.9}, "the class agrees on 90.00% of 40 images"),
    "another token": ({"kept_sets": {"wrong": 3}}, "keeps other tokens than the network on 3 of 40 images"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_the_gate_holds_back_a_file_that_is_not_its_network(finished: Context, case: str) -> None:
    changed, message = SPOILED[case]
    compared = deepcopy(finished.metrics["parity"])
    export._check_parity(finished.config, compared)
    with pytest.raises(GateError, match=message):
        export._check_parity(finished.config, compared | changed)


def test_ties_pass_the_gate(finished: Context) -> None:
    tied = {"kept_sets": {"blocks": 1, "equal": 0.9, "agreement": 1.0, "tied": 4, "wrong": 0}}
    export._check_parity(finished.config, finished.metrics["parity"] | tied)
