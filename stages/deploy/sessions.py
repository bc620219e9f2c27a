"""ONNX Runtime sessions: pinned threads, no silent fall-back, and proof of which provider ran what.

A provider that does not start is dropped by ONNX Runtime with a line in its log, and the CPU runs. Here that is an
error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..methods import InvalidInput
from .isa import usable_cores

# name in pipeline.yaml -> (ONNX Runtime's name, those it hands over to, the distributions to install)
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", (), ("onnxruntime",)),
    "cuda": ("CUDAExecutionProvider", ("CPUExecutionProvider",), ("onnxruntime-gpu[cuda,cudnn]",)),
    "tensorrt": (
        "TensorrtExecutionProvider",
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        ("onnxruntime-gpu[cuda,cudnn]", "tensorrt-cu13>=10,<11"),
    ),
    "openvino": ("OpenVINOExecutionProvider", ("CPUExecutionProvider",), ("onnxruntime-openvino",)),
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
        *("QLinearMatMul", "QGemm", "Conv", "FusedConv", "QLinearConv", "ConvInteger", "MatMulNBits", "Einsum"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
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
    wanted, _, _ = PROVIDERS[name]
    available = ort.get_available_providers()
    if wanted not in available:
        raise InvalidInput(
            f"provider {name} is not in the installed onnxruntime {ort.__version__}, which has "
            + ", ".join(entry.removesuffix("ExecutionProvider") for entry in available),
            how_to_install(name),
        )
    return wanted


def how_to_install(name: str) -> str:
    """What to type for a provider that is not there."""
    _, _, packages = PROVIDERS[name]
    command = f"pip install {shlex.join(packages)}"
    if name == "cpu":
        return command
    return f"pip uninstall onnxruntime, then {command} (one of the onnxruntime packages at a time)"


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

    threads: of one operator. shapes: input name -> shape that TensorRT builds its engine for; cache: folder for the
    engines of many files and shapes. profile: prefix of a profile file, which `placement` reads.
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
    os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)  # it would hand the session's settings to the model
    heard: list[str] = []
    try:
        with _listening(heard) if provider != "cpu" else contextlib.nullcontext():
            _preload(provider)
            # enable_fallback=0: otherwise a failure prints to stdout and the session silently runs elsewhere.
            session = ort.InferenceSession(
                str(path),
                options,
                providers=_chain(provider, path, threads, shapes, cache),
                enable_fallback=0,
                read_config_from_model=0,  # a model must not set the threads of its own benchmark
            )
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if provider == "cpu":
            told, hint = _first_line(str(error)) or type(error).__name__, "export it again, or update onnxruntime"
        else:
            told, hint = _why(heard, str(error)), f"check the drivers and libraries that {provider} needs"
        raise InvalidInput(f"{path.name} does not load with provider {provider}: {told}", hint) from error
    if session.get_providers()[0] != wanted:
        elsewhere = ", ".join(entry.removesuffix("ExecutionProvider") for entry in session.get_providers())
        raise InvalidInput(
            f"provider {provider} did not start ({_why(heard)}); the session would run on {elsewhere}",
            f"check the driver and the libraries that onnxruntime {ort.__version__} needs for {provider}",
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


def _preload(provider: str) -> None:
    """Libraries from wheels, which are not on the library path."""
    if provider in GRAPHICS and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # CUDA and cuDNN, from the nvidia wheels
    if provider == "tensorrt":
        with contextlib.suppress(ImportError):  # the library may also come from the system
            importlib.import_module("tensorrt")


@contextlib.contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """What native code writes to stderr meanwhile goes into `heard`, and to stderr: ONNX Runtime says there, and
    nowhere else, why a provider does not start.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            text = file.read().decode(errors="replace")
            sys.stderr.write(text)
            heard += [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]


def _why(heard: Sequence[str], said: str = "") -> str:
    """Why a provider does not start: the libraries that were not found, else what it said first."""
    missing = re.findall(r"([\w.+-]+\.so[\w.]*): cannot open shared object file", "\n".join([*heard, said]))
    if missing:
        return f"not found: {', '.join(dict.fromkeys(missing))}"
    told = _first_line("\n".join([said, *(line for line in heard if "onnxruntime" in line.lower())]))
    return re.sub(r"^\S*onnxruntime_src\S* ", "", told) or "it does not say why"


def _chain(
    provider: str, path: Path, threads: int, shapes: Mapping[str, Sequence[int]] | None, cache: Path | None
) -> list[str | tuple[str, dict[str, Any]]]:
    wanted, others, _ = PROVIDERS[provider]
    options: dict[str, Any] = {}
    if provider == "openvino":
        options = {"device_type": "CPU", "num_of_threads": str(threads)}
    if provider == "tensorrt":
        options = _precisions(path)
        if cache is not None:  # building takes minutes, and each session is a new process
            # An engine's own name tells neither weights nor shapes: files of one architecture would share one.
            name = sha256(f"{path.absolute()} {path.stat().st_mtime_ns} {shapes}".encode()).hexdigest()[:16]
            engines = cache / name
            engines.mkdir(parents=True, exist_ok=True)
            options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(engines)}
            options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(cache)}
        if shapes is not None:
            exact = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            options |= {f"trt_profile_{end}_shapes": exact for end in ("min", "opt", "max")}
    return [(wanted, options) if options else wanted, *others]


def _precisions(path: Path) -> dict[str, str]:
    """What TensorRT must be allowed to compute in, by what the file holds: it takes 8-bit pairs and half precision only
    where these are switched on. onnx is imported here, in a process whose memory is the card's.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        found["trt_int8_enable"] = "True"
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer):
        found["trt_fp16_enable"] = "True"
    return found


def _first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")
