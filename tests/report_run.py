"""A made-up but lifelike run for the tests of the report: three arms, their manifests and pictures, in a folder.

The numbers are those of no experiment; they are chosen so that every part of the report has something to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPEC_TEXT = """\
name: digits
seed: 0
data:  {source: "builtin:digits", image_size: 32}
model: {name: deit_tiny_patch16_224, args: {patch_size: 4, embed_dim: 96, depth: 6, num_heads: 3}}
stages:
  ticket:    {examples: {method: el2n, keep: 0.8}, patches: {method: attention, keep: 0.7}}
  train:     {epochs: 20, weights: {method: group_lasso, strength: 1.0e-4}}
  prune:     {importance: taylor, target: {macs: 0.5}}
  finetune:  {epochs: 8, distill: {teacher: train}}
  export:    {opset: 20}
  quantize:  {max_drop: 0.01}
  benchmark: {providers: [cpu], batch_sizes: [1, 8], threads: [1]}
arms:
  dense:  {ticket: {examples: {keep: 1.0}, patches: {keep: 1.0}}, prune: null, quantize: null}
  random: {ticket: {examples: {method: random}, patches: {method: random}}}
gates:   {accuracy_drop: 0.01, speedup: 2.0}
"""

RUN = "5e1f0a9c3b7d"


@dataclass(frozen=True)
class Stored:
    """An artifact as the report sees it."""

    root: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Shelf:
    """A store that only finds."""

    root: Path

    def find(self, stage: str, key: str) -> Stored | None:
        path = self.root / stage / key / "manifest.json"
        return Stored(path.parent, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


class Bench:
    """Puts artifacts into a folder and nodes into a record."""

    def __init__(self, root: Path) -> None:
        self.shelf = Shelf(root)
        self.nodes: list[dict[str, Any]] = []
        self.versions: dict[str, int] = {}

    def add(
        self, arm: str, stage: str, metrics: dict[str, Any], *, entry: str = "", state: str = "done", **fields: Any
    ) -> str:
        """Write one artifact and its node; returns the reference. `pictures` are (file, title, caption, svg), `payload`
        the other files by their names.
        """
        entry = entry or stage
        self.versions[stage] = self.versions.get(stage, 0) + 1
        key = f"{len(self.nodes) + 1:02x}{stage.encode().hex()}{'0' * 12}"[:12]
        ref = f"{stage}@{self.versions[stage]}"
        folder = self.shelf.root / stage / key
        (folder / "figures").mkdir(parents=True)
        figures = []
        for file, title, caption, svg in fields.pop("pictures", ()):
            (folder / "figures" / file).write_text(svg, encoding="utf-8")
            figures.append({"file": f"figures/{file}", "title": title, "caption": caption})
        for name, data in fields.pop("payload", {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        manifest = {
            "schema": 1,
            "stage": stage,
            "key": key,
            "version": self.versions[stage],
            "metrics": metrics,
            "ledger": {},
            "inputs": {},
            "notes": [],
            "figures": figures,
            "seed": 0,
            "device": "cpu",
            "data": {"source": "builtin:digits", "image_size": 32, "classes": list("0123456789")},
            "model": {"name": "deit_tiny_patch16_224"},
            "libraries": {"sievit": "0.1.0", "torch": "2.15.0", "onnxruntime": "1.31.0"},
            "git": {"commit": "4be1c07", "dirty": False},
            "command": "sievit run pipeline.yaml --store artifacts",
            "seconds": 12.5,
            **fields,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        self.node(arm, stage, entry=entry, state=state, ref=ref, key=key, seconds=float(manifest["seconds"]))
        return ref

    def share(self, arm: str, ref: str) -> None:
        """The arm uses an artifact that another arm has made."""
        node = next(node for node in self.nodes if node["ref"] == ref)
        self.nodes.append({**node, "arm": arm, "state": "cached", "seconds": 0.0})

    def node(self, arm: str, stage: str, *, entry: str = "", **fields: Any) -> None:
        empty = {"state": "waiting", "ref": None, "key": None, "seconds": 0.0, "finished": None, "error": None}
        self.nodes.append({"arm": arm, "entry": entry or stage, "stage": stage, **empty, **fields})

    def record(self, state: str = "complete", **fields: Any) -> dict[str, Any]:
        return {
            "schema": 1,
            "id": RUN,
            "pipeline": "digits",
            "path": "pipeline.yaml",
            "started": "2026-11-21T06:10:04.120+00:00",
            "finished": "2026-11-21T06:15:31.004+00:00",
            "state": state,
            "nodes": self.nodes,
            "gates": {},
            "spec": {"name": "digits", "gates": {"accuracy_drop": 0.01, "speedup": 2.0}},
            **fields,
        }


def row(
    arm: str, entry: str, variant: str, p50: float, top1: float, speedup: float | None = None, **fields: Any
) -> dict[str, Any]:
    """A row of the benchmark with intervals a few percent wide."""
    ends = {"speedup": speedup, "speedup_low": None, "speedup_high": None, "verdict": None}
    if speedup is not None:
        ends |= {"speedup_low": 0.96 * speedup, "speedup_high": 1.05 * speedup}
    return {
        "arm": arm,
        "entry": entry,
        "variant": variant,
        "final": False,
        "provider": "cpu",
        "batch": 1,
        "threads": 1,
        "p50_ms": p50,
        "p50_low": 0.98 * p50,
        "p50_high": 1.03 * p50,
        "p90_ms": 1.2 * p50,
        "p90_low": 1.1 * p50,
        "p90_high": 1.3 * p50,
        "p90_unsaid": "",
        "p95_ms": 1.4 * p50,
        "p95_low": 1.3 * p50,
        "p95_high": 1.6 * p50,
        "p95_unsaid": "",
        "p99_ms": 1.9 * p50,
        "p99_low": 1.7 * p50,
        "p99_high": 2.2 * p50,
        "p99_unsaid": "",
        "samples": 2400,
        "throughput": 1000 / p50,
        "top1": top1,
        "top1_low": top1 - 0.016,
        "top1_high": min(1.0, top1 + 0.009),
        "test_images": 450,
        "bytes": 2_780_000,
        "parameters": 690_000,
        "macs": 45_600_000,
        "load_ms": 21.4,
        "first_ms": 3.9,
        "peak_memory_mb": 61.3,
        **ends,
        **fields,
    }


def rows() -> list[dict[str, Any]]:
    small = {"bytes": 1_310_000, "parameters": 322_000, "macs": 21_900_000}
    int8 = {**small, "bytes": 472_000}
    one = [
        row("main", "quantize", "int8", 0.894, 0.976, 2.31, final=True, verdict="faster", **int8),
        row("main", "export", "fp32", 1.12, 0.978, 1.845, verdict="faster", **small),
        row("dense", "export", "fp32", 2.066, 0.979, 1.0, final=True),
        row("random", "quantize", "int8", 0.901, 0.961, 2.29, final=True, verdict="faster", **int8),
        row("random", "export", "fp32", 1.13, 0.962, 1.83, verdict="faster", **small),
    ]
    many = [
        {
            **r,
            "batch": 8,
            "p50_ms": 7 * r["p50_ms"],
            "p50_low": 6.9 * r["p50_ms"],
            "p50_high": 7.1 * r["p50_ms"],
            "p90_ms": 8 * r["p50_ms"],
            "p90_low": 7.8 * r["p50_ms"],
            "p90_high": 8.3 * r["p50_ms"],
            "p95_ms": 9 * r["p50_ms"],
            "p95_low": 8.6 * r["p50_ms"],
            "p95_high": 9.5 * r["p50_ms"],
            "p99_ms": None,
            "p99_low": None,
            "p99_high": None,
            "p99_unsaid": "131 calls, 662 needed",
            "throughput": 8 * r["throughput"] / 7,
        }
        for r in one
    ]
    return many[:1] + one + many[1:]


def measurement() -> dict[str, Any]:
    return {
        "rows": rows(),
        "baseline": {"arm": "dense", "entry": "export"},
        "noise_floor": {"ratio_low": 0.982, "ratio_high": 1.019, "percent": 1.9},
        "host": {"cpu": "Example CPU @ 2.6 GHz", "cores": 2, "memory_gb": 8, "features": ["avx2", "avx512_vnni"]},
        "disturbed": False,
        "gates": {"accuracy_drop": 0.003, "speedup": 2.31},
        "attribution": attribution(),
        "flips": [
            {
                "arm": arm,
                "entry": "quantize",
                "variant": "int8",
                "final": True,
                "seed": 0,
                "against": {"arm": "dense", "entry": "export", "variant": "fp32", "final": True},
                "images": 450,
                "lost": lost,
                "won": won,
                "wrong_otherwise": 1,
                "agreement": (449 - lost - won) / 450,
                "p": p,
            }
            for arm, lost, won, p in (("main", 3, 2, 1.0), ("random", 12, 2, 0.0129))
        ],
        "between_arms": [
            between("main", "dense", 0.976, 0.979, 1.0, "not decided"),
            between("main", "random", 0.976, 0.961, 0.0213, "better"),
            between("dense", "random", 0.979, 0.961, 0.0129, "better"),
        ],
    }


def between(
    arm: str, against: str, top1: float, other: float, p: float, verdict: str, seeds: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    """A line of two arms on the same 450 test images."""
    by = "McNemar's test, one seed" if len(seeds) == 1 else f"paired t over {len(seeds)} seeds"
    ends = {"difference": top1 - other, "low": top1 - other - 0.012, "high": top1 - other + 0.012}
    names = {"arm": arm, "against": against, "seeds": list(seeds), "images": 450, "top1": top1, "top1_against": other}
    return {**names, **ends, "p": p, "by": by, "verdict": verdict}


def recipe(arms: Mapping[str, Mapping[str, Any]], seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """The nodes that a run record keeps of its pipeline: three stages of each arm, and the benchmark of all of them.

    arms: of each arm the ticket's config and, under "prune", that of prune where it has one.
    """
    nodes = []
    for arm, config in ((arm + at, c) for at in ("", *(f"@seed{s}" for s in seeds[1:])) for arm, c in arms.items()):
        ticket = {name: value for name, value in config.items() if name != "prune"}
        entries = {"ticket": ticket, "train": {"epochs": 20}}
        entries |= {"prune": config["prune"]} if "prune" in config else {}
        reads = {
            "ticket": [],
            "train": [["tickets", [arm, "ticket"], None]],
            "prune": [["model", [arm, "train"], None]],
        }
        for entry, settings in entries.items():
            node = {"arm": arm, "entry": entry, "stage": entry, "config": settings, "inputs": reads[entry], "seed": 0}
            nodes.append({**node, "data": ["digits", "0f"], "model": {"name": "deit"}, "code_version": 1})
    files = [["files", [arm, "train"], None] for arm in arms]
    nodes.append({"arm": "main", "entry": "benchmark", "stage": "benchmark", "config": {}, "inputs": files, "seed": 0})
    return nodes


def attribution() -> dict[str, Any]:
    def file(arm: str, entry: str, variant: str, ms: float) -> dict[str, Any]:
        blocks = (
            {"embedding": 0.1 * ms} | {f"blocks.{b}": (0.14 - 0.01 * b) * ms for b in range(6)} | {"head": 0.02 * ms}
        )
        kinds = {"matrix products": 0.62 * ms, "attention": 0.2 * ms, "norms": 0.08 * ms, "other": 0.1 * ms}
        names = {"arm": arm, "entry": entry, "variant": variant, "final": True}
        return {**names, "kinds": kinds, "blocks": blocks, "modules": {}, "operators_ms": ms, "p50_ms": 0.97 * ms}

    files = [file("dense", "export", "fp32", 2.1), file("main", "quantize", "int8", 0.92)]
    return {"provider": "cpu", "batch": 1, "threads": 1, "files": files}


def benchmark_payload(names: tuple[str, ...] = tuple("0123456789")) -> dict[str, bytes]:
    """The files that a benchmark writes for the report: flips with pictures, and percentiles of the latencies."""
    shown = [
        {
            "index": 7 * number,
            "name": f"8x8 image {7 * number}",
            "truth": names[number],
            "dense": names[number if flip == "lost" else number + 1],
            "final": names[number + 1 if flip == "lost" else number],
            "flip": flip,
            "file": f"flips/{7 * number}.jpg",
        }
        for number, flip in enumerate(("lost", "lost", "lost", "won", "won"))
    ]
    pairs = [
        {"dense": names[one], "final": names[other], "images": images, "lost": lost, "won": images - lost}
        for one, other, images, lost in ((8, 3, 3, 2), (1, 7, 2, 1), (4, 9, 1, 0))
    ]
    further = {"pairs": 0, "images": 0}
    flips = {"files": [{"arm": "main", "pairs": pairs, "further": further}], "shown": shown}
    files = (("dense/export/fp32", 2.0), ("main/quantize/int8", 0.85), ("baseline again", 2.02))
    spread = {
        "setting": "cpu, batch 1, 1 thread",
        "files": [{"file": f, "ms": [round(p * (1 + (r / 100) ** 8), 4) for r in range(101)]} for f, p in files],
    }
    made: dict[str, bytes] = {f"flips/{7 * number}.jpg": jpeg(number) for number in range(5)}
    return made | {"flips.json": json.dumps(flips).encode(), "spread.json": json.dumps(spread).encode()}


def jpeg(seed: int) -> bytes:
    """A small photograph."""
    import io

    from PIL import Image

    picture = Image.new("RGB", (32, 32), (20, 30, 40))
    for place in range(6, 26):
        picture.paste((200, 210 - 20 * seed, 190), (place, 4 + place % (3 + seed), place + 2, 28 - place % (4 + seed)))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG")
    return stream.getvalue()


def train_metrics(top1: float, *, tickets: float | None = None, epochs: int = 20) -> dict[str, Any]:
    curve = [
        {"epoch": e, "loss": 2.3 * 0.82**e + 0.12, "lr": 1e-3, "top1_calibration": 1 - 0.9 * 0.8**e}
        for e in range(epochs)
    ]
    both = {"all": top1} if tickets is None else {"all": top1, "tickets": tickets}
    return {"top1": both, "policy": "all", "curve": curve, "parameters": 690_000, "macs": 45_600_000}


def prune_metrics() -> dict[str, Any]:
    before = [{"block": b, "heads": 3, "qk": 96, "v": 96, "mlp": 384} for b in range(6)]
    after = [{"block": b, "heads": 3 - b % 2, "qk": 96 - 16 * b % 64, "v": 64, "mlp": 384 - 48 * b} for b in range(6)]
    return {
        "asked": {"macs": 0.5},
        "reached": {"macs": 0.481, "params": 0.467},
        "before": {"macs": 45_600_000, "parameters": 690_000},
        "after": {"macs": 21_900_000, "parameters": 322_000},
        "widths": {"before": before, "after": after, "embed": [[96], [80]]},
        "top1_before_recovery": 0.412,
    }


def ticket_metrics(method: str, keep: float) -> dict[str, Any]:
    return {
        "examples": {"method": method, "keep": keep, "kept": round(1212 * keep), "of": 1212},
        "patches": {"method": "attention", "keep": keep, "kept_per_image": round(64 * keep), "of": 64},
    }


def svg(text: str, colour: str = "#0b6b5d") -> str:
    """A picture whose text must reach the page unharmed and without effect."""
    body = "".join(
        f'<rect x="{20 + 30 * i}" y="{150 - 9 * i}" width="20" height="{30 + 9 * i}" fill="{colour}"/>'
        for i in range(12)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="400" height="220" viewBox="0 0 400 220">'
        f'<rect width="400" height="220" fill="white"/>{body}<text x="20" y="30" font-size="16">{text}</text></svg>'
    )


def whole_run(root: Path) -> tuple[dict[str, Any], Shelf]:
    """A complete run of four arms; `float` is main without quantize and shares everything else with it."""
    bench = Bench(root)
    shared = _arm(bench, "main", "el2n", 0.8)
    _arm(bench, "dense", "random", 1.0)
    _arm(bench, "random", "random", 0.8)
    for ref in shared:
        bench.share("float", ref)
    files = [
        {"ref": node["ref"], "arm": node["arm"]} for node in bench.nodes if node["stage"] in ("export", "quantize")
    ]
    bench.add(
        "main",
        "benchmark",
        measurement(),
        inputs={"files": files},
        config={"providers": ["cpu"], "batch_sizes": [1, 8], "threads": [1]},
        notes=[{"level": "note", "text": "p99 of batch 8 needs more samples"}],
        payload=benchmark_payload(),
        seconds=41.7,
    )
    judged = {
        "accuracy_drop": {"measured": 0.003, "bound": 0.01, "passed": True},
        "speedup": {"measured": 2.31, "bound": 2.0, "passed": True},
    }
    spec = {"name": "digits", "gates": {"accuracy_drop": 0.01, "speedup": 2.0}}
    return bench.record(gates=judged, spec={**spec, "nodes": recipe(ARMS)}), bench.shelf


ARMS: dict[str, dict[str, Any]] = {
    arm: {"examples": {"method": method, "keep": keep}, "patches": {"method": "attention", "keep": keep}}
    for arm, method, keep in (("main", "el2n", 0.8), ("dense", "random", 1.0), ("random", "random", 0.8))
}


def _arm(bench: Bench, arm: str, method: str, keep: float) -> list[str]:
    """The stages of one arm; dense is neither pruned nor quantized. Returns what another arm can share."""
    images = round(1212 * keep) * 20
    scoring = {"images": 3000, "scoring_macs": 4.1e11, "scoring_seconds": 8.2}
    scoring = scoring if method == "el2n" else {"images": 0, "scoring_macs": 0, "scoring_seconds": 0.01}
    kept = ("tickets.svg", "Kept patches", "Eight training images; dropped patches are dimmed.", svg("kept patches"))
    ticket = bench.add(arm, "ticket", ticket_metrics(method, keep), ledger=scoring, pictures=[kept])
    train = bench.add(
        arm,
        "train",
        train_metrics(0.979, tickets=0.951),
        ledger={
            "scoring_macs": 0,
            "scoring_seconds": 0.0,
            "teacher_macs": 0,
            "images": images,
            "tokens_per_image": round(64 * keep) + 1,
            "epochs": 20,
            "steps": images // 64,
            "train_macs": 3 * images * 45.6e6 * keep,
            "seconds": 64.2 * keep,
        },
        pictures=[("essential.svg", "Essential sparsity", "Top-1 by what is left of the weights.", svg("top-1"))],
        inputs={"tickets": {"ref": ticket}},
        seconds=71.0,
    )
    if arm == "dense":
        return [ticket, train, _export(bench, arm, train)]
    pruned = bench.add(arm, "prune", prune_metrics(), inputs={"model": {"ref": train}, "tickets": {"ref": ticket}})
    small = {"parameters": 322_000, "macs": 21_900_000}
    tuned = bench.add(
        arm,
        "finetune",
        {**train_metrics(0.978, epochs=8), **small},
        ledger={
            "images": 9696,
            "tokens_per_image": 65,
            "epochs": 8,
            "steps": 152,
            "train_macs": 1.5e12,
            "teacher_macs": 4.4e11,
            "seconds": 21,
        },
        inputs={"model": {"ref": pruned}, "teacher": {"ref": train}},
    )
    export = _export(bench, arm, tuned)
    bench.add(
        arm,
        "quantize",
        quantize_metrics(),
        inputs={"onnx": {"ref": export}},
        notes=[{"level": "warning", "text": "calibrated on 120 images only"}] if arm == "main" else [],
    )
    return [ticket, train, pruned, tuned, export]


def _export(bench: Bench, arm: str, model: str) -> str:
    metrics = {
        "parity": {"max_abs": 2.4e-6, "images": 128, "top1_agreement": 1.0, "batches": [1, 7]},
        "nodes": {"MatMul": 49, "LayerNormalization": 13},
        "opset": 20,
        "bytes": 1_310_000,
    }
    return bench.add(arm, "export", metrics, inputs={"model": {"ref": model}})


def quantize_metrics() -> dict[str, Any]:
    return {
        "chosen": "int8",
        "reason": "it is 1.25x faster and loses 0.2 points",
        "top1": {"fp32": 0.978, "int8": 0.976},
        "drop": 0.002,
        "judged_on": {"split": "calibration", "images": 180},
        "max_drop": 0.01,
        "speedup": {"ratio": 1.25, "low": 1.21, "high": 1.3, "noise": 1.02},
        "bytes": {"fp32": 1_310_000, "int8": 472_000},
        "calibration_images": 120,
        "quantized_nodes": 25,
        "float_nodes": {"Add": 12},
    }
