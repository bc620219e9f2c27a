"""Which examples each pass trains on: all, a fresh random subset, a pool with swaps, or softly pruned by loss.

The loop asks a policy for the next pass (`begin`), shows it what every step saw (`observe`, before the weights change)
and tells it that the pass is over (`end`). What the next pass will be is decided in `end` and kept, so that a run that
is killed within a pass finds that pass again in its checkpoint. Ids are positions in the training split.

Under several processes the pool is one (processes.py): observations are gathered, decisions are the first process's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..methods import InvalidInput
from ..methods import example_policies as methods
from ..methods.example_selection import kept_count
from ..methods.token_reduction import prefix_attention
from . import processes
from .attention import Attention
from .example_settings import InfoBatch, Subset, Swap, pruned_epochs
from .network import Network


@dataclass(frozen=True)
class Pass:
    """The examples of one pass, ascending, and what the loss of each is multiplied by (None: by 1)."""

    ids: np.ndarray  # (n,) int64
    weights: np.ndarray | None = None  # (n,) float32


@dataclass(frozen=True)
class Seen:
    """What one step saw of its examples, in its own process. All (B,)."""

    ids: np.ndarray  # int64
    correct: np.ndarray  # bool, the answer on the training view was the un-mixed label
    losses: np.ndarray  # float32, of the training view with its (mixed, smoothed) target, not weighted
    variance: np.ndarray  # float32, across patch tokens of the last block's attention; zeros unless asked for
    share: float  # part of each view that is the example's own; 1 unless mixed

    def first(self, count: int) -> Seen:
        """Of the first so many examples."""
        ids, correct, losses, variance = self.ids, self.correct, self.losses, self.variance
        return Seen(ids[:count], correct[:count], losses[:count], variance[:count], self.share)


class Policy(Protocol):
    """What the loop knows of a policy.

    size: examples of a pass, as schedules count them. watches: whether observe is to be called; needs one loss an
    example. attention: whether Seen.variance is needed.
    """

    size: int
    watches: bool
    attention: bool

    def begin(self, epoch: int) -> Pass:
        """The pass of an epoch (from 0); changes nothing."""

    def observe(self, seen: Seen) -> None:
        """After a step's forward and before its update."""

    def end(self, epoch: int) -> None:
        """After the last step of an epoch: decide the next."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: tensors, and facts for JSON."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Undo state() on a policy that was made in the same way."""

    def history(self) -> list[dict[str, Any]]:
        """What was decided, for JSON: one entry a decision."""


def create(settings: Swap | InfoBatch | Subset | None, members: np.ndarray, epochs: float | None, seed: int) -> Policy:
    """The policy of these settings for a pool of examples.

    Args: members (M,) positions in the training split, ascending.
    Raises: InvalidInput when the pool is too small for the settings.
    """
    if isinstance(settings, Swap):
        return Swapping(settings, members, seed)
    if isinstance(settings, InfoBatch):
        return SoftPruning(settings, members, int(epochs or 0), seed)
    if isinstance(settings, Subset):
        return Subsets(settings, members, seed)
    return Everything(members)


def record(settings: Swap | InfoBatch | Subset, policy: Policy, examples: int) -> dict[str, Any]:
    """pool.json: the settings, and every decision that was made. examples: M, of the pool."""
    return {
        "schema": 1,
        "settings": settings.model_dump(),
        "examples": examples,
        "nominal_pass": policy.size,
        "decisions": policy.history(),
    }


def use(settings: Swap | InfoBatch | Subset, examples: int, passes: float, images: int) -> dict[str, Any]:
    """What was trained on, against what as many passes over every example would have taken."""
    every = round(passes * examples)
    return {
        "policy": settings.policy,
        "of": examples,
        "passes": round(passes, 3),
        "images": images,
        "images_of_all": every,
        "share": round(images / every, 4),
    }


class _Fixed:
    """What policies share that look at nothing and have no state."""

    watches = attention = False

    def observe(self, seen: Seen) -> None:
        raise AssertionError("this policy looks at nothing")

    def end(self, epoch: int) -> None:
        return

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        return

    def history(self) -> list[dict[str, Any]]:
        return []


class Everything(_Fixed):
    """No policy: every pass sees every example."""

    def __init__(self, members: np.ndarray) -> None:
        self.members, self.size = members, len(members)

    def begin(self, epoch: int) -> Pass:
        return Pass(self.members)


