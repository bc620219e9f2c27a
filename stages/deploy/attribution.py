"""Where the milliseconds of a file go: its operators by kind, and by the block and module they were made of.

The file says which node belongs to which module: an exporter may say it of the node itself (its scopes), and names
weights as the network did ("blocks.0.attn.qkv.bias"). The scopes come first: equal tensors, such as the norms of a
fresh network, are stored once, under one block's name, and a tensor that several nodes read tells nothing. The runtime
fuses nodes and names some anew, so that an operator without a module belongs to the one that ran before it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from .comparison import Quiet
from .latency import Plan, Progress, Setting
from .node_times import NodeTime, node_times
from .variants import Variant, distinct

ATTRIBUTED_ON = "operators are told apart on the provider cpu alone"
PRODUCTS, ATTENTION, OTHER = "matrix products", "attention", "other"
KINDS = {  # operators of ONNX and of the runtime's own
    PRODUCTS: "MatMul Gemm FusedMatMul FusedGemm MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul MatMulNBits "
    "QLinearMatMul QGemm Conv FusedConv QLinearConv ConvInteger Einsum",
    ATTENTION: "Attention QAttention MultiHeadAttention Softmax QLinearSoftmax",
    "normalisation": "LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization BatchNormalization "
    "InstanceNormalization GroupNormalization",
    "activation": "Gelu BiasGelu FastGelu QuickGelu Erf Relu Sigmoid HardSigmoid HardSwish Tanh",
    "quantizing": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "moving": "Reshape Transpose Concat Split Slice Gather GatherElements GatherND ScatterElements Expand Squeeze "
    "Unsqueeze Flatten Cast Identity Shape Tile Pad ReorderInput ReorderOutput",
    "elementwise": "Add Sub Mul Div Pow Sqrt Neg QLinearAdd QLinearMul ReduceMean ReduceSum Where",
    OTHER: "",
}
KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators.split()}
OPERANDS = {"QLinearMatMul": (0, 3)}  # of a product; elsewhere the first two inputs
PASSING = frozenset({"Cast", "Mul", "Add", "Reshape", "QuantizeLinear", "DequantizeLinear"})  # from product to bias
BLOCK = (
    re.compile(r"(.*?\bblocks?\.\d+)(?:\.|$)"),
    re.compile(r"(.*?\b(?:layers?|resblocks)\.\d+)(?:\.|$)"),
    re.compile(r"(.*?\bencoder_layer_\d+)(?:\.|$)"),
)
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class Origins:
    """What a file says of its nodes. modules: node or its output -> its module, where its scopes or a weight's name
    tell it.

    mixing: products of two activations, which are attention.
    """

    modules: Mapping[str, str]
    mixing: frozenset[str]


@dataclass(frozen=True, slots=True)
class Attribution:
    """Milliseconds of one call, three times cut up; each adds up to `total_ms`.

    kinds: by kind of operator. modules: by the child of a block, or of the network ("blocks.0.attn", "patch_embed").
    blocks: "embedding", each block, "head"; {} where no weight has the name of a block.
    """

    kinds: Mapping[str, float]
    modules: Mapping[str, float]
    blocks: Mapping[str, float]
    total_ms: float

    def as_json(self) -> dict[str, Any]:
        return {
            "kinds": dict(self.kinds),
            "modules": dict(self.modules),
            "blocks": dict(self.blocks),
            "operators_ms": self.total_ms,
        }


def attributed(
    variants: Sequence[Variant],
    settings: Sequence[Setting],
    rows: Sequence[dict[str, Any]],
    plan: Plan,
    progress: Progress | None,
) -> dict[str, Any]:
    """What takes the time of each file in the first setting on the CPU, by kind, block and module; the first file is
    the baseline. `unsaid` where no setting is.
    """
    setting = next((setting for setting in settings if setting.provider == "cpu"), None)
    if setting is None:
        return {"unsaid": ATTRIBUTED_ON}
    chosen = distinct(variants)
    subjects = [variant.subject(setting.batch) for variant in chosen]
    seconds = min(1.5, plan.seconds)
    taken = node_times(
        subjects, setting, progress or Quiet(), seconds=seconds, seed=plan.seed, timeout_s=plan.timeout_s
    )
    at = {"provider": setting.provider, "batch": setting.batch, "threads": setting.threads}
    p50 = {row["sha256"]: row["p50_ms"] for row in rows if at.items() <= row.items()}
    return {
        **at,
        "files": [
            variant.short()
            | attribute(nodes, origins(variant.bundle.path)).as_json()
            | {"p50_ms": p50[variant.bundle.sha256]}
            for variant, nodes in zip(chosen, taken, strict=True)
        ],
    }


def origins(path: Path) -> Origins:
    """Read from the file's graph; weights beside it stay there."""
    graph = onnx.load(path, load_external_data=False).graph
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    # constant tensor -> module or ""
    owner = {one.name: _module(one.name) if len(readers[one.name]) < 2 else "" for one in graph.initializer}
    for node in graph.node:
        if node.input and all(name in owner for name in node.input if name):
            owner |= dict.fromkeys(node.output, _owned(node, owner))
    found: dict[str, str] = {}
    mixing: set[str] = set()
    for node in graph.node:
        owned, module = _owned(node, owner), _scope(node)
        if KIND_OF.get(node.op_type) == PRODUCTS and not owned:
            first, second = OPERANDS.get(node.op_type, (0, 1))
            if node.input[first] not in owner and node.input[second] not in owner:
                mixing.add(node.name)
            else:
                owned = _of_bias(node, owner, readers)
        if module := module or owned:
            found |= dict.fromkeys((node.name, *node.output), module)
    return Origins(found, frozenset(mixing))


