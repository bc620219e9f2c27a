"""What the settings of a training ask of its network, looked up in the record of the network before anything runs."""

from __future__ import annotations

from ..methods import InvalidInput
from . import masks
from .architecture import Architecture, SwinArchitecture
from .example_settings import InfoBatch, Subset, Swap
from .loss_settings import Penalty, TokenLabels
from .mask_settings import MaskSettings, Pattern
from .penalty import ATTENTION, no_rows


def check_heads(architecture: Architecture | SwinArchitecture, labels: TokenLabels | None) -> None:
    """Token labels need a head for patches. Raises: InvalidInput; its field is one of the stage's settings, here and
    below.
    """
    if labels is not None and not architecture.token_heads:
        raise InvalidInput(
            f"token_labels: {architecture.model} has no head that answers for its patch tokens",
            "leave token_labels out, or use lvvit_t, lvvit_s or lvvit_m",
            field="token_labels",
        )


def check_attention(architecture: Architecture | SwinArchitecture, penalty: Penalty | None) -> None:
    """A penalty on attention needs attention among all tokens."""
    if penalty is not None and penalty.method in ATTENTION and not isinstance(architecture, Architecture):
        refusal = no_rows(architecture.model, penalty.method)
        refusal.field = "weights.method"
        raise refusal


def check_fours(architecture: Architecture | SwinArchitecture, settings: MaskSettings | None) -> None:
    """A pattern needs widths that are multiples of four, as the model block has them."""
    if not isinstance(settings, Pattern):
        return
    try:
        masks.check_outline(architecture.model, image_size=architecture.image_size, args=architecture.args)
    except InvalidInput as error:
        error.field = "masks.pattern"
        raise


def check_class_token(architecture: Architecture | SwinArchitecture, policy: Swap | InfoBatch | Subset | None) -> None:
    """Swaps as in the paper sort by the attention of the class token."""
    if isinstance(policy, Swap) and policy.mode == "paper" and not architecture.prefix:
        raise InvalidInput(
            f"examples.mode: paper sorts by the attention of the class token, and {architecture.model} has none",
            "use mode: corrected",
            field="examples.mode",
        )
