"""Tickets as training and testing use them: read, checked, turned into a pool, and every accuracy with its policy
named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..methods import InvalidInput
from .architecture import Architecture, SwinArchitecture
from .dataset import Images, Splits
from .evaluate import top1
from .network import Network
from .ranking import by_chance
from .swin import TicketUse, check_use
from .training import Normaliser, Pool
from .vit import ViT


@dataclass(frozen=True)
class Tickets:
    """kept (m,) positions in the training split. ranks: of the training split (M, N), or None where all patches are
    kept; patches: kept of each image.
    """

    kept: np.ndarray
    ranks: np.ndarray | None
    ranks_test: np.ndarray | None
    patches: int
    record: dict[str, Any]

    @property
    def shape(self) -> tuple[tuple[int, int], int] | None:
        """Patches of the grid, h and w, and how many of an image are kept; None for whole images."""
        if self.ranks is None:
            return None
        h, w = self.record["patches"]["grid"]
        return (int(h), int(w)), self.patches

    @property
    def scoring_macs(self) -> int | None:
        """What choosing cost, a selector's own training included; None when the artifact does not say."""
        parts = [self.record.get("cost", {}).get(name) for name in ("scoring_macs", "selector_macs")]
        return None if None in parts else sum(parts)


def load(folder: Path) -> Tickets:
    """Read a tickets artifact. Raises: InvalidInput when a file does not hold what it should."""
    try:
        record = json.loads((folder / "tickets.json").read_text(encoding="utf-8"))
        patches, of = int(record["patches"]["kept_per_image"]), int(record["patches"]["of"])
        kept = np.load(folder / "kept.npy", allow_pickle=False)
        whole = patches == of
        ranks, ranks_test = (
            None if whole else np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("ranks", "ranks_test")
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{folder}: not a readable tickets artifact ({error})") from error
    return Tickets(kept, ranks, ranks_test, patches, record)


def adapt(network: Network, tickets: Tickets | None, use: Literal["zero", "mosaic"] | None) -> Network:
    """The network as it takes these tickets; use: the setting train.patches.

    Raises: InvalidInput as ticket_use.
    """
    found = ticket_use(network.architecture, use, None if tickets is None else tickets.shape)
    return network if found is None or isinstance(network, ViT) else network.with_tickets(found)


def ticket_use(
    architecture: Architecture | SwinArchitecture,
    use: Literal["zero", "mosaic"] | None,
    shape: tuple[tuple[int, int], int] | None,
) -> TicketUse | None:
    """How a network takes tickets; None where there is nothing to choose.

    shape: the tickets' grid and the patches kept of an image; None for whole images.
    Raises: InvalidInput when the family and the setting do not go together, or the tickets do not fit.
    """
    if isinstance(architecture, Architecture):
        if use is not None:
            raise InvalidInput(
                f"train.patches: {use} is for Swin; {architecture.model} embeds the kept patches only",
                "leave it out",
                field="patches",
            )
        return None
    if shape is None:
        return None
    if use is None:
        raise InvalidInput(
            f"{architecture.model} cannot leave out single patches",
            "set train.patches: zero (blanks the others) or mosaic (packs the kept ones), or ticket.patches.keep: 1.0",
            field="patches",
        )
    found = TicketUse(use, *shape)
    check_use(architecture, found)
    return found


def check(tickets: Tickets | None, splits: Splits, patches: int | None, cutmix: float) -> None:
    """Refuse tickets of other data or of another patch grid, and settings that contradict them.

    patches: N of the network; None where only the tickets' examples are used.
    """
    if tickets is None:
        return
    examples = len(splits.train)
    of = int(tickets.record["patches"]["of"])
    if patches is not None and of != patches:
        raise InvalidInput(
            f"the tickets rank {of} patches of an image, the network has {patches}",
            "run the ticket stage for this model",
        )
    if tickets.ranks_test is not None and len(tickets.ranks_test) != len(splits.test):
        raise InvalidInput(
            f"the tickets rank {len(tickets.ranks_test)} test images, the test split has {len(splits.test)}",
            "run the ticket stage on this data",
        )
    if (
        len(tickets.kept) == 0
        or int(tickets.kept.max()) >= examples
        or len(np.unique(tickets.kept)) != len(tickets.kept)
    ):
        raise InvalidInput(
            f"the tickets name images that this training split of {examples} does not have",
            "run the ticket stage on this data",
        )
    if tickets.ranks is not None and len(tickets.ranks) != examples:
        raise InvalidInput(
            f"the tickets rank {len(tickets.ranks)} images, the training split has {examples}",
            "run the ticket stage on this data",
        )
    if tickets.ranks is not None and cutmix:
        raise InvalidInput(
            "cutmix pastes a box of another image, and a patch ticket knows only one image",
            "set cutmix: 0, or patches.keep: 1.0",
        )


def pool(images: Images, tickets: Tickets | None) -> Pool:
    """What is trained on; without tickets everything."""
    if tickets is None:
        return Pool(images, np.arange(len(images)))
    return Pool(images, tickets.kept, tickets.ranks, None if tickets.ranks is None else tickets.patches)


def accuracy(
    network: Network, test: Images, tickets: Tickets | None, normalise: Normaliser, device: torch.device, *, seed: int
) -> dict[str, float]:
    """Top-1 on the test split by token policy: all patches; with patch tickets also on tickets and on random patches
    of the same number.
    """
    result = {"all": top1(network, test, normalise, device)}
    if tickets is not None and tickets.ranks_test is not None:
        ranks = {"tickets": tickets.ranks_test, "random": by_chance(len(test), tickets.ranks_test.shape[1], seed)}
        for policy, rank in ranks.items():
            result[policy] = top1(network, test, normalise, device, ranks=rank, patches=tickets.patches)
    return result
