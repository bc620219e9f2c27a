"""ONNX Runtime sessions: pinned threads, no silent fall-back, and proof of which provider ran what.

A provider that does not start is dropped by ONNX Runtime with a line in its log, and the CPU runs. Here that is an
error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..methods import InvalidInput
from .isa import usable_cores

# name in pipeline.yaml -> (ONNX Runtime's name, those it hands over to, the distribution to install)
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", (), "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", ("CPUExecutionProvider",), "onnxruntime-gpu"),
    "tensorrt": (
        "TensorrtExecutionProvider",
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        "onnxruntime-gpu and tensorrt",
    ),
    "openvino": ("OpenVINOExecutionProvider", ("CPUExecutionProvider",), "onnxruntime-openvino"),
}
GRAPHICS = ("cuda", "tensorrt")

# Shape arithmetic stays on the CPU with every provider; these must not.
HEAVY = frozenset(
    {
        *(
            "MatMul",
            "Gemm",
            "FusedMatMul",
            "FusedGemm",
            "MatMulInteger",
            "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul",
        ),
        *("QLinearMatMul", "QGemm", "Conv", "FusedConv", "QLinearConv", "ConvInteger"),
        *("Attention", "QAttention", "MultiHeadAttention", "Softmax", "LayerNormalization", "SkipLayerNormalization"),
        *("Gelu", "BiasGelu", "FastGelu"),
    }
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which provider ran which operators, from ONNX Runtime's own profile of one call."""

    nodes: dict[str, int]  # provider -> operators run
    kernels: dict[str, int]  # operator after the runtime's fusions -> how often
    astray: dict[str, int] = field(default_factory=dict)  # heavy operators that another provider ran


def require_provider(name: str) -> str:
    """ONNX Runtime's name of a provider that is installed here. Raises InvalidInput that says what to install."""
    if name not in PROVIDERS:
        raise InvalidInput(f"provider {name!r} is not known", f"one of {', '.join(PROVIDERS)}")
    wanted, _, package = PROVIDERS[name]
    available = ort.get_available_providers()
    if wanted not in available:
        hint = f"pip install {package.replace(' and ', ' ')}"
        if package != "onnxruntime":
            hint = f"pip uninstall onnxruntime, then {hint} (one of the onnxruntime packages at a time)"
        raise InvalidInput(
            f"provider {name} is not in the installed onnxruntime {ort.__version__}, which has "
            + ", ".join(entry.removesuffix("ExecutionProvider") for entry in available),
            hint,
        )
    return wanted


def require_serving(providers: Sequence[str], threads: Sequence[int], fields: tuple[str, str] = ("", "")) -> None:
    """Refuse a provider that is not installed, and more threads than cores. Raises InvalidInput; fields: the settings
    that ask for them.
    """
    for name in providers:
        try:
            require_provider(name)
        except InvalidInput as error:
            error.field = fields[0]
            raise
    cores = len(usable_cores())
    for count in threads:
        if count > cores:
            raise InvalidInput(
                f"{count} threads were asked for, this process may use {cores} core{'s' * (cores != 1)}",
                f"ask for {cores} at most",
                field=fields[1],
            )


def open_session(
    path: Path,
    *,
    provider: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    cache: Path | None = None,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """A session that runs on `provider` or raises InvalidInput.

    threads: of one operator. shapes: input name -> shape that TensorRT builds its engine for; cache: folder for that
    engine. profile: prefix of a profile file, which `placement` reads.
    """
    wanted = require_provider(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Idle pool threads otherwise spin on for about 50 ms and slow whoever runs next 2.4 times.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if provider in GRAPHICS and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # CUDA and cuDNN from the nvidia wheels, when they are not on the library path
    os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)  # it would hand the session's settings to the model
    try:
        # enable_fallback=0: otherwise a failure prints to stdout and the session silently runs elsewhere.
        session = ort.InferenceSession(
            str(path),
            options,
            providers=_chain(provider, threads, shapes, cache),
            enable_fallback=0,
            read_config_from_model=0,  # a model must not set the threads of its own benchmark
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise InvalidInput(
            f"{path.name} does not load with provider {provider}: {_first_line(error)}",
            "export it again, or update onnxruntime"
            if provider == "cpu"
            else f"check the drivers and libraries that {provider} needs",
        ) from error
    if session.get_providers()[0] != wanted:
        raise InvalidInput(
            f"provider {provider} did not start: the session runs on "
            + ", ".join(entry.removesuffix("ExecutionProvider") for entry in session.get_providers()),
            f"check driver, CUDA and cuDNN versions against onnxruntime {ort.__version__} (its log is above)",
        )
    session.disable_fallback()
    return session


def placement(profile: Path, provider: str) -> Placement:
    """Read a profile file of at least one call. Raises InvalidInput when heavy operators ran on another provider."""
    nodes: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    astray: Counter[str] = Counter()
    wanted, _, _ = PROVIDERS[provider]
    # TensorRT hands what it cannot take to CUDA: still the card, but not what was asked for.
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        ran = event.get("args", {})
        nodes[str(ran.get("provider", "unknown"))] += 1
        kernels[str(ran.get("op_name", "unknown"))] += 1
        if ran.get("provider") != wanted and ran.get("op_name") in HEAVY:
            astray[str(ran.get("op_name"))] += 1
    if not nodes[wanted] or astray:
        told = ", ".join(f"{count} {name}" for name, count in sorted(astray.items())) or "all operators"
        raise InvalidInput(
            f"provider {provider} does not run this model: {told} ran on another provider ({dict(nodes)})",
            "export with another opset, or measure with another provider",
        )
    return Placement(dict(nodes), dict(kernels.most_common()), dict(astray))


def node_times(profile: Path) -> list[tuple[str, str, float]]:
    """Name, kind and milliseconds of every operator in a profile file of several calls, in order of execution: the
    lower quartile, since what others do to a call can only lengthen it.
    """
    taken: dict[tuple[int, str, str], list[int]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            ran = event["args"]
            node = int(ran["node_index"]), name.removesuffix("_kernel_time"), str(ran["op_name"])
            taken.setdefault(node, []).append(int(event["dur"]))
    return [
        (name, operator, sorted(durations)[len(durations) // 4] / 1e3)
        for (_, name, operator), durations in taken.items()
    ]


def _chain(
    provider: str, threads: int, shapes: Mapping[str, Sequence[int]] | None, cache: Path | None
) -> list[str | tuple[str, dict[str, Any]]]:
    wanted, others, _ = PROVIDERS[provider]
    options: dict[str, Any] = {}
    if provider == "openvino":
        options = {"device_type": "CPU", "num_of_threads": str(threads)}
    if provider == "tensorrt":
        if cache is not None:  # building takes minutes, and each session is a new process
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
            options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
        if shapes is not None:
            exact = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            options |= {f"trt_profile_{end}_shapes": exact for end in ("min", "opt", "max")}
    return [(wanted, options) if options else wanted, *others]


def _first_line(error: Exception) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
