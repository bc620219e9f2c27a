"""The training loop of every stage that trains: proxies and selectors of `ticket`, `train`, `finetune`.

A step's randomness (order, augmentation, mixing, dropout) is drawn from seeds computed from (seed, epoch, step) and
from nothing else. So a checkpoint needs no generator states, and a run killed at any moment ends with the same bits
as one that was never killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from ..methods import InvalidInput
from ..methods.token_labels import labels_of, mixed_labels, patch_shares
from . import processes
from .augment import Augmenter, Mixer
from .clock import Clock
from .dataset import Images
from .examples import Everything, Policy, Watch
from .mask_settings import Magnitude, Pattern, RigL
from .masks import apply as apply_masks
from .network import Network
from .patches import PatchPolicy, Views
from .penalty import Penalty
from .recipe import Recipe
from .tensors import flatten_optimizer, read_tensors, restore_optimizer, write_tensors
from .token_schedule import TokenSchedule


@dataclass(frozen=True)
class Pool:
    """What is trained on: images, which of them, and which patches of each view (None: whole images)."""

    images: Images
    members: np.ndarray  # (m,) positions in images
    patches: PatchPolicy | None = None

    @property
    def whole(self) -> bool:
        return self.patches is None


@dataclass
class Batch:
    """One step's input on the device. clean: the un-mixed labels (B,). share: an image's own part of its view.
    token_labels: of the kept patches, where there is an annotator.
    """

    images: Tensor  # (B, 3, S, S) normalised
    targets: Tensor  # (B, K) soft
    kept: Tensor | None  # (B, K) patch indices
    clean: Tensor
    ids: np.ndarray  # (B,) positions in the pool's images
    weights: Tensor | None  # (B,) what each loss is multiplied by
    share: float
    token_labels: Tensor | None = None  # (B, n, K) soft


Objective = Callable[[Network, Batch], Tensor]  # one loss an image (B,), or their mean ()
Annotate = Callable[[Tensor], Tensor]  # views (B, 3, S, S) -> class probabilities of every patch (B, N, K)
Tick = Callable[[int, Mapping[str, float]], None]


@dataclass
class Fitted:
    """The result of fit: the network that is kept (the average, where there is one), and what it took.

    images: forward and backward passes in all; ticketed: those on the patches of a ticket. tokens, macs: patch tokens
    (mean over the blocks) and forward multiply-accumulates of the network, of all these images together. passes: of the
    examples, or of the policy that chose among them.
    """

    network: Network
    curve: list[dict[str, float]]
    images: int
    ticketed: int
    tokens: float
    macs: int
    steps: int
    passes: float
    seconds: float
    earlier_seconds: float  # the part of `seconds` that an earlier, killed attempt spent
    early: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class Normaliser:
    """(x - mean) / std per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def cross_entropy(logits: Tensor, targets: Tensor, *, each: bool = False) -> Tensor:
    """Cross-entropy with soft targets (B, K): the mean (), or one for each image (B,)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none" if each else "mean")


def supervised(network: Network, batch: Batch) -> Tensor:
    """The plain objective: cross-entropy with the (mixed, smoothed) labels."""
    return cross_entropy(network(batch.images, batch.kept), batch.targets)


def each_supervised(network: Network, batch: Batch) -> Tensor:
    """As supervised, one loss an image (B,): what a policy that watches or weighs examples needs."""
    return cross_entropy(network(batch.images, batch.kept), batch.targets, each=True)


def fit(
    network: Network,
    pool: Pool,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    normalise: Normaliser,
    finish: float = 0.0,
    policy: Policy | None = None,
    tokens: TokenSchedule | None = None,
    objective: Objective = supervised,
    annotate: Annotate | None = None,
    penalty: Penalty | None = None,
    masks: Magnitude | RigL | Pattern | None = None,
    judge: Callable[[Network], float] | None = None,
    after_epoch: Callable[[int, Network], None] | None = None,
    keep_epochs: tuple[int, ...] = (),
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
    tick: Tick = lambda steps, values: None,
) -> Fitted:
    """Train in place and return what is kept.

    Args:
        finish: share of the schedule at the end that sees whole images although the pool has patch tickets.
        policy: which examples each pass sees (None: all). It is told what every step saw; its state is in the
            checkpoint.
        tokens: token reduction and connections of every step (None: those that the network came with); what is kept has
            the last of them. The curve then also says top1_final_tokens.
        annotate: labels every patch of the un-mixed views in [0, 1]; batches then carry token_labels.
        masks: which weights are kept, from when on; those that are left out are zeros in what is returned.
        judge: called after each epoch on the network that would be kept; its answer goes into the curve as
            top1_calibration.
        after_epoch: called after each epoch (number from 1) on the raw network; used for proxy statistics.
        keep_epochs: epochs after which a copy of the raw weights is set aside (for rewinding).
        checkpoint: a file to resume from if it is there, and to write to at least every checkpoint_seconds and at
            each epoch's end.
        tick: called after each step with the nominal steps gone since the last (clock.py) and with values to show.
    Raises: InvalidInput when the loss is not finite, with the step; in several processes, whose gradients nothing
    averages yet.
    """
    if processes.count() > 1:
        raise InvalidInput("training in several processes is not possible yet", "run one process")
    policy = policy or Everything(pool.members)
    run = _Run(network, pool, recipe, seed, device, normalise, finish, policy, tokens, annotate, masks)
    begun = time.monotonic()
    before = run.restore(checkpoint)
    saved = time.monotonic()
    network.train()
    while not run.clock.done:
        for batch in run.batches():
            gone = int(run.clock.now)
            values = run.advance(batch, objective, penalty)
            tick(int(run.clock.now) - gone, values)
            # Not at an epoch's last step: what ends the epoch has not been done yet and would be lost.
            if checkpoint is not None and run.clock.within and time.monotonic() - saved > checkpoint_seconds:
                run.save(checkpoint, before + time.monotonic() - begun)
                saved = time.monotonic()
        run.end_epoch(judge, after_epoch, keep_epochs)
        if checkpoint is not None:
            run.save(checkpoint, before + time.monotonic() - begun)
            saved = time.monotonic()
    kept = run.kept()
    run.masks.settle(kept)
    if tokens is not None:
        tokens.apply(kept, run.clock.total, run.clock.total)
    return Fitted(
        kept.eval(),
        run.curve,
        run.images_seen,
        run.ticketed,
        run.tokens_seen,
        run.macs,
        run.step,
        run.clock.now / run.clock.nominal,
        before + time.monotonic() - begun,
        before,
        run.early,
    )


class _Run:
    """The state of one call of fit: what a checkpoint holds, and the step."""

    def __init__(
        self,
        network: Network,
        pool: Pool,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        normalise: Normaliser,
        finish: float,
        policy: Policy,
        tokens: TokenSchedule | None,
        annotate: Annotate | None,
        masks: Magnitude | RigL | Pattern | None,
    ) -> None:
        self.network, self.pool, self.recipe, self.seed, self.device = network.to(device), pool, recipe, seed, device
        self.normalise, self.policy, self.tokens, self.annotate = normalise, policy, tokens, annotate
        self.watch = Watch(network, attention=policy.attention) if policy.watches else None
        total = recipe.total_steps(policy.size)
        self.clock = Clock(math.ceil(policy.size / recipe.batch_size), total)
        self.step = 0
        self.images_seen = 0
        self.ticketed = 0
        self.tokens_seen, self.macs = 0.0, 0
        self.whole_from = round((1 - finish) * total)
        self.curve: list[dict[str, float]] = []
        self.early: dict[int, dict[str, Tensor]] = {}
        self.losses = 0.0
        self.counted: float = 0
        # timm's optimiser factory leaves biases, norms and tokens without weight decay.
        self.optimizer = create_optimizer_v2(
            network.body, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=total,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup * total),
            warmup_lr_init=recipe.min_lr,
            t_in_epochs=False,
        )
        self.schedule.step_update(0)
        self.ema = ModelEmaV3(network, decay=recipe.ema, use_warmup=True) if recipe.ema is not None else None
        self.masks = apply_masks(masks, network, self.optimizer, self.ema, total, seed)
        tied = pool.patches is not None and pool.patches.follows_image
        self.augment = Augmenter(recipe.augment, pool.images.size, colour_only=tied)
        self.mix = Mixer(recipe.mixup, recipe.cutmix, recipe.smoothing, len(pool.images.classes))

    def batches(self) -> Iterator[Batch]:
        """The rest of the present epoch."""
        chosen = self.policy.begin(self.clock.epoch)
        order = torch.randperm(len(chosen.ids), generator=_generator(self.seed, self.clock.epoch, -1)).numpy()
        order, size = processes.part(order, self.recipe.batch_size)
        self.clock.begin(len(order), size)
        order = order[self.clock.position * size : self.clock.steps * size]
        for number, pixels in enumerate(self.pool.images.batches(chosen.ids[order], size)):
            places = order[number * size : (number + 1) * size]
            weights = None if chosen.weights is None else torch.from_numpy(chosen.weights[places])
            yield self._prepare(pixels, chosen.ids[places], weights)

    def _prepare(self, pixels: np.ndarray, indices: np.ndarray, weights: Tensor | None) -> Batch:
        generator = _generator(self.seed, self.clock.epoch, self.clock.position)
        views, theta = self.augment(pixels, generator, self.device)
        labels = torch.from_numpy(self.pool.images.labels[indices]).to(self.device)
        even = len(labels) - len(labels) % 2  # timm mixes in pairs; an odd last image of an epoch sits out when mixing
        if self.mix.mixer is not None and even:
            views, theta, labels, indices = views[:even], theta[:even], labels[:even], indices[:even]
        kept = None
        of_patches = None if self.annotate is None else self.annotate(views)  # before the mixing writes over them
        mixed = self.mix(views, labels, generator)
        if self.pool.patches is not None and self.clock.now < self.whole_from:
            kept = self.pool.patches.kept(Views(indices, theta, mixed.share, self.clock.epoch, mixed.images))
        if of_patches is not None:
            shares = patch_shares(mixed.own, self.network.architecture.grid).to(self.device)
            of_patches = mixed_labels(of_patches, shares)
            of_patches = of_patches if kept is None else labels_of(of_patches, kept)
        # Dropout and stochastic depth draw from the global generators.
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        weights = None if weights is None else weights[: len(labels)].to(self.device)
        images = self.normalise(mixed.images)
        return Batch(images, mixed.targets, kept, labels, indices, weights, mixed.share, of_patches)

    def advance(self, batch: Batch, objective: Objective, penalty: Penalty | None) -> dict[str, float]:
        self.masks.project()
        if self.tokens is not None:
            self.tokens.apply(self.network, self.clock.now, self.clock.total)
        with self.watch or nullcontext(), nullcontext() if penalty is None else penalty.watch(self.network):
            losses = objective(self.network, batch)
        loss = losses if batch.weights is None else losses * batch.weights
        loss = loss.mean()
        total = loss if penalty is None else loss + penalty(self.network)
        value = float(total.detach())
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss is {value} at step {self.step + 1}", "lower lr, or clip gradients (clip: 1.0)"
            )
        if self.watch is not None:
            self.policy.observe(self.watch.seen(batch.ids, batch.clean, losses, batch.share))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.masks.on_gradients(self.clock.now)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        self.clock.position += 1
        self.schedule.step_update(self.clock.now)  # timm computes with fractions as well
        if self.ema is not None:
            self.ema.update(self.network, step=self.step)
        self.masks.on_step(self.clock.now)
        self.images_seen += len(batch.images)
        self.ticketed += 0 if batch.kept is None else len(batch.images)
        tokens, macs = self.network.ticket_cost(None if batch.kept is None else batch.kept.shape[1])
        self.tokens_seen += len(batch.images) * tokens
        self.macs += len(batch.images) * macs
        # With weights, an estimate of the mean over all examples: those that count more stand for those left out.
        self.losses += float(loss.detach()) * len(batch.images)
        self.counted += len(batch.images) if batch.weights is None else float(batch.weights.sum())
        return {"loss": self.losses / self.counted}

    def end_epoch(
        self,
        judge: Callable[[Network], float] | None,
        after_epoch: Callable[[int, Network], None] | None,
        keep_epochs: tuple[int, ...],
    ) -> None:
        epoch = self.clock.epoch + 1
        self.policy.end(self.clock.epoch)
        row = {
            "epoch": float(epoch),
            "loss": self.losses / max(1, self.counted),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.losses, self.counted = 0.0, 0
        if judge is not None:
            with self.masks.shown(self.kept()):
                row |= self._judged(judge)
        self.curve.append(row)
        if after_epoch is not None:
            after_epoch(epoch, self.network)
        if epoch in keep_epochs:
            self.early[epoch] = {name: t.detach().cpu().clone() for name, t in self.network.body.state_dict().items()}
        self.network.train()
        self.clock.end_epoch()

    def _judged(self, judge: Callable[[Network], float]) -> dict[str, float]:
        """As the network stands, and where its tokens are on a schedule, with those that it will end with."""
        kept, now, total = self.kept(), self.clock.now, self.clock.total
        if self.tokens is None:
            return {"top1_calibration": judge(kept)}
        self.tokens.apply(kept, now, total)
        current = judge(kept)
        if self.tokens.at(now, total) == self.tokens.final:
            return {"top1_calibration": current, "top1_final_tokens": current}
        self.tokens.apply(kept, total, total)
        return {"top1_calibration": current, "top1_final_tokens": judge(kept)}

    def kept(self) -> Network:
        """The network that would be handed on now."""
        return self.network if self.ema is None else self.ema.module

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{n}": t for n, t in self.network.body.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in flatten_optimizer(self.optimizer).items()}
        if self.ema is not None:
            tensors |= {f"ema.{n}": t for n, t in self.ema.module.body.state_dict().items()}
        for epoch, state in self.early.items():
            tensors |= {f"early.{epoch}.{n}": t for n, t in state.items()}
        policy, policy_facts = self.policy.state()
        tensors |= {f"policy.{n}": t for n, t in policy.items()}
        masks, mask_facts = self.masks.state()
        tensors |= {f"mask.{n}": t for n, t in masks.items()}
        facts = {
            "step": self.step,
            "clock": asdict(self.clock),
            "policy": policy_facts,
            "masks": mask_facts,
            "images": self.images_seen,
            "ticketed": self.ticketed,
            "tokens": self.tokens_seen,
            "macs": self.macs,
            "curve": self.curve,
            "losses": self.losses,
            "counted": self.counted,
            "seconds": seconds,
        }
        write_tensors(path, tensors, facts)

    def restore(self, path: Path | None) -> float:
        """Go on where a checkpoint stands. Returns the seconds already spent."""
        if path is None or not path.exists():
            return 0.0
        tensors, facts = read_tensors(path)
        clock = Clock(**facts["clock"])
        if (clock.total, clock.nominal) != (self.clock.total, self.clock.nominal):
            raise InvalidInput(
                f"{path}: a checkpoint of {clock.total} steps for a run of {self.clock.total}", "delete it"
            )
        self.network.body.load_state_dict(_with_prefix(tensors, "model."))
        restore_optimizer(self.optimizer, _with_prefix(tensors, "optimizer."))
        if self.ema is not None:
            self.ema.module.body.load_state_dict(_with_prefix(tensors, "ema."))
        for name, tensor in _with_prefix(tensors, "early.").items():
            epoch, _, rest = name.partition(".")
            self.early.setdefault(int(epoch), {})[rest] = tensor
        self.policy.restore(_with_prefix(tensors, "policy."), facts["policy"])
        self.masks.restore(_with_prefix(tensors, "mask."), facts["masks"])
        self.clock, self.step, self.curve = clock, facts["step"], facts["curve"]
        self.images_seen, self.ticketed = facts["images"], facts["ticketed"]
        self.tokens_seen, self.macs = facts["tokens"], facts["macs"]
        self.losses, self.counted = facts["losses"], facts["counted"]
        self.schedule.step_update(self.clock.now)
        return float(facts["seconds"])


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """A generator for one step (or for the order of an epoch, step -1), far from its neighbours."""
    mixed = np.random.SeedSequence([seed, epoch, step + 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
