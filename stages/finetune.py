"""Recover what a cut took: train the smaller network, taught by the one it was cut from, on what will be deployed.

The teacher is any earlier stage (`teacher: train`), any model artifact (`teacher: train@7`), or any timm model
(`teacher: "timm:regnety_160"`). Soft distillation is Hinton's, hard is DeiT's; a distilled DeiT learns from the
teacher through its distillation token. Optimiser and weight
average are built anew: those from before the cut hold tensors that no longer exist.

It trains on whole images whatever `train` did, or with token reduction inside the network (`tokens`, as in train),
which is then part of the model: the token policy that is trained last is the one that is exported, and without tokens
here that is all patches. Examples are the tickets'. `precision`, `accumulate`, `compile`, `schedule`, `layer_decay` and
`stop_early` are train's; a teacher answers in fp32 whatever the precision. `launch: {processes: N}` shares every step's
batch among N processes.

All weights train, also those that `train` or a mask has set to zero; with `masks: {method: hold}` zeros stay zeros.

reads    model; tickets (optional, their examples); the teacher
writes   model.safetensors, architecture.json, preprocessing.json
ledger   as train; the teacher's forward passes are in scoring_macs

    sievit finetune pipeline.yaml --set finetune.epochs=4
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .vision.mask_settings import Hold
from .vision.recipe import Recipe, Settings, StopEarly, check_processes, check_stop, looks_at_whole_tensors
from .vision.token_settings import Tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .vision.batches import Batch
    from .vision.forward import Forward
    from .vision.network import Network
    from .vision.objective import Objective


class Distill(Settings):
    """Learning from a teacher's answers."""

    teacher: str = Field("train", description="a stage of this pipeline, an artifact (train@7), or timm:<model>")
    kind: Literal["soft", "hard"] = Field("soft", description="soft: softened outputs; hard: the teacher's decision")
    weight: float = Field(0.5, gt=0, le=1, description="share of the distillation loss; the rest is the labels'")
    temperature: float = Field(2.0, gt=0, le=100, description="softening of both outputs, kind: soft only")


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


def run(ctx: Context) -> None:
    """Network and teacher, training on the deployed token policy, accuracy."""
    import torch

    from .vision import figures, masks, reports, tickets, token_schedule
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.preprocessing import check, load
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
    teacher = _teacher(ctx, len(splits.train.classes), device)
    with ctx.progress.task("fine-tuning", config.total_steps(len(pool.members))) as task:
        fitted = fit(
            network,
            pool,
            config,
            seed=ctx.seed + 1,
            device=device,
            normalise=normalise,
            tokens=schedule,
            objective=_objective(config, network, teacher),
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
    if schedule is not None:
        ctx.metrics["tokens"] = schedule.record()
    if config.masks is not None:
        ctx.metrics["masks"] = config.masks.model_dump() | {
            "before": before,
            "density": masks.densities(network, config.masks.mode),
        }
    ctx.ledger |= {
        "images": fitted.images,
        "tokens_per_image": round(fitted.tokens / fitted.images, 2),
        "epochs": round(fitted.steps / -(-len(pool.members) // config.batch_size), 3),
        "steps": fitted.steps,
        "train_macs": 3 * fitted.macs,
        "scoring_macs": 0 if teacher is None else fitted.images * teacher.macs,
        "peak_gpu_memory_mb": fitted.peak_gpu_mb,
        "seconds": round(fitted.seconds, 3),
    }
    ctx.figure("curve", figures.curve(fitted.curve), title="Fine-tuning", caption="Accuracy on the calibration split.")


def coherent(seen: Preflight) -> None:
    """Refuse a batch that the processes cannot share, and to hold zeros where nothing before this stage made any."""
    from .methods import InvalidInput

    check_processes(seen.config, seen.processes, seen.sharding, f"stages.{seen.entry}")
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
    """Refuse a teacher that timm does not have, compiling without a compiler, and token reduction that the network
    cannot have.
    """
    from .methods import InvalidInput
    from .vision.architecture import load_architecture
    from .vision.external import check_name
    from .vision.forward import check_compiler
    from .vision.network import outline
    from .vision.token_schedule import check_tokens

    config: FinetuneConfig = seen.config
    if config.compile:
        check_compiler(seen.device, seen.at("compile"))
    if config.distill is not None and config.distill.teacher.startswith("timm:"):
        check_name(config.distill.teacher, seen.at("distill.teacher"))
    if config.tokens is None:
        return
    if "model" in seen.inputs:
        architecture = load_architecture(seen.inputs["model"].root / "architecture.json")
    else:
        architecture = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    try:
        check_tokens(config.tokens, architecture)
    except InvalidInput as error:
        error.field = seen.at(error.field)
        raise


class _Teacher:
    """A frozen network and its own normalisation, fed with the student's views."""

    def __init__(self, network: nn.Module, mean: Any, std: Any, macs: int, student: Any, device: torch.device) -> None:
        from .vision.preprocessing import Normaliser

        self.network = network.to(device).eval().requires_grad_(False)
        self.macs = macs
        self.own = Normaliser(tuple(mean), tuple(std), device)
        self.student = Normaliser(tuple(student.mean), tuple(student.std), device)

    def answer(self, images: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return self.network(self.own(images * self.student.std + self.student.mean))  # type: ignore[no-any-return]


def _teacher(ctx: Context, classes: int, device: torch.device) -> _Teacher | None:
    """The teacher that the config names. Raises: InvalidInput when it answers other classes."""
    from .vision import external
    from .vision.preprocessing import check, load
    from .vision.weights import load_network

    config: FinetuneConfig = ctx.config
    if config.distill is None:
        return None
    student = load(ctx.inputs["model"].root)
    if "teacher" in ctx.inputs:
        folder = ctx.inputs["teacher"].root
        network, own = load_network(folder), load(folder)
        check(own, student.classes, ctx.data.image_size, f"teacher {ctx.inputs['teacher'].ref}")
        return _Teacher(network, own.mean, own.std, network.architecture.macs(), student, device)
    outside = external.load(ctx.references["teacher"], classes, ctx.data.image_size)
    return _Teacher(outside.network, outside.mean, outside.std, outside.macs, student, device)


def _objective(config: FinetuneConfig, network: Network, teacher: _Teacher | None) -> Objective:
    """Labels, and the teacher where there is one. A distilled DeiT hears the teacher through its own head."""
    from .methods.distillation import hard_loss, soft_loss
    from .vision.objective import cross_entropy, supervised

    if config.distill is None or teacher is None:
        return supervised
    settings = config.distill
    network.set_distilled_training(True)

    def objective(current: Forward, batch: Batch) -> Tensor:
        answers = current(batch.images, batch.kept)
        to_labels, to_teacher = answers if isinstance(answers, tuple) else (answers, answers)
        taught = teacher.answer(batch.images)
        distilled = (
            soft_loss(to_teacher, taught, settings.temperature)
            if settings.kind == "soft"
            else hard_loss(to_teacher, taught)
        )
        return (1 - settings.weight) * cross_entropy(to_labels, batch.targets) + settings.weight * distilled

    return objective


def _references(config: FinetuneConfig) -> dict[str, str]:
    return {} if config.distill is None else {"teacher": config.distill.teacher}


STAGE = Stage(
    name="finetune",
    version=6,
    config=FinetuneConfig,
    run=run,
    reads=(Reads("model", "model"), Reads("tickets", "tickets", optional=True)),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy"),
    uses=frozenset({"data", "seed", "device"}),
    shares=True,
    references=_references,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