class Subsets(_Fixed):
    """A fresh random subset of the same size in every pass."""

    def __init__(self, settings: Subset, members: np.ndarray, seed: int) -> None:
        self.members, self.seed = members, seed
        self.size = kept_count(len(members), settings.keep)

    def begin(self, epoch: int) -> Pass:
        chosen = _draw(self.seed, epoch).permutation(len(self.members))[: self.size]
        return Pass(self.members[processes.decided(np.sort(chosen))])


class Swapping:
    """Tri-Level E-ViT's example level: a pool of constant size, with swaps by forgetting counts.

    Swaps come after epochs every, 2 every, ... until. mode paper judges every presentation as it was trained on, mixed
    or not, up to `every` presentations a window, and sorts by (count, mean variance of the attention, id). mode
    corrected passes over views of which the example's own part is not above one half (timm mixes a batch with one
    share, so that an example is then mostly its partner), and lets lots drawn from (seed, epoch) decide between equal
    counts: by id alone, the first classes of a sorted data set would leave before the others. Where the paper's code
    draws and counts on every GPU alone, both modes have one pool.
    """

    watches = True

    def __init__(self, settings: Swap, members: np.ndarray, seed: int) -> None:
        self.settings, self.members, self.seed = settings, members, seed
        total = len(members)
        self.number = methods.share_count(total, settings.swap)
        out = methods.share_count(total, settings.removed)
        if self.number < 1:
            raise InvalidInput(
                f"train.examples.swap: {settings.swap:g} of {total} examples is less than one", "raise it"
            )
        self.size = total - out
        self.attention = settings.mode == "paper"
        self.slots = _slots(members)
        active = methods.first_pool(total, out, _draw(seed, 0))
        self.active = processes.decided(active.astype(np.uint8)).astype(bool)
        self.window = methods.empty_window(total)
        self.swaps: list[dict[str, Any]] = []

    def begin(self, epoch: int) -> Pass:
        return Pass(self.members[self.active])

    def observe(self, seen: Seen) -> None:
        rows = np.stack([seen.ids, seen.correct, seen.variance, np.full(len(seen.ids), seen.share)], axis=1)
        rows = processes.gather(rows.astype(np.float64))
        if self.settings.mode == "corrected":
            rows = rows[rows[:, 3] > 0.5]
        ids, correct = rows[:, 0].astype(np.int64), rows[:, 1].astype(bool)
        methods.present(self.window, self.slots[ids], correct, rows[:, 2], self.settings.every)

    def end(self, epoch: int) -> None:
        done, every = epoch + 1, self.settings.every
        if done % every or done > self.settings.until:
            return
        draw = _draw(self.seed, done)
        counts = methods.forgetting_counts(self.window, every)
        ties = methods.mean_variance(self.window) if self.attention else draw.permutation(len(self.members))
        after, _, _ = methods.swap(self.active, counts, ties, self.number, draw)
        after = processes.decided(after.astype(np.uint8)).astype(bool)
        removed, restored = np.flatnonzero(self.active & ~after), np.flatnonzero(after & ~self.active)
        number, size = np.unique(counts[self.active], return_counts=True)
        self.swaps.append(
            {
                "epoch": done,
                "window": every,
                "counts": {str(n): int(s) for n, s in zip(number, size, strict=True)},
                "judged": int(self.window.seen.sum()),
                "removed": self.members[removed],
                "restored": self.members[restored],
            }
        )
        self.active, self.window = after, methods.empty_window(len(self.members))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        arrays = {"active": self.active, **{f"window.{name}": array for name, array in vars(self.window).items()}}
        for index, one in enumerate(self.swaps):
            arrays |= {f"swap.{index}.{name}": one[name] for name in ("removed", "restored")}
        facts = [{n: v for n, v in one.items() if n not in ("removed", "restored")} for one in self.swaps]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, {"swaps": facts}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.active = arrays["active"]
        self.window = methods.Window(**{name: arrays[f"window.{name}"] for name in vars(self.window)})
        self.swaps = [
            {**one, **{name: arrays[f"swap.{index}.{name}"] for name in ("removed", "restored")}}
            for index, one in enumerate(facts["swaps"])
        ]

    def history(self) -> list[dict[str, Any]]:
        """The first draw is epoch 0; every swap names all that went and came, so any pool can be worked out."""
        active = self.active.copy()
        for one in reversed(self.swaps):
            active[self.slots[one["restored"]]], active[self.slots[one["removed"]]] = False, True
        first = {"epoch": 0, "removed": self.members[~active].tolist(), "restored": []}
        return [first] + [
            {**s, "removed": s["removed"].tolist(), "restored": s["restored"].tolist()} for s in self.swaps
        ]


