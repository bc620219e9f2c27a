"""What a network learns from a teacher, as settings. Imports no torch, so that a pipeline can be checked in
milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .recipe import Settings
from .token_settings import Tokens


class Features(Settings):
    """Learning from a teacher's hidden states: all tokens, as its blocks leave them, whole and at any width."""

    weight: float = Field(
        1.0, gt=0, le=1000, description="of the states' loss, added to the others; it is 2 for unrelated states, 0 for "
        "equal ones, mean over the blocks"
    )  # fmt: skip
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="the teacher's blocks after which states are compared, from 0; the student's block of the same "
        "place must not be cut; null: all blocks that both have",
    )

    @model_validator(mode="after")
    def _different(self) -> Features:
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks: {list(self.blocks)} names a block twice; name each once")
        return self


class Distill(Settings):
    """Learning from a teacher's answers, and from what it makes of an image on the way to them."""

    teacher: str = Field(
        "train", description="a stage (train; of another arm dense/train), an artifact (train@7), or timm:<model>"
    )
    kind: Literal["soft", "hard"] = Field("soft", description="soft: softened outputs; hard: the teacher's decision")
    weight: float = Field(0.5, gt=0, le=1, description="share of the distillation loss; the rest is the labels'")
    temperature: float = Field(2.0, gt=0, le=100, description="softening of both outputs, kind: soft only")
    features: Features | None = Field(None, description="the teacher's hidden states as well; null: its answers alone")

    @model_validator(mode="after")
    def _shows_states(self) -> Distill:
        if self.features is not None and self.teacher.startswith("timm:"):
            raise ValueError(
                f"features: {self.teacher} comes from timm as it is, and shows no hidden states; leave features out, "
                "or name a stage or an artifact"
            )
        return self


def check_features(distill: Distill | None, tokens: Tokens | None) -> None:
    """Refuse to compare states after all blocks where some of them leave fewer tokens. Raises: ValueError."""
    if distill is None or distill.features is None or tokens is None or distill.features.blocks is not None:
        return
    first = min(tokens.blocks)
    raise ValueError(
        f"distill.features: from block {first} on tokens leaves fewer tokens than the teacher has; "
        + (f"set distill.features.blocks to blocks before {first}, or leave tokens out" if first else "leave one out")
    )
