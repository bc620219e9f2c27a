"""Recover what a cut took: train the smaller network, taught by the one it was cut from, on what will be deployed.

The teacher is any earlier stage (`teacher: train`), that of another arm under the same seed (`dense/train`), any model
artifact (`train@7`), or any timm model (`"timm:regnety_160"`). Soft distillation is Hinton's, hard is DeiT's; a
distilled DeiT learns from the teacher through its distillation token. Where nothing about the views is drawn (no
mixing, and an `augment` without shift, flip, zoom, erase and rand), the teacher is asked once about each image, and its
answers are looked up.

`distill: {features: {}}` compares hidden states as well: all tokens, after all blocks or those that are named, each
with the teacher's as its block of the same place leaves it. Where a cut has made the student narrower, a linear
projection widens its states; projections train with it and are thrown away at the end. It needs a teacher of Sievit, of
the same family, patches and prefix tokens, and blocks after which neither has dropped tokens.

Optimiser and weight average are built anew: those from before the cut hold tensors that no longer exist.

It trains on whole images whatever `train` did, or with token reduction inside the network (`tokens`, as in train),
which is then part of the model: the token policy that is trained last is the one that is exported, and without tokens
here that is all patches. Examples are the tickets'. `precision`, `accumulate`, `compile`, `schedule`, `layer_decay` and
`stop_early` are train's; a teacher answers in fp32 whatever the precision. `launch: {processes: N}` shares every step's
batch among N processes.

All weights train, also those that `train` or a mask has set to zero; with `masks: {method: hold}` zeros stay zeros.

reads    model; tickets (optional, their examples); the teacher
writes   model.safetensors, architecture.json, preprocessing.json
ledger   as train; teacher_macs are the teacher's forward passes, and seconds those before the first step too

    sievit finetune pipeline.yaml --set finetune.epochs=4
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reached, Reads, Stage

from .vision.how_far import epochs
from .vision.mask_settings import Hold
from .vision.recipe import COSTLESS, Recipe, StopEarly, check_processes, check_stop, looks_at_whole_tensors
from .vision.teaching_settings import Distill, check_features
from .vision.token_settings import Tokens

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.preprocessing import Preprocessing
    from .vision.teaching import Teacher


class FinetuneConfig(Recipe, Config):
    """Settings of the finetune stage."""

    epochs: float | None = Field(None, gt=0, le=10_000, description="passes over the kept examples; this or steps")
    lr: float = Field(5e-4, gt=0, description="peak learning rate, after warm-up")
    distill: Distill | None = Field(None, description="a teacher; null trains on the labels alone")
    tokens: Tokens | None = Field(None, description="token reduction in the network; null: all patches in all blocks")
    masks: Hold | None = Field(None, description="keep the zeros of the network's weights; null: all weights train")
    stop_early: StopEarly | None = Field(
        None,
        description="ends training when the calibration split shows no gain, and keeps the best epoch; null: all "
        "epochs, and the last is kept",
    )

    @model_validator(mode="after")
    def _stops(self) -> FinetuneConfig:
        check_stop(self.stop_early, self.epochs)
        return self

    @model_validator(mode="after")
    def _whole_tokens(self) -> FinetuneConfig:
        check_features(self.distill, self.tokens)
        return self


def run(ctx: Context) -> None:
    """Network and teacher, training on the deployed token policy, accuracy."""
    import torch

    from .vision import masks, reports, tickets, token_schedule
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.objective import supervised
    from .vision.preprocessing import check, load
    from .vision.teaching import Teaching
    from .vision.training import fit
    from .vision.weights import load_network, save_network

    config: FinetuneConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    source = ctx.inputs["model"].root
    network, preprocessing = load_network(source, drop_path=config.drop_path), load(source)
    check(preprocessing, splits.train.classes, ctx.data.image_size, f"model {ctx.inputs['model'].ref}")
    network = network.with_tokens(())  # whatever train did
    before = None if config.masks is None else masks.densities(network, config.masks.mode)
    schedule = token_schedule.create(network.architecture, config.tokens)
    loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None
    tickets.check(loaded, splits, None, 0.0)
    # The deployed policy: the tickets' examples, but not their patches.
    pool = tickets.pool(splits.train, loaded, None)

    torch.manual_seed(ctx.seed)
    normalise = preprocessing.normaliser(device)
    teaching = None
    if config.distill is not None:
        tokens = () if schedule is None else schedule.final
        teaching = Teaching(config.distill, network, _teacher(ctx, preprocessing, device), tokens=tokens)
        if teaching.asked_again(pool, config):
            with ctx.progress.task("asking the teacher", len(pool.members)) as task:
                teaching.remember(pool, config.batch_size, normalise, task.advance)
    with ctx.progress.task("fine-tuning", config.total_steps(len(pool.members))) as task:
        fitted = fit(
            network,
            pool,
            config,
            seed=ctx.seed + 1,
            device=device,
            normalise=normalise,
            tokens=schedule,
            objective=supervised if teaching is None else teaching,
            beside=None if teaching is None else teaching.projections,
            masks=config.masks,
            judge=lambda current: top1(current, splits.calibration, normalise, device),
            stop=config.stop_early,
            checkpoint=ctx.work / "training.safetensors",
            tick=lambda n, values: task.advance(n, **values),
            sharding=ctx.sharding,
        )
    network = fitted.network
    reports.tell(fitted, ctx.metrics, ctx.progress)
    network.set_distilled_training(False)
    save_network(network, ctx.out)
    preprocessing.save(ctx.out)

    architecture = network.architecture
    ctx.metrics |= {
        "top1": {"all": top1(network, splits.test, normalise, device)},
        "policy": "all" if not architecture.tokens else f"reduced to {architecture.tokens[-1].after} patches",
        "curve": fitted.curve,
        "parameters": network.parameter_count(),
        "macs": architecture.macs(),
    }
    if teaching is not None:
        ctx.metrics["distill"] = {
            "remembered": teaching.remembered is not None,
            "compared": [other for _, other in teaching.pairs],
        }
    if schedule is not None:
        ctx.metrics["tokens"] = schedule.record()
    if config.masks is not None:
        ctx.metrics["masks"] = config.masks.model_dump() | {
            "before": before,
            "density": masks.densities(network, config.masks.mode),
        }
    ctx.ledger |= reports.cost(fitted) | {
        "teacher_macs": 0 if teaching is None else teaching.macs(pool, fitted.images),
        "seconds": round(fitted.seconds + (0.0 if teaching is None else teaching.seconds), 3),
    }


def coherent(seen: Preflight) -> None:
    """Refuse a batch that the processes cannot share, hidden states of a network in parts, and to hold zeros where
    nothing before this stage made any.
    """
    from .methods import InvalidInput

    check_processes(seen.config, seen.processes, seen.sharding, f"stages.{seen.entry}")
    distill = seen.config.distill
    if distill is not None and distill.features is not None and seen.processes > 1 and seen.sharding == "fsdp2":
        raise InvalidInput(
            f"{seen.at('distill.features')}: projections are whole in every process, and fsdp2 divides weights",
            "leave features out, or use launch.sharding: ddp",
            field=seen.at("distill.features"),
        )
    if seen.config.masks is None:
        return
    if seen.processes > 1 and seen.sharding == "fsdp2":
        raise looks_at_whole_tensors(seen.at("masks"))
    made = seen.reads.get("model")
    while made is not None and not hasattr(made.config, "masks"):
        made = made.reads.get("model")  # prune hands on what it was given
    if made is None or made.config.masks is not None:
        return
    if getattr(made.config, "start", None) is not None or made.model.weights is not None:
        return  # whatever zeros these bring
    raise InvalidInput(
        f"{seen.at('masks')}: hold keeps zeros, and {made.entry} trains all weights",
        f"leave masks out, or set {made.at('masks')}",
        field=seen.at("masks"),
    )


def idle(seen: Preflight) -> dict[str, str]:
    """A temperature that softens nothing, and a floor of a learning rate that does not fall."""
    config: FinetuneConfig = seen.config
    distill, found = config.distill, config.idle()
    if distill is not None and distill.kind == "hard":
        found["distill.temperature"] = "distill.kind is hard"
    return found


def preflight(seen: Preflight) -> None:
    """Refuse a device that is not there, a teacher that timm does not have, compiling without a compiler, token
    reduction that the network cannot have, and hidden states that cannot be compared.
    """
    from .methods import InvalidInput
    from .vision.device import check_device
    from .vision.external import check_name
    from .vision.forward import check_compiler
    from .vision.teaching import compared
    from .vision.token_schedule import create

    config: FinetuneConfig = seen.config
    check_device(seen.device)
    if config.compile:
        check_compiler(seen.device, seen.at("compile"))
    distill = config.distill
    if distill is not None and distill.teacher.startswith("timm:"):
        check_name(distill.teacher, seen.at("distill.teacher"))
    if config.tokens is None and (distill is None or distill.features is None):
        return
    try:
        student = _record(seen, "model")
        schedule = create(student, config.tokens)
        if distill is not None and distill.features is not None:
            # Before the network is there, a cut may still give the blocks that reduce tokens other numbers.
            drops = schedule.final if schedule is not None and "model" in seen.inputs else ()
            compared(student, _record(seen, "teacher"), distill.features, drops)
    except InvalidInput as error:
        error.field = seen.at(error.field)
        raise


def _record(seen: Preflight, role: str) -> Architecture | SwinArchitecture:
    """The architecture of what will be read; before it is there, that of the model with the tokens that are left."""
    from .vision.architecture import Architecture, load_architecture
    from .vision.network import outline
    from .vision.vit import drops_for

    if role in seen.inputs:
        return load_architecture(seen.inputs[role].root / "architecture.json")
    record = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    tokens: Tokens | None = getattr(seen.reads[role].config, "tokens", None) if role in seen.reads else None
    if tokens is None or not isinstance(record, Architecture):
        return record
    return record.with_tokens(drops_for(record, tokens.blocks, tokens.keep, tokens.method, tokens.fuse))


def _teacher(ctx: Context, student: Preprocessing, device: torch.device) -> Teacher:
    """Who the config names: a stage or an artifact, else a network of timm."""
    from .vision import teaching

    if "teacher" in ctx.inputs:
        found = ctx.inputs["teacher"]
        return teaching.from_artifact(found.root, found.ref, student, device)
    return teaching.from_timm(ctx.references["teacher"], student, device)


def _references(config: FinetuneConfig) -> dict[str, str]:
    return {} if config.distill is None else {"teacher": config.distill.teacher}


def _reached(work: Path) -> Reached | None:
    found = epochs(work / "training.safetensors")
    return None if found is None else Reached(*found)


STAGE = Stage(
    name="finetune",
    version=10,
    config=FinetuneConfig,
    run=run,
    reads=(Reads("model", "model"), Reads("tickets", "tickets", optional=True)),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy"),
    uses=frozenset({"data", "seed", "device"}),
    shares=True,
    # Where a training may end early, its time is in no proportion, and every setting bears on it.
    costless=lambda config: () if config.stop_early else COSTLESS,
    paced_by=lambda config: () if config.stop_early else ("epochs", "steps"),
    reached=_reached,
    references=_references,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
