"""Stages that need nothing but the standard library: what the tests of the engine run.

They have the shape of the real seven (what they read and write, nested configs, a teacher named by a field, a benchmark
across arms), and their payloads are SHA-256 chains over config, seed and input files: equal inputs give equal bytes,
any other input gives others. `train` writes a checkpoint after each epoch and goes on from it, so a kill can be tested.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Reads, Stage

Fraction = Annotated[float, Field(gt=0, le=1)]


class BadInput(ValueError):
    """Stands for the error that real stages raise on a bad input; its `hint` says what to do."""

    hint = "give another one"


class Examples(Config):
    """Which training images are kept."""

    method: Literal["random", "el2n", "forgetting"] = "el2n"
    keep: Fraction = Field(default=1.0, description="fraction of the training images kept")


class Patches(Config):
    """Which patches are kept."""

    method: Literal["random", "saliency", "attention"] = "saliency"
    keep: Fraction = 1.0


class TicketConfig(Config):
    examples: Examples = Examples()
    patches: Patches = Patches()


class Weights(Config):
    method: Literal["group_lasso", "l1"] = "group_lasso"
    strength: float = Field(default=1e-4, ge=0)


class TrainConfig(Config):
    epochs: int | None = Field(default=None, ge=1, le=100_000)
    steps: int | None = Field(default=None, ge=1)
    weights: Weights | None = None
    pause: float = Field(default=0.0, ge=0, description="seconds an epoch sleeps, so that a test can kill it")
    fail: bool = Field(default=False, description="end in a bad-input error after the first epoch")

    @model_validator(mode="after")
    def one_duration(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class Target(Config):
    macs: Fraction | None = None
    params: Fraction | None = None

    @model_validator(mode="after")
    def one_target(self) -> Self:
        if self.macs is not None and self.params is not None:
            raise ValueError("params: contradicts macs; give one of the two")
        return self


class PruneConfig(Config):
    importance: Literal["taylor", "l1", "random"] = "taylor"
    target: Target = Target(macs=0.5)


class Distill(Config):
    teacher: str = "train"


class FinetuneConfig(Config):
    epochs: int = Field(default=1, ge=1)
    distill: Distill | None = None


class ExportConfig(Config):
    opset: int = Field(default=20, ge=17, le=23)


class QuantizeConfig(Config):
    max_drop: float = Field(default=0.01, ge=0, le=1)


class BenchmarkConfig(Config):
    providers: tuple[Literal["cpu", "cuda", "tensorrt"], ...] = ("cpu",)
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    threads: tuple[Annotated[int, Field(ge=1)], ...] = (1,)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _start(ctx: Context) -> str:
    """A digest of everything the result may depend on."""
    inputs = {role: artifact.file("payload.txt").read_text() for role, artifact in ctx.inputs.items()}
    return _digest(ctx.config.model_dump(), ctx.seed, ctx.data.source, ctx.model.name, inputs, dict(ctx.references))


def _write(ctx: Context) -> None:
    (ctx.out / "payload.txt").write_text(_start(ctx) + "\n")
    ctx.metrics["size"] = 65
    ctx.ledger["images"] = 0


def _train(ctx: Context) -> None:
    epochs = ctx.config.epochs or ctx.config.steps
    checkpoint = ctx.work / "checkpoint.json"
    done, state = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, _start(ctx))
    with ctx.progress.task("train", epochs) as task:
        task.advance(done)
        for epoch in range(done, epochs):
            time.sleep(ctx.config.pause)
            state = _digest(state, epoch)
            temporary = ctx.work / "checkpoint.tmp"
            temporary.write_text(json.dumps([epoch + 1, state]))
            temporary.replace(checkpoint)
            task.advance(1, loss=1 / (epoch + 1))
            if ctx.config.fail:
                raise BadInput("the images are not images")
    (ctx.out / "payload.txt").write_text(state + "\n")
    ctx.metrics.update(epochs=epochs, resumed_at=done)
    ctx.ledger["epochs"] = epochs
    ctx.figure("curve", "<svg xmlns='http://www.w3.org/2000/svg'/>", title="Training curve")


def _benchmark(ctx: Context) -> None:
    rows = [
        {"arm": m.arm, "entry": m.entry, "final": m.final, "text": m.artifact.file("payload.txt").read_text()}
        for m in ctx.many
    ]
    (ctx.out / "payload.txt").write_text(_digest(rows, ctx.config.model_dump()) + "\n")
    ctx.metrics.update(rows=rows, gates={"accuracy_drop": 0.001, "speedup": 2.5})


def _distilled(config: Any) -> dict[str, str]:
    return {"teacher": config.distill.teacher} if config.distill is not None else {}


TICKETS = Reads("tickets", "tickets", optional=True)
MODEL = Reads("model", "model")
ONNX = Reads("onnx", "onnx")
ALL_ONNX = Reads("onnx", "onnx", many=True)

TICKET = Stage("ticket", 1, TicketConfig, _write, (TICKETS,), "tickets", "Choose images and patches.")
TRAIN = Stage(
    "train",
    1,
    TrainConfig,
    _train,
    (TICKETS,),
    "model",
    "Train.",
    uses=frozenset({"data", "model", "device", "seed"}),
    paced_by=lambda config: ("epochs", "steps"),
)
PRUNE = Stage(
    "prune", 1, PruneConfig, _write, (MODEL, TICKETS), "model", "Cut.", costless=lambda config: ("target.macs",)
)
FINETUNE = Stage("finetune", 1, FinetuneConfig, _write, (MODEL, TICKETS), "model", "Recover.", references=_distilled)
EXPORT = Stage("export", 1, ExportConfig, _write, (MODEL,), "onnx", "Write ONNX.", uses=frozenset())
QUANTIZE = Stage("quantize", 1, QuantizeConfig, _write, (ONNX, TICKETS), "onnx", "Quantize.")
BENCHMARK = Stage(
    "benchmark",
    1,
    BenchmarkConfig,
    _benchmark,
    (ALL_ONNX,),
    "measurement",
    "Measure.",
    uses=frozenset({"data", "host"}),
    across_arms=True,
)

STAGES = (TICKET, TRAIN, PRUNE, FINETUNE, EXPORT, QUANTIZE, BENCHMARK)

PIPELINE = """\
name: digits
seed: 0
data:    {source: "builtin:digits", image_size: 32}
model:   {name: deit_tiny_patch16_224, pretrained: false, args: {patch_size: 4, embed_dim: 96, depth: 6, num_heads: 3}}
stages:
  ticket:    {examples: {method: el2n, keep: 0.8}, patches: {method: attention, keep: 0.7}}
  train:     {epochs: 20, weights: {method: group_lasso, strength: 1.0e-4}}
  prune:     {importance: taylor, target: {macs: 0.5}}
  finetune:  {epochs: 8, distill: {teacher: train}}
  export:    {opset: 20}
  quantize:  {max_drop: 0.01}
  benchmark: {providers: [cpu], batch_sizes: [1, 8], threads: [1]}
arms:
  dense:  {ticket: {examples: {keep: 1.0}, patches: {keep: 1.0}}, train: {weights: null}, prune: null, quantize: null}
  random: {ticket: {examples: {method: random}, patches: {method: random}}}
gates:   {accuracy_drop: 0.01, speedup: 2.0}
"""
