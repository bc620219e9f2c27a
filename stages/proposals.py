"""From the importance of all parts to proposals: the largest network within a limit, cut from the one at hand.

No pipeline file names this module; `prune` looks at a network by it before each of its cuts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from sievit.pipeline.stage import Context

from .axes import pressure
from .methods import InvalidInput

if TYPE_CHECKING:
    import torch

    from .latencies import Table
    from .methods.allocation import Kept, Pressure, Scores
    from .methods.greedy_allocation import Stop, Worth
    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.calibration import Calibration
    from .vision.dataset import Splits
    from .vision.network import Network
    from .vision.preprocessing import Normaliser

    Record = Architecture | SwinArchitecture
    Propose = Callable[[Callable[[Record], float], float], Kept | None]


@dataclass(frozen=True)
class Rule:
    """How candidates are weighed, the same before every cut. depth: blocks of the network as it was given; table: what
    blocks take on this host, None where no time counts.
    """

    depth: int
    table: Table | None
    round_to: int
    head_round_to: int

    @property
    def rounding(self) -> dict[str, int]:
        return {"round_to": self.round_to, "head_round_to": self.head_round_to}

    def estimate(self, architecture: Record) -> float:
        """Of the time that a network takes: milliseconds by the table, else MACs."""
        return float(architecture.macs()) if self.table is None else self.table.ms(architecture)


@dataclass(frozen=True)
class Outlook:
    """What can become of a network. propose: (cost, limit) -> the largest cut whose cost is at most the limit, None
    when there is none; scores, axes: what it goes by; calibration: the images that importance was judged by.
    """

    propose: Propose
    scores: Scores
    axes: Pressure
    calibration: Calibration


def rule_of(ctx: Context, before: Record) -> Rule:
    """By the settings of `prune`, for the network as it was given."""
    config, table = ctx.config, _table(ctx, before)
    return Rule(
        len(before.blocks),
        table,
        config.round_to or (table.round_to if table else 8),
        config.head_round_to or (table.head_round_to if table else 8),
    )


def look(
    ctx: Context,
    rule: Rule,
    network: Network,
    so_far: Kept | None,
    splits: Splits,
    normalise: Normaliser,
    device: torch.device,
) -> Outlook:
    """Judge all parts of a network, on its device. so_far: what earlier cuts have left of the one that was given.

    Raises: InvalidInput as importances.judge, for blocks that there never were, and when the time for measuring
    sensitivity was too short.
    """
    from .importances import judge

    config, record = ctx.config, network.architecture
    scores, calibration = judge(ctx, config.judging, network, splits, normalise, device)
    axes = pressure(config.pressed(), rule.depth, so_far)
    if config.allocation == "uniform":
        propose = _by_rank(scores, rule, axes, record)
    else:
        propose = _by_price(scores, _worth(ctx, scores, axes), rule, axes, record)
    return Outlook(propose, scores, axes, calibration)


def _table(ctx: Context, before: Record) -> Table | None:
    """What blocks take on this host, where that is asked for and can be told by operators."""
    from .latencies import table

    config = ctx.config
    serving = config.target.serving
    if not config.timed or serving.provider != "cpu":
        return None
    return table(ctx, before, serving.batch, serving.threads)


def _by_rank(scores: Scores, rule: Rule, axes: Pressure, before: Record) -> Propose:
    """Proposals of the uniform rule."""
    from .methods.allocation import allocate
    from .vision.surgery import kept_architecture

    def propose(cost: Callable[[Record], float], limit: float) -> Kept | None:
        return allocate(scores, lambda k: cost(kept_architecture(before, k)), limit, axes, **rule.rounding)

    return propose


def _worth(ctx: Context, scores: Scores, axes: Pressure) -> Worth:
    """What cuts lose: importance, or a loss that was measured. Raises: InvalidInput when the time was too short."""
    from .methods.greedy_allocation import ImportanceWorth
    from .methods.sensitivity import trials
    from .sensitivity import not_reached, sensitivity_of

    config = ctx.config
    if config.allocation == "latency":
        return ImportanceWorth(scores)
    found = sensitivity_of(ctx, config.judging, config.sensitivity)
    needed = {(t.axis, t.place) for t in trials(scores, (0.5,)) if getattr(axes, t.axis).touches(t.place)}
    if missing := found.missing(needed):
        raise InvalidInput(
            f"allocation: sensitivity needs every cut of the axes that are on, and {config.sensitivity.seconds:g} s "
            f"did not reach {not_reached(missing)}",
            f"set prune.sensitivity.seconds to {found.enough:.0f} or more, or ask for fewer fractions or images, or "
            "switch axes off (prune.axes)",
        )
    return found.worth()


def _by_price(scores: Scores, worth: Worth, rule: Rule, axes: Pressure, before: Record) -> Propose:
    """Proposals on the way of least lost by millisecond, without a table by MAC."""
    from .methods.allocation import Axis, Pressure, give_back
    from .methods.cost import BlockWidths
    from .methods.greedy_allocation import ImportanceWorth, kept_of, way
    from .vision.block_shapes import macs
    from .vision.surgery import kept_architecture

    def gain(block: int, now: int, then: int) -> float:
        return worth.lost_in_block(block, BlockWidths(1, 1, 1, then), BlockWidths(1, 1, 1, now))

    by = None if isinstance(worth, ImportanceWorth) else gain
    saved = rule.table.milliseconds(before) if rule.table else macs(before)
    down = partial(way, scores, worth, saved, round_to=rule.round_to, head_round_to=rule.head_round_to)

    stops = down(axes)
    finer = (replace(axes, depth=Axis(), embed=Axis()), Pressure(mlp=axes.mlp))

    def propose(cost: Callable[[Record], float], limit: float) -> Kept | None:
        def of(kept: Kept) -> float:
            return cost(kept_architecture(before, kept))

        def crossing(some: Sequence[Stop]) -> int:
            return bisect_left(some, True, key=lambda stop: of(kept_of(stop, scores)) <= limit)

        first = crossing(stops)
        if first == len(stops):
            return None
        found, last = kept_of(stops[first], scores), stops[first - 1] if first else None
        for part in finer:  # the step that crosses the limit may be a whole block: smaller ones come nearer
            if last is None:
                break
            more = down(part, start=last)
            first = crossing(more)
            if first < len(more):
                found = max(kept_of(more[first], scores), found, key=of)
            last = more[first - 1]
        return give_back(scores, found, of, limit, axes.mlp, rule.round_to, by)

    return propose
