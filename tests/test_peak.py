"""What the host can do at most, and a row's share of it: arithmetic and the product itself, never a clock."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_benchmark import Listening

from sievit.stages.deploy import peak as module
from sievit.stages.deploy.latency import Plan, Setting
from sievit.stages.deploy.peak import Peak, gflops, kind_of, peak, product, share

HOST = Setting("cpu", 1, 8, "host")


@pytest.mark.parametrize("kind", ["float", "half", "int8"])
def test_the_timed_product_is_one_whole_matrix_product(kind: module.Kind) -> None:
    """As many multiply-adds as are counted: checked against numpy, for two images at once too."""
    model = product(kind, side=16)
    onnx.checker.check_model(model, full_check=True)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    rng = np.random.default_rng(1)
    given = rng.integers(256, size=(2, 1, 16, 16), dtype=np.uint8)
    inputs = given.astype({"float": np.float32, "half": np.float16, "int8": np.uint8}[kind])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input": inputs})
    assert weight.shape == (16, 16)
    exact = inputs.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(answer, exact, rtol=1e-4, atol=1.0 if kind == "half" else 1e-3)  # sums of up to 1,000


def test_a_multiply_add_is_two_operations_and_a_batch_does_its_images_work() -> None:
    assert gflops(10**9, 1, 1000.0) == 2.0  # a billion of them in a second
    assert gflops(10**9, 8, 1000.0) == 16.0
    assert gflops(1024**3, 1, 2.147483648) == pytest.approx(1000.0)


def test_a_row_is_compared_with_the_product_of_its_kind_threads_and_provider() -> None:
    peaks = [Peak("cpu", 1, "float", 100.0), Peak("cpu", 2, "float", 200.0), Peak("cpu", 1, "int8", 400.0)]
    row = {"macs": 10**9, "batch": 1, "p50_ms": 100.0, "provider": "cpu", "threads": 1, "variant": "fp32"}
    assert share(row, peaks) == {"gflops": 20.0, "peak_share": 0.2}
    assert share(row | {"variant": "fp16"}, peaks)["peak_share"] == 0.2
    assert share(row | {"variant": "int8"}, peaks)["peak_share"] == 0.05
    assert share(row | {"threads": 2}, peaks)["peak_share"] == 0.1
    assert share(row | {"provider": "cuda"}, peaks) == {"gflops": 20.0, "peak_share": None}
    assert share(row | {"macs": None}, peaks) == {"gflops": None, "peak_share": None}
    assert kind_of("int8") == "int8" and kind_of("fp16") == kind_of("fp32") == kind_of("fp32", "cuda") == "float"
    peaks = [Peak("cuda", 1, "float", 100.0), Peak("cuda", 1, "half", 800.0)]
    assert share(row | {"provider": "cuda"}, peaks)["peak_share"] == 0.2
    assert share(row | {"provider": "cuda", "variant": "fp16"}, peaks)["peak_share"] == 0.025


def test_a_peak_is_measured_one_image_at_a_time_whatever_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", 64)
    progress = Listening()
    found = peak("int8", HOST, Plan(seconds=0.05, warm_up_s=0.05), progress)
    assert (found.provider, found.threads, found.kind) == ("cpu", 1, "int8")
    assert found.gflops > 0 and progress.steps == progress.total == 1