class SoftPruning:
    """InfoBatch. The score of an example is its latest training loss, on the mixture where views are mixed."""

    watches, attention = True, False

    def __init__(self, settings: InfoBatch, members: np.ndarray, epochs: int, seed: int) -> None:
        self.settings, self.members, self.seed = settings, members, seed
        self.size = len(members)
        self.last_pruned = pruned_epochs(settings.anneal, epochs)  # epochs from 0: 1 to this one
        self.slots = _slots(members)
        self.losses = np.full(self.size, np.nan, np.float32)
        self.weights = np.ones(self.size, np.float32)
        self.passes: list[dict[str, Any]] = []

    def begin(self, epoch: int) -> Pass:
        kept = self.weights > 0
        return Pass(self.members[kept], self.weights[kept])

    def observe(self, seen: Seen) -> None:
        rows = processes.gather(np.stack([seen.ids.astype(np.float64), seen.losses.astype(np.float64)], axis=1))
        self.losses[self.slots[rows[:, 0].astype(np.int64)]] = rows[:, 1]

    def end(self, epoch: int) -> None:
        following = epoch + 1
        self.weights = np.ones(self.size, np.float32)
        if following > self.last_pruned:
            return
        pruned = methods.prune_softly(self.losses, self.settings.prune, _draw(self.seed, following))
        self.weights = processes.decided(pruned.weights)
        self.passes.append(
            {
                "epoch": following + 1,
                "mean_loss": pruned.mean,
                "below": pruned.below,
                "dropped": pruned.dropped,
                "kept": int((self.weights > 0).sum()),
            }
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"losses": torch.from_numpy(self.losses), "weights": torch.from_numpy(self.weights)}
        return tensors, {"passes": self.passes}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.losses, self.weights = tensors["losses"].numpy(), tensors["weights"].numpy()
        self.passes = list(facts["passes"])

    def history(self) -> list[dict[str, Any]]:
        return self.passes


class Watch:
    """What a policy wants to know of a training forward, taken from that forward: a context around one call of the
    network.
    """

    def __init__(self, network: Network, *, attention: bool) -> None:
        """Raises: InvalidInput when attention is asked of a network without prefix tokens."""
        self.network, self.attention = network, attention
        if attention and network.architecture.prefix == 0:
            raise InvalidInput(
                "train.examples.mode: paper sorts by the attention of the class token, and "
                f"{network.architecture.model} has none",
                "use mode: corrected",
            )
        self._logits: Tensor | None = None
        self._variance: Tensor | None = None

    @property
    def _last(self) -> Attention:
        return cast(Attention, self.network.body.blocks[-1].attn)

    def __enter__(self) -> Watch:
        self._logits = self._variance = None
        self._hooks = [self.network.register_forward_hook(self._answered)]
        if self.attention:
            self._hooks.append(self._last.qkv.register_forward_hook(self._attended))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _answered(self, module: Any, inputs: Any, output: Any) -> None:
        self._logits = (output[0] if isinstance(output, tuple) else output).detach()

    def _attended(self, module: Any, inputs: Any, projected: Tensor) -> None:
        attention = self._last
        with torch.no_grad(), torch.autocast(projected.device.type, enabled=False):
            queries, keys, _ = attention.split(projected.float())
            paid = prefix_attention(queries, keys, self.network.architecture.prefix, attention.scale)
        self._variance = paid.var(dim=1, correction=0)

    def seen(self, ids: np.ndarray, labels: Tensor, losses: Tensor, share: float) -> Seen:
        """What the last forward showed. labels, losses (B,)."""
        assert self._logits is not None, "the objective did not call the network"
        variance = np.zeros(len(ids), np.float32) if self._variance is None else self._variance.cpu().numpy()
        correct = (self._logits.argmax(1) == labels).cpu().numpy()
        return Seen(ids, correct, losses.detach().float().cpu().numpy(), variance, share)


def _slots(members: np.ndarray) -> np.ndarray:
    """From a position in the training split to the position in the pool."""
    slots = np.full(int(members.max()) + 1, -1, np.int64)
    slots[members] = np.arange(len(members))
    return slots


def _draw(seed: int, epoch: int) -> np.random.Generator:
    """A generator for the decision before an epoch. The last word keeps it apart from every step's own."""
    return np.random.default_rng([seed, epoch, 0, 1])