def attribute(nodes: Sequence[NodeTime], file: Origins) -> Attribution:
    """Operators in order of execution, added up."""
    places = _places([file.modules.get(_known(node.name, file.modules)) for node in nodes])
    kinds = [_kind(node, file.mixing) for node in nodes]
    blocks = _blocks([block_of(place) for place in places])
    of_kind, taken = dict.fromkeys(KINDS, 0.0) | _added_up(kinds, nodes), sum(node.ms for node in nodes)
    return Attribution(
        {kind: ms for kind, ms in of_kind.items() if ms},
        _added_up([_child(place) for place in places], nodes),
        _added_up(blocks, nodes) if blocks else {},
        taken,
    )


def block_of(module: str) -> str:
    """The block that a module is or lies in: "blocks.0" of "blocks.0.attn.qkv"; "" outside of blocks."""
    return next((found[1] for pattern in BLOCK if (found := pattern.match(module))), "")


def _scope(node: onnx.NodeProto) -> str:
    """The module that the exporter says a node was made of: "blocks.0.attn.qkv" of the scopes
    "['', 'blocks', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.qkv', 'linear_1']" (torch.export), or of the name
    "/blocks/blocks.0/attn/qkv/MatMul" (TorchScript). "" where it says none.
    """
    told = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    if told:
        modules = re.findall(r"'([\w.]*)'", told)[:-1]  # the last is the operation itself
        return modules[-1].removeprefix("body.") if modules and not modules[-1].startswith("_") else ""
    inside: list[str] = []
    for part in node.name.split("/")[1:-1] if node.name.startswith("/") else ():
        if inside and part.rpartition(".")[0] == inside[-1]:  # a Sequential, then its child by both names
            inside.pop()
        inside.append(part)
    return ".".join(inside).removeprefix("body.")


def _module(weight: str) -> str:
    """ "blocks.0.attn.qkv" of "body.blocks.0.attn.qkv.bias"; "" of names that an exporter made up."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", weight):
        return ""
    return weight.removeprefix("body.").rpartition(".")[0]


def _owned(node: onnx.NodeProto, owner: Mapping[str, str]) -> str:
    return next((module for name in node.input if (module := owner.get(name, ""))), "")


def _of_bias(node: onnx.NodeProto, owner: Mapping[str, str], readers: Mapping[str, Sequence[onnx.NodeProto]]) -> str:
    """Of a product whose weight was stored anew (transposed, quantized): the module of the bias that is added next."""
    for _ in range(6):
        after = readers.get(node.output[0], ())
        if len(after) != 1 or after[0].op_type not in PASSING:
            return ""
        node = after[0]
        if module := _owned(node, owner):
            return module
    return ""


def _known(name: str, names: Container[str]) -> str:
    """The node of the file that an operator was made of: "node_matmul" of "node_matmul/MatMulScaleFusion/"; or ""."""
    name = name.removesuffix("_nchwc")  # a convolution is named after its output
    while name and name not in names:
        name = name.rstrip("/").rpartition("/")[0]
    return name


def _kind(node: NodeTime, mixing: Container[str]) -> str:
    found = KIND_OF.get(node.operator, OTHER)
    return ATTENTION if found == PRODUCTS and _known(node.name, mixing) else found


def _places(modules: Sequence[str | None]) -> list[str]:
    places, last = [], ""
    for module in modules:
        last = last if module is None else module
        places.append(last)
    return places


def _blocks(found: Sequence[str]) -> list[str]:
    """What lies in no block is embedding before the first one, head after the last; [] without a block."""
    inside = [place for place, block in enumerate(found) if block]
    if not inside:
        return []
    outside = ["embedding" if n < inside[0] else "head" if n > inside[-1] else "between" for n in range(len(found))]
    return [block or other for block, other in zip(found, outside, strict=True)]


def _child(module: str) -> str:
    block = block_of(module)
    rest = module.removeprefix(block).strip(".").partition(".")[0]
    return ".".join(part for part in (block, rest) if part) or OTHER


def _added_up(names: Sequence[str], nodes: Sequence[NodeTime]) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, node in zip(names, nodes, strict=True):
        total[name] = total.get(name, 0.0) + node.ms
    return total
