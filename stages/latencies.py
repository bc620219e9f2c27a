"""What the blocks of a network take on this host, by their widths, and which multiples of widths its runtime rewards.

No pipeline file names this stage. Where `prune` weighs milliseconds, it asks for the table of its network; whoever asks
for the same network, batch and threads on the same host shares it.

A few networks whose blocks have all different widths are exported with random weights and run in ONNX Runtime, each in
a process of its own, interleaved, with every operator's time written down (deploy/node_times.py). Operators are summed
by block and half. Rates fitted to them (methods/block_latency.py) tell what any other width takes.

writes   table.json: shape and milliseconds of every block, the rest of every network, both sweeps of widths
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sievit.pipeline.stage import Config, Context, Stage

from .vision.notes import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .deploy.node_times import NodeTime
    from .methods.block_latency import BlockLatency
    from .methods.cost import BlockWidths
    from .methods.greedy_allocation import Cost
    from .vision.architecture import Architecture, SwinArchitecture

    Record = Architecture | SwinArchitecture

OPSET = 20
LEAST = 8  # 8-bit kernels pack widths by so many, whatever the float ones are content with
LEAST_IN_HEADS = 4


class TableConfig(Config):
    """What a table is about."""

    architecture: dict[str, Any] = Field(description="the record of the network, as architecture.json has it")
    batch: int = Field(ge=1, description="images at once")
    threads: int = Field(ge=1, description="threads of one operator")


@dataclass(frozen=True)
class Table:
    """The fitted table. round_to, head_round_to: the multiples that are rewarded."""

    rates: BlockLatency
    round_to: int
    head_round_to: int

    def ms(self, architecture: Record) -> float:
        """Estimate for a whole network."""
        from .vision.block_shapes import shapes, surroundings

        return self.rates.total_ms(shapes(architecture), surroundings(architecture))

    def outside_ms(self, architecture: Record) -> float:
        """Of all that is in no block."""
        from .vision.block_shapes import surroundings

        return self.rates.outside_ms(surroundings(architecture))

    def budget(self, architecture: Record) -> list[dict[str, float]]:
        """Milliseconds of both halves of every block."""
        from .vision.block_shapes import shapes

        return [
            {"block": number, "attention_ms": self.rates.attention_ms(s), "mlp_ms": self.rates.mlp_ms(s)}
            for number, s in enumerate(shapes(architecture))
        ]

    def milliseconds(self, before: Record) -> Cost:
        """The same for an allocation that narrows this network."""
        from .methods.greedy_allocation import Cost
        from .vision.block_shapes import shapes

        dense = shapes(before)

        @cache
        def outside(streams: tuple[int, ...]) -> float:
            return self.outside_ms(before.cut(before.blocks, streams))

        def block(number: int, widths: BlockWidths, channels: int) -> float:
            own = {"heads": widths.heads, "qk": widths.qk, "v": widths.v, "mlp": widths.mlp}
            return self.rates.block_ms(replace(dense[number], embed=channels, **own))

        return Cost(block, lambda streams: outside(tuple(streams)))


def table(ctx: Context, architecture: Record, batch: int, threads: int) -> Table:
    """Of this network on this host: from the store, or measured."""
    from .methods.block_latency import BlockShape, Surroundings, TimedBlock, TimedSurroundings, fit, rewarded_multiple

    record = json.loads(json.dumps(architecture.as_json()))
    made = ctx.part(STAGE, TableConfig(architecture=record, batch=batch, threads=threads), role="latencies")
    found = json.loads(made.artifact.file("table.json").read_text(encoding="utf-8"))
    blocks = [TimedBlock(BlockShape(**row["shape"]), row["attention_ms"], row["mlp_ms"]) for row in found["blocks"]]
    outside = [TimedSurroundings(Surroundings(**row["work"]), row["ms"]) for row in found["outside"]]
    sweeps = {axis: {int(width): ms for width, ms in rows.items()} for axis, rows in found["sweeps"].items()}
    return Table(
        fit(blocks, outside),
        rewarded_multiple(sweeps["mlp"], LEAST),
        rewarded_multiple(sweeps["heads"], LEAST_IN_HEADS),
    )


def run(ctx: Context) -> None:
    """Export the probes, time their operators, sum them by block and half."""
    from .deploy.latency import Setting, Subject
    from .deploy.node_times import node_times
    from .vision.architecture import load_architecture
    from .vision.block_shapes import probes, shapes, surroundings

    config: TableConfig = ctx.config
    record = ctx.work / "architecture.json"
    record.write_text(json.dumps(config.architecture), encoding="utf-8")
    dense = load_architecture(record)
    networks = probes(dense)
    subjects, origins = [], []
    with ctx.progress.task("exporting blocks to time", len(networks)) as task:
        for number, network in enumerate(networks):
            path = ctx.work / f"probe-{number}.onnx"
            origins.append(_exported(network, path))
            side = network.image_size
            subjects.append(Subject(f"probe {number}", path, "input", "float32", (3, side, side)))
            task.advance()
    setting = Setting("cpu", config.threads, config.batch, "host")
    blocks: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for network, origin, nodes in zip(networks, origins, node_times(subjects, setting, ctx.progress), strict=True):
        halves, rest = _by_half(nodes, origin, len(network.blocks))
        for shape, (attention, mlp) in zip(shapes(network), halves, strict=True):
            blocks.append({"shape": asdict(shape), "attention_ms": attention, "mlp_ms": mlp})
        outside.append({"work": asdict(surroundings(network)), "ms": rest})
    found = {"blocks": blocks, "outside": outside, "sweeps": _sweeps(dense, blocks)}
    (ctx.out / "table.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    ctx.metrics |= {"blocks": len(blocks), "files": len(networks)}


def _exported(network: Record, path: Path) -> dict[str, tuple[int, bool] | None]:
    """Write the file unless it is there; node -> block and half."""
    from .vision.block_shapes import half_of
    from .vision.coupling import block_names
    from .vision.network import rebuild
    from .vision.onnx_export import export_shape

    beside = path.with_suffix(".json")
    if not beside.is_file():
        modules = export_shape(network, path, OPSET)
        write_whole(beside, modules)
    modules = json.loads(beside.read_text(encoding="utf-8"))
    blocks = {name: number for number, name in enumerate(block_names(rebuild(network, device="meta")))}
    return {node: half_of(module, blocks) for node, module in modules.items()}


def _by_half(
    nodes: Sequence[NodeTime], origin: Mapping[str, tuple[int, bool] | None], depth: int
) -> tuple[list[tuple[float, float]], float]:
    """Milliseconds of attention and MLP of every block, and of all else. An operator that the runtime has named anew,
    or that stands between modules, belongs to the one before it.
    """
    halves = [[0.0, 0.0] for _ in range(depth)]
    rest, place = 0.0, None
    for node in nodes:
        place = origin.get(node.name.partition("/")[0], place)
        if place is None:
            rest += node.ms
        else:
            halves[place[0]][place[1]] += node.ms
    return [(attention, mlp) for attention, mlp in halves], rest


def _sweeps(dense: Record, blocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Milliseconds by width, where nothing else differs from the dense network's blocks of the commonest kind."""
    from collections import Counter

    from .methods.block_latency import BlockShape
    from .vision.block_shapes import shapes

    own = shapes(dense)
    common, _ = Counter(shape.kind for shape in own).most_common(1)[0]
    model = next(shape for shape in own if shape.kind == common)
    mlp: dict[int, list[float]] = {}
    heads: dict[int, list[float]] = {}
    for row in blocks:
        shape = BlockShape(**row["shape"])
        if (shape.kind, shape.embed) != (common, model.embed):
            continue
        mlp.setdefault(shape.mlp, []).append(row["mlp_ms"])
        if shape.heads == model.heads and shape.qk == shape.v:
            heads.setdefault(shape.qk, []).append(row["attention_ms"])
    return {
        "mlp": {width: min(ms) for width, ms in mlp.items()},
        "heads": {width: min(ms) for width, ms in heads.items()},
    }


STAGE = Stage(
    name="latencies",
    version=1,
    config=TableConfig,
    run=run,
    reads=(),
    writes="measurement",
    manual=__doc__,
    packages=("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
    uses=frozenset({"host"}),
)
