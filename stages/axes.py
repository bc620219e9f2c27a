"""The axes of a cut: what can go, how hard each is pressed, and in which blocks.

No pipeline file names this module: it is `prune.axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from .methods import InvalidInput
from .vision.recipe import Settings

if TYPE_CHECKING:
    from .methods.allocation import Kept, Pressure


class Press(Settings):
    """How hard an axis is pressed, and in which blocks."""

    press: float = Field(ge=0, le=1, description="relative to the other axes; 0 leaves the axis alone")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="the only blocks that it is about, numbered from 0; null: all"
    )
    spare: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="blocks that it leaves alone")

    @model_validator(mode="after")
    def _one_list(self) -> Press:
        if self.blocks is not None and self.spare:
            raise ValueError("spare: contradicts blocks, which names the only ones; give one of the two")
        return self


Pressed = Annotated[float, Field(ge=0, le=1)] | Press


class Axes(Settings):
    """How hard each axis is pressed, relative to the others: 0 leaves it alone; or {press: 1.0, blocks: [0, 1]}."""

    heads: Pressed = Field(1.0, description="whole attention heads")
    qk: Pressed = Field(0.5, description="width of queries and keys inside heads")
    v: Pressed = Field(0.5, description="width of values inside heads")
    mlp: Pressed = Field(1.0, description="hidden units of the MLPs")
    embed: float = Field(0.5, ge=0, le=1, description="embedding channels, through the whole network")
    depth: Pressed | None = Field(
        None,
        description="whole blocks; null: 1 where what is lost is weighed (allocation: latency, sensitivity), else 0",
    )

    def named(self, depth: float) -> dict[str, Press]:
        """Every axis in the long form; depth: what null means."""
        axes = {name: depth if axis is None else axis for name, axis in self}
        return {name: axis if isinstance(axis, Press) else Press(press=axis) for name, axis in axes.items()}


def pressure(named: Mapping[str, Press], depth: int, so_far: Kept | None) -> Pressure:
    """The axes with the blocks that they are about, which are numbered as they were before anything was cut; depth:
    blocks that there were then, so_far: what is left of them. Raises: InvalidInput for a block that there never was.
    """
    from .methods.allocation import Axis, Pressure

    check_blocks(named, depth)
    left = list(range(depth)) if so_far is None else so_far.left
    axes = {}
    for name, axis in named.items():
        about = set(range(depth) if axis.blocks is None else axis.blocks) - set(axis.spare)
        numbers = frozenset(number for number, block in enumerate(left) if block in about)
        axes[name] = Axis(axis.press, None if name == "embed" else numbers)
    return Pressure(**axes)


def check_blocks(named: Mapping[str, Press], depth: int, at: Callable[[str], str] = str) -> None:
    """Refuse blocks that a network of this depth does not have. at: a setting's place in pipeline.yaml."""
    for name, axis in named.items():
        for field, blocks in (("blocks", axis.blocks or ()), ("spare", axis.spare)):
            if blocks and max(blocks) >= depth:
                raise InvalidInput(
                    f"prune.axes.{name}.{field}: {list(blocks)} for a network of {depth} blocks",
                    f"use numbers from 0 to {depth - 1}",
                    field=at(f"axes.{name}.{field}"),
                )
