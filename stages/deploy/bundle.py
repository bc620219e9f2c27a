"""The deployable bundle, an ONNX file and its sidecar: writing it, and refusing files that are not what they say.

An ONNX file may come from anywhere. Before ONNX Runtime sees it: size, protobuf, weights kept in files beside it (no
way out of the folder by "..", an absolute path, a link), operator domains, opsets, signature. Wrong elsewhere:
CVE-2024-27318, CVE-2024-5187, CVE-2026-27489, CVE-2026-34445.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..methods import InvalidInput
from .attention_fusion import reads
from .sidecar import SCHEMA, Scores, Sidecar, parse_preprocessing, read_sidecar, sha256_of, sidecar_path
from .signature import Signature, check_agreement, signature_of

# Operators of other domains would need a custom library, which runs code of its own when it is loaded.
OPSETS = {
    "": (7, onnx.defs.onnx_opset_version()),
    "ai.onnx": (7, onnx.defs.onnx_opset_version()),
    "ai.onnx.ml": (1, 5),
    "com.microsoft": (1, 1),
}
# A ViT has some thousands; functions that call functions can state 2 ** 40 in a few hundred bytes.
MOST_OPERATORS = 200_000
DEEPEST_CALL = 50
PACKED = {name: bits for bits in (2, 4) for name in (f"INT{bits}", f"UINT{bits}", f"FLOAT{bits}E2M1")}  # bits a number
# What shows that a file is an 8-bit one.
QUANTIZED = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QAttention"}
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError)
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked ONNX file; `sidecar` is None for a file that came without one."""

    path: Path
    signature: Signature
    opset: int
    nodes: Mapping[str, int]
    sha256: str
    parameters: int  # numbers in the initializers
    precision: str  # "int8", "fp16" or "fp32": by its operators and weights; a sidecar knows better
    weights: tuple[str, ...]  # the files beside it that hold weights of it
    sidecar: Sidecar | None

    @property
    def bytes(self) -> int:
        """On disk, with the weights beside it."""
        return _on_disk(self.path, self.weights)


def open_bundle(path: Path, *, sidecar_required: bool = True, output: str | None = None) -> Bundle:
    """Check an ONNX file and the sidecar beside it. Raises InvalidInput; nothing of the model runs.

    output: of several, the one that holds the scores; None: the first.
    """
    model = load_checked(path)
    digest = sha256_of(path)
    sidecar = None
    if sidecar_required or sidecar_path(path).is_file():
        sidecar = read_sidecar(path)
    signature = signature_of(model, path, output)
    if sidecar is not None:
        check_agreement(signature, sidecar, path)
    return Bundle(
        path=path,
        signature=signature,
        opset=_opset(model),
        nodes=_count(model.graph),
        sha256=digest,
        parameters=sum(_size(tensor) for tensor in model.graph.initializer),
        precision=_precision(model, signature),
        weights=_beside(model),
        sidecar=sidecar,
    )


def write_sidecar(
    onnx_path: Path,
    *,
    preprocessing: Mapping[str, Any],
    classes: Sequence[str],
    precision: str,
    parameters: int,
    macs: int | None,
    source: Mapping[str, Any],
    scores: Scores | None = None,
) -> Path:
    """Write the sidecar of a finished ONNX file and return its path. The same arguments give the same bytes.

    preprocessing: {"resize", "size", "crop", "crop_pct", "scale", "mean", "std"}; the file's names, opset and digest
    are read from it. macs: None where they are not known. scores: what the output holds; None: as its last operator
    tells. Raises InvalidInput when file and arguments disagree.
    """
    model = load_checked(onnx_path)
    signature = signature_of(model, onnx_path)
    parsed = parse_preprocessing(dict(preprocessing), f"{onnx_path.name}: preprocessing")
    content = {
        "schema": SCHEMA,
        "input": signature.input,
        "output": signature.output,
        "layout": signature.layout,
        "dtype": signature.dtype,
        "scores": scores or signature.scores,
        "image_size": parsed.size,
        "channels": len(parsed.mean),
        "preprocessing": parsed.as_json(),
        "preprocessing_sha256": parsed.sha256,
        "classes": [str(name) for name in classes],
        "precision": precision,
        "parameters": int(parameters),
        "macs": macs,
        "opset": _opset(model),
        "sha256": sha256_of(onnx_path),
        "source": dict(source),
    }
    path = sidecar_path(onnx_path)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    check_agreement(signature, read_sidecar(onnx_path, check_digest=False), onnx_path)
    return path


