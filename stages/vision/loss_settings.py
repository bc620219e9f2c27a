"""What a training adds to the loss of its labels, as settings. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .recipe import Settings
from .token_settings import Connected, Tokens

HANDED_ON = ("group_lasso", "hoyer", "movement")  # penalties that tell prune what to cut


class Penalty(Settings):
    """A penalty added to the loss."""

    method: Literal["group_lasso", "hoyer", "movement", "l1", "l2", "attention_log", "attention_entropy"] = Field(
        "group_lasso",
        description="group_lasso: sum of group norms of heads and MLP units; hoyer: Hoyer-square of these norms, which "
        "shrinks the small ones only; movement: group_lasso that presses least on what the labels make larger; l1, l2: "
        "on the blocks' matrices; attention_log: mean log(1 + a^2) of the last block, as published; attention_entropy: "
        "of the rows of all blocks, in nats",
    )
    strength: float = Field(1e-4, gt=0, description="its weight in the loss")

    @property
    def of_attention(self) -> bool:
        """Whether it looks at attention maps rather than at weights."""
        return self.method.startswith("attention_")


class TokenLabels(Settings):
    """A soft label for every patch, which the second head of an LV-ViT learns."""

    source: str = Field(description="who labels: a stage of this pipeline, an artifact (train@7), or timm:<model>")
    weight: float = Field(0.5, gt=0, le=10, description="of the patches' loss; that of the class token has 1")
    top: int | None = Field(None, ge=1, description="classes that a label keeps, renormalised; null: all")


def check_losses(
    penalty: Penalty | None, labels: TokenLabels | None, tokens: Tokens | None, attention: Connected | None
) -> None:
    """Refuse losses on patches that are dropped, and on attention that is not there. Raises: ValueError."""
    if labels is not None and tokens is not None:
        raise ValueError(
            "tokens: token_labels asks the network about every patch, and tokens drops some; leave one of them out"
        )
    merged = tokens is not None and tokens.method == "tome"
    if penalty is not None and penalty.of_attention and (attention or merged):
        raise ValueError(
            f"weights.method: {penalty.method} looks at attention as it is without "
            f"{'attention.keep' if attention else 'tokens.method: tome'}; leave one of them out"
        )
