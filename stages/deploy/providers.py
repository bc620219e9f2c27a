"""ONNX Runtime's execution providers as pipeline.yaml names them; imports nothing, so that settings can."""

from __future__ import annotations

from typing import Literal

Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]
