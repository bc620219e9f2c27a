"""Instant soup pruning: weak masks, each from a short training on little data, are joined into one mask.

Jaiswal et al. (ICML 2023), section 3 and their code, as LOTUS (2024) uses it on a pretrained ViT. In rounds, until the
target is 5 points away: the network trains for a while; copies of it train on random examples, each then leaves out a
further share of its weights by magnitude; a weight stays that any of these masks keeps; what is left out is zero from
then on. What is still missing is cut at once, by magnitude. The authors stop 5 points before the target; so do we.

Where we differ, in both modes: each training begins with a fresh optimiser and schedule, where the authors clone both.
`corrected` joins by votes: a union takes back most of what the weak masks leave out where they disagree, and LOTUS saw
accuracy fall to a half. And it is guarded: magnitudes alone, cut at once to as many weights after as much training, are
tried beside the soup, and kept where they answer better on the calibration split.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods import InvalidInput
from ..methods.example_selection import kept_count
from ..methods.weight_masks import joined, weights_kept
from . import masks
from .mask_settings import Hold, Magnitude, Soup
from .network import Network
from .trials import Trials

ENOUGH = 0.05  # of the weights: a gap that is closed at once
MOST_ROUNDS = 50


@dataclass(frozen=True)
class Cooked:
    """The network with its zeros, and how it came to them. rounds: for each the fraction kept by each weak mask, that
    kept by the joined one, and the mean overlap of two weak masks (Jaccard, of what is kept). top1: of the soup and of
    magnitudes alone on the calibration split; empty in mode paper. chosen: which of the two it is. images, seconds: of
    all the training before the first step of the stage.
    """

    network: Network
    rounds: tuple[dict[str, Any], ...]
    top1: dict[str, float]
    chosen: str
    images: int
    seconds: float


def cook(network: Network, settings: Soup, trials: Trials) -> Cooked:
    """Mask a copy; the network stays as it is. A killed soup begins again, with the same outcome.

    Raises: InvalidInput when the network has fewer weights than are to be kept, and when the rounds come to nothing:
    weak masks that agree on so little that their union takes all back.
    """
    if _density(network) < settings.keep:
        raise InvalidInput(
            f"masks.keep: {settings.keep:.0%} of the weights are to be kept, and {_density(network):.1%} are not zero "
            "to begin with",
            "lower keep, or use method: hold",
        )
    kitchen = _Kitchen(settings, trials)
    main, plain = network, network
    rounds: list[dict[str, Any]] = []
    expected = max(1, round((1 - settings.keep) / settings.cut))
    with trials.progress.task("mask soup", expected) as task:
        while True:
            number = len(rounds) * (settings.masks + 1)
            main = kitchen.trained(main, number)
            if settings.mode == "corrected":
                plain = kitchen.trained(plain, number)
            if _density(main) - settings.keep < ENOUGH:
                break
            if len(rounds) == MOST_ROUNDS:
                raise InvalidInput(
                    f"masks: {MOST_ROUNDS} rounds of soup leave {_density(main):.0%} of the weights, "
                    f"{settings.keep:.0%} were asked for: weak masks agree on too little",
                    "cut more at a time (cut), train them longer (steps), or use mode: corrected with more votes",
                )
            main, row = kitchen.round(main, number)
            rounds.append(row)
            task.advance(1, kept=row["kept"])
    main = _to(main, settings, trials.seed)
    if settings.mode == "paper":
        return Cooked(main, tuple(rounds), {}, "soup", kitchen.images, kitchen.seconds)
    plain = _to(plain, settings, trials.seed)
    last = (len(rounds) + 1) * (settings.masks + 1)
    top1 = {name: trials.judge(kitchen.trained(one, last)) for name, one in (("soup", main), ("magnitude", plain))}
    chosen = "magnitude" if top1["magnitude"] > top1["soup"] else "soup"
    best = plain if chosen == "magnitude" else main
    return Cooked(best, tuple(rounds), top1, chosen, kitchen.images, kitchen.seconds)


class _Kitchen:
    """Where networks train and weak masks are joined, and what that has taken so far."""

    def __init__(self, settings: Soup, trials: Trials) -> None:
        self.settings, self.trials = settings, trials
        self.images, self.seconds = 0, 0.0

    def trained(self, start: Network, number: int, members: np.ndarray | None = None) -> Network:
        """A copy after `steps` more steps on these examples (None: all), its zeros held. number: of the training, for
        its seed.
        """
        held = Hold(method="hold") if _density(start) < 1 else None
        seed = self.trials.seed * 1000 + number
        fitted = self.trials.fit(start, self.settings.steps, seed=seed, members=members, masks=held)
        self.images, self.seconds = self.images + fitted.images, self.seconds + fitted.seconds
        return fitted.network

    def round(self, main: Network, number: int) -> tuple[Network, dict[str, Any]]:
        """One round: weak masks, joined and written into a copy of the network."""
        settings, seed, everyone = self.settings, self.trials.seed, self.trials.pool.members
        weights = masks.pool(main)
        total = sum(weight.numel() for weight in weights.values())
        level = max(settings.keep, _density(main) * (1 - settings.cut))
        weak = []
        for index in range(1, settings.masks + 1):
            one = self.trained(main, number + index, _some(everyone, settings.data, seed, number + index))
            masks.cut(one, _magnitude(settings), level, seed)
            weak.append(_flat(masks.pool(one)) != 0)
        votes = settings.votes if settings.mode == "corrected" else 0.0
        kept = joined(weak, votes, _flat(weights).abs(), weights_kept(settings.keep, total))
        parts = kept.split([weight.numel() for weight in weights.values()])
        main = copy.deepcopy(main)
        masks.write(main, {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)})
        pairs = [float((a & b).sum() / (a | b).sum()) for i, a in enumerate(weak) for b in weak[:i]]
        row = {
            "weak": [round(float(one.float().mean()), 6) for one in weak],
            "kept": round(_density(main), 6),
            "overlap": round(sum(pairs) / len(pairs), 6),
        }
        return main, row


def _flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def _to(network: Network, settings: Soup, seed: int) -> Network:
    """A copy with exactly `keep` of its weights, by magnitude of those it still has."""
    network = copy.deepcopy(network)
    masks.cut(network, _magnitude(settings), settings.keep, seed)
    return network


def _magnitude(settings: Soup) -> Magnitude:
    return Magnitude(method="magnitude", keep=settings.keep, schedule="one_shot", begin=0.0)


def _density(network: Network) -> float:
    """Fraction of the pool's weights that are not zero."""
    density: float = masks.densities(network)["global"]
    return density


def _some(members: np.ndarray, share: float, seed: int, number: int) -> np.ndarray:
    """A random subset of the examples, ascending."""
    rng = np.random.default_rng([seed, number, 2])
    return np.sort(rng.permutation(members)[: kept_count(len(members), share)])
