"""Which tokens and connections a training step has: token settings on a network, as a function of the step's number
alone, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..methods import InvalidInput
from ..methods.attention_connections import Connections
from ..methods.token_reduction import ramp
from .architecture import Architecture, SwinArchitecture, TokenDrop
from .network import Network
from .token_settings import Connected, Tokens
from .vit import ViT, drops_for


@dataclass(frozen=True)
class TokenSchedule:
    """phases: share of the training at which each ends (ascending, the last 1), and the token reduction until then.
    connections: in force for the first `connected` share of the training.
    """

    phases: tuple[tuple[float, tuple[TokenDrop, ...]], ...]
    connections: Connections | None = None
    connected: float = 1.0

    def at(self, now: float, total: int) -> tuple[TokenDrop, ...]:
        """The reduction of the step that begins when `now` of `total` steps are gone."""
        return next((drops for end, drops in self.phases if now < round(end * total)), self.final)

    @property
    def final(self) -> tuple[TokenDrop, ...]:
        return self.phases[-1][1]

    def settled(self, total: int) -> int:
        """The step from which on the reduction is the final one."""
        return round(self.phases[-2][0] * total) if len(self.phases) > 1 else 0

    def apply(self, network: Network, now: float, total: int) -> None:
        """Give the network, in place, what the step that begins now has."""
        assert isinstance(network, ViT), "check_tokens refuses other families"
        network.set_tokens(network.architecture.with_tokens(self.at(now, total)))
        network.connections = self.connections if now < round(self.connected * total) else None

    def record(self) -> list[dict[str, Any]]:
        """The token counts of the run, for readers."""
        return [{"until": round(end, 4), "keep": [drop.after for drop in drops]} for end, drops in self.phases]


def create(
    architecture: Architecture | SwinArchitecture,
    tokens: Tokens | None,
    attention: Connected | None = None,
    *,
    finish: float = 0.0,
) -> TokenSchedule | None:
    """The schedule of these settings; None where both are off. finish: the share of the steps, at the end, without
    connections, as the network is deployed.

    Raises: InvalidInput as check_tokens and check_connections.
    """
    if tokens is None and attention is None:
        return None
    connections = None
    if attention is not None:
        blocks = attention.blocks or (() if tokens is None else tokens.blocks)
        architecture = check_connections(blocks, architecture)
        connections = Connections(attention.keep, attention.mode, blocks)
    phases: list[tuple[float, tuple[TokenDrop, ...]]] = [(1.0, ())]
    if tokens is not None:
        architecture = check_tokens(tokens, architecture)
        levels = [(1.0, tokens.keep)]
        if tokens.ramp is not None:
            down = tokens.ramp
            levels = ramp(down.start, tokens.keep, down.warmup, down.length, down.levels)
        phases = []
        for end, keep in levels:
            drops = drops_for(architecture, tokens.blocks, keep, tokens.method, tokens.fuse)
            if phases and phases[-1][1] == drops:  # rounding makes them one
                phases.pop()
            phases.append((end, drops))
    return TokenSchedule(tuple(phases), connections, 1 - finish)


def check_tokens(tokens: Tokens, architecture: Architecture | SwinArchitecture) -> Architecture:
    """Raises: InvalidInput for a network that cannot reduce tokens so; its field is one of the stage's settings."""
    if isinstance(architecture, SwinArchitecture):
        raise InvalidInput(
            f"tokens: {architecture.model} cannot drop tokens: its windows must stay whole",
            "leave tokens out",
            field="tokens",
        )
    _check_blocks("tokens.blocks", tokens.blocks, architecture)
    if not drops_for(architecture, tokens.blocks, tokens.keep, tokens.method, tokens.fuse):
        raise InvalidInput(
            f"tokens.keep: {tokens.keep:g} of {architecture.patches} patches leaves no fewer tokens than there are",
            "keep less",
            field="tokens.keep",
        )
    return architecture


def check_connections(blocks: tuple[int, ...], architecture: Architecture | SwinArchitecture) -> Architecture:
    """Raises: InvalidInput for a network whose connections cannot be chosen so, as check_tokens."""
    if isinstance(architecture, SwinArchitecture):
        raise InvalidInput(
            f"attention: {architecture.model} attends in windows, whose connections stay",
            "leave attention out",
            field="attention",
        )
    if not architecture.prefix:
        raise InvalidInput(
            f"attention: {architecture.model} has no prefix token, to which every patch token stays connected",
            "leave attention out, or use a model with a class token",
            field="attention",
        )
    _check_blocks("attention.blocks", blocks, architecture)
    if min(blocks) == len(architecture.blocks) - 1:
        raise InvalidInput(
            f"attention.blocks: {list(blocks)} is the last block, and connections are chosen for those that follow",
            f"name an earlier block, 0 to {len(architecture.blocks) - 2}" if min(blocks) else "leave attention out",
            field="attention.blocks",
        )
    return architecture


def _check_blocks(field: str, blocks: tuple[int, ...], architecture: Architecture) -> None:
    depth = len(architecture.blocks)
    if max(blocks) >= depth or len(set(blocks)) != len(blocks):
        raise InvalidInput(
            f"{field}: {list(blocks)} for a network of {depth} blocks",
            f"use different numbers from 0 to {depth - 1}",
            field=field,
        )


def phases(
    network: Network, schedule: TokenSchedule | None, kept: int | None, finish: float
) -> list[tuple[float, bool, int]]:
    """What an image costs in the course of a training: the share of the steps at which each part ends, whether it is
    on tickets of `kept` patches (None: there are none), and the forward MACs of an image in it.
    """
    last = 1 - finish
    ends = {last, 1.0} | (set() if schedule is None else {end for end, _ in schedule.phases})
    parts = []
    for end in sorted(ends):
        drops = () if schedule is None else next(drops for until, drops in schedule.phases if end <= until)
        reduced = network if schedule is None else network.with_tokens(drops)
        ticketed = kept is not None and end <= last
        parts.append((end, ticketed, reduced.ticket_cost(kept if ticketed else None)[1]))
    return parts