def count_nodes(onnx_path: Path) -> dict[str, int]:
    """How often each operator stands in the graph, sub-graphs included, most frequent first."""
    return _count(load_checked(onnx_path).graph)


def weight_files(path: Path) -> tuple[str, ...]:
    """The files beside an ONNX file that hold its weights, as it names them, each once, in order of name."""
    return _beside(load_checked(path))


def bytes_of(path: Path) -> int:
    """Bytes of an ONNX file on disk, with the weights beside it."""
    return _on_disk(path, weight_files(path))


def load_checked(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file after the checks named above; weights beside it are not loaded. Its operators are in order,
    whatever their order in the file. Raises InvalidInput.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InvalidInput(f"{path} {what}", "give the path of an .onnx file")
    if path.stat().st_size == 0:
        raise InvalidInput(f"{path} is empty", "export it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        hint = "give an .onnx file; if it is one, it was cut short or damaged: copy it again"
        raise InvalidInput(f"{path} is not an ONNX file: {_first_line(error)}", hint) from None
    _check_opsets(model, path)
    _check_calls(model, path)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    return _valid(model, path)


def _valid(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model, its operators in the order in which they run. ONNX Runtime takes them in any, and its own converter to
    half precision writes them so.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        return model
    except INVALID as error:
        told = _first_line(error)
    if not _beside(model):  # the checker looks for weights beside a file, and what is put in order is none yet
        with contextlib.suppress(*INVALID):
            ordered = _in_order(model)
            onnx.checker.check_model(ordered, full_check=True)
            return ordered
    hint = "export it again"
    if _beside(model) and "topologically sorted" in told:
        hint = "save it with its weights inside: what stands out of order is then put in order here"
    raise InvalidInput(f"{path} is not a valid ONNX model: {told}", hint)


def _in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes stand behind those that they read of, sub-graphs too; what may stay in its place does. Raises
    CycleError, a ValueError, where there is no such order.
    """
    ordered = onnx.ModelProto()
    ordered.CopyFrom(model)
    for graph in _below(ordered.graph):
        nodes = list(graph.node)
        maker = {name: place for place, node in enumerate(nodes) for name in node.output if name}
        sorter = TopologicalSorter({
            place: {maker[name] for name in reads(node) if name in maker} for place, node in enumerate(nodes)
        })  # fmt: skip
        sorter.prepare()
        ready: list[int] = []
        del graph.node[:]
        while sorter.is_active():
            for place in sorter.get_ready():
                heappush(ready, place)
            first = heappop(ready)
            graph.node.append(nodes[first])
            sorter.done(first)
    return ordered


def _check_opsets(model: onnx.ModelProto, path: Path) -> None:
    imported = {entry.domain: entry.version for entry in model.opset_import}
    if not imported or not model.graph.node:
        raise InvalidInput(f"{path} is not an ONNX model: it has no operators", "export it again")
    used = {node.domain for graph in _graphs(model) for node in graph.node}
    local = {function.domain for function in model.functions}
    for domain in sorted(used - local):
        if domain not in OPSETS:
            raise InvalidInput(
                f"{path} uses operators of the domain {domain!r}",
                f"allowed: ai.onnx, {', '.join(sorted(name for name in OPSETS if '.' in name and name != 'ai.onnx'))}",
            )
    for domain, version in sorted(imported.items()):
        low, high = OPSETS.get(domain, (version, version))
        if domain in used and not low <= version <= high:
            raise InvalidInput(
                f"{path} uses opset {version} of {domain or 'ai.onnx'}; {low} to {high} are known here",
                "export it with another opset, or update onnx and onnxruntime",
            )


def _check_calls(model: onnx.ModelProto, path: Path) -> None:
    """Refuse functions that expand to more operators than can be looked at."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    known: dict[tuple[str, str], int] = {}

    def operators(body: onnx.GraphProto | onnx.FunctionProto, depth: int) -> int:
        total = 0
        for node in (node for graph in _below(body) for node in graph.node):
            called = node.domain, node.op_type
            if called in bodies and called not in known:
                if depth == DEEPEST_CALL:
                    raise _too_many(path, f"functions that call each other more than {DEEPEST_CALL} deep")
                known[called] = operators(bodies[called], depth + 1)
            total += known.get(called, 1)
        return total

    if operators(model.graph, 0) > MOST_OPERATORS:
        raise _too_many(path, f"functions that expand to more than {MOST_OPERATORS:,} operators")


def _too_many(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"{path} has {what}", "export it without functions of its own")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Weights outside of the .onnx file: a plain file of the same folder, linked from nowhere else, large enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):  # readers differ in which they take
        raise _escape(tensor, path, "an attribute that stands there twice")
    if unknown := set(entries) - EXTERNAL_KEYS:
        raise _escape(tensor, path, f"an unknown attribute {sorted(unknown)[0]!r}")
    location = entries.get("location", "")
    # ONNX Runtime marks addresses in memory with locations that begin like this one.
    if not location or "\0" in location or "_ORT_MEM_ADDR_" in location or "\\" in location:
        raise _escape(tensor, path, f"the location {location!r}")
    relative = Path(location)
    if relative.is_absolute() or ".." in relative.parts:
        raise _escape(tensor, path, f"the location {location!r}")
    target = path.parent
    for part in relative.parts:
        target = target / part
        if target.is_symlink():
            raise _escape(tensor, path, f"a symbolic link {location!r}")
    if not target.is_file():
        raise InvalidInput(f"{path}: weights file {location!r} is missing beside it", "copy both files together")
    status = target.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise _escape(tensor, path, f"a file with several names (hard link) {location!r}")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    except ValueError:
        raise _escape(tensor, path, "an offset or length that is no number") from None
    if offset < 0 or length < 0 or offset + length > status.st_size:
        raise _escape(tensor, path, f"bytes {offset}+{length} of a file of {status.st_size}")
    try:
        needed = _bytes(tensor)
    except (KeyError, ValueError):
        raise _escape(tensor, path, f"a type {tensor.data_type} that is not known") from None
    if offset + needed > status.st_size or ("length" in entries and length != needed):
        raise _escape(tensor, path, f"{length or status.st_size - offset} bytes, where its shape takes {needed}")


def _escape(tensor: onnx.TensorProto, path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        f"{path}: tensor {tensor.name!r} keeps its weights in {what}, which is refused",
        "weights must stand in the .onnx file or in a plain file in the same folder",
    )


def _bytes(tensor: onnx.TensorProto) -> int:
    """What its numbers take in a file."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    bits = PACKED.get(name) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-_size(tensor) * bits // 8)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, those for training, their sub-graphs, and the model's own functions."""
    training = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    yield from _below(model.graph, *training, *model.functions)


def _below(*graphs: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """These and their sub-graphs."""
    waiting = list(graphs)
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)


def _beside(model: onnx.ModelProto) -> tuple[str, ...]:
    found = {
        entry.value
        for tensor in _tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(found))


def _on_disk(path: Path, beside: Sequence[str]) -> int:
    return sum((path.parent / name).stat().st_size for name in (path.name, *beside))


def _precision(model: onnx.ModelProto, signature: Signature) -> str:
    """What a file computes in. Its input does not say it: raw pixels go in, or floats that the file rounds first."""
    if QUANTIZED & {node.op_type for graph in _below(model.graph) for node in graph.node}:
        return "int8"
    numbers: Counter[int] = Counter()
    for tensor in model.graph.initializer:
        numbers[tensor.data_type] += _size(tensor)
    half = numbers[onnx.TensorProto.FLOAT16] > numbers[onnx.TensorProto.FLOAT]
    return "fp16" if half or signature.dtype == "float16" else "fp32"


def _opset(model: onnx.ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _count(graph: onnx.GraphProto) -> dict[str, int]:
    counts: Counter[str] = Counter()
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            counts[node.op_type] += 1
            waiting.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dimension in tensor.dims:
        size *= dimension
    return size


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
