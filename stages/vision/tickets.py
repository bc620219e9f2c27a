"""Tickets as training and testing use them: written, read, checked, turned into a pool, and every accuracy with its
policy named.
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
from .batches import Pool
from .dataset import Images, Splits
from .evaluate import top1
from .network import Network
from .patches import Cached, Drawn, Online, PatchPolicy
from .preprocessing import Normaliser, Preprocessing
from .preprocessing import load as load_preprocessing
from .ranking import ByAttention, by_chance, ranker
from .swin import TicketUse, check_use
from .vit import ViT
from .weights import load_network, save_network

SCHEMA = 2
AGAIN = "run the ticket stage on this data"


@dataclass(frozen=True)
class Tickets:
    """An artifact in memory. N patches an image, `patches` of them kept.

    kept: (m,) positions in the training split. ranks: (M, N) of the training split's plain images, where they are
    cached. ranks_test: (T, N) of the test split's; None where all patches are kept.
    """

    kept: np.ndarray
    ranks: np.ndarray | None
    ranks_test: np.ndarray | None
    patches: int
    record: dict[str, Any]
    folder: Path

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.record["patches"]["grid"]
        return int(rows), int(columns)

    @property
    def shape(self) -> tuple[tuple[int, int], int] | None:
        """Patches of the grid, h and w, and how many of an image are kept; None for whole images."""
        return None if self.ranks_test is None else (self.grid, self.patches)

    @property
    def scoring_macs(self) -> int | None:
        """What choosing cost, a selector's own training included; None when the artifact does not say."""
        parts = [self.record.get("cost", {}).get(name) for name in ("scoring_macs", "selector_macs")]
        return None if None in parts else sum(parts)


def write_record(
    folder: Path, splits: Splits, *, examples: dict[str, Any], patches: dict[str, Any], cost: dict[str, int | None]
) -> None:
    """tickets.json: what was chosen and how, what that cost, and the data that it was chosen from."""
    data = {name: splits[name].fingerprint() for name in ("train", "calibration", "test")}
    record = {"schema": SCHEMA, "cost": cost, "examples": examples, "patches": patches, "data": data}
    (folder / "tickets.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def save_selector(selector: Network, preprocessing: Preprocessing, folder: Path) -> None:
    """The frozen selector beside its tickets, for views and images that have no rank in a table."""
    (folder / "selector").mkdir()
    save_network(selector, folder / "selector")
    preprocessing.save(folder / "selector")


def load_selector(folder: Path, device: torch.device) -> ByAttention:
    """The selector of a tickets artifact, in eval mode, on the device. Raises: InvalidInput when there is none."""
    network = load_network(folder / "selector").to(device).requires_grad_(False)
    if not isinstance(network, ViT):
        raise InvalidInput(f"{folder / 'selector'} holds {network.architecture.model}, which ranks no patches", AGAIN)
    return ByAttention(network, load_preprocessing(folder / "selector").normaliser(device))


def load(folder: Path) -> Tickets:
    """Read a tickets artifact. Raises: InvalidInput when a file does not hold what it should."""
    try:
        record = json.loads((folder / "tickets.json").read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']}, this version reads {SCHEMA}")
        chosen = record["patches"]
        patches, of = int(chosen["kept_per_image"]), int(chosen["of"])
        kept = np.load(folder / "kept.npy", allow_pickle=False)
        stored = chosen["view"] == "cached" and chosen["method"] != "random"
        ranks = np.load(folder / "ranks.npy", allow_pickle=False) if patches < of and stored else None
        ranks_test = np.load(folder / "ranks_test.npy", allow_pickle=False) if patches < of else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder}: not a readable tickets artifact ({error})", AGAIN) from error
    return Tickets(kept, ranks, ranks_test, patches, record, folder)


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


def check(tickets: Tickets | None, splits: Splits, grid: tuple[int, int] | None, cutmix: float) -> None:
    """Refuse tickets of other data or of another patch grid, tables with impossible entries, and settings that
    contradict them.

    grid: (h, w) patches of the tickets that the network takes; None where only the tickets' examples are used.
    """
    if tickets is None:
        return
    _check_data(tickets, splits)
    _check_kept(tickets.kept, len(splits.train))
    if grid is None:
        return
    if tickets.grid != grid:
        raise InvalidInput(
            f"the tickets rank {tickets.grid[0]} x {tickets.grid[1]} patches of an image, "
            f"the network has {grid[0]} x {grid[1]}",
            "run the ticket stage for this model",
        )
    for name, ranks, images in (
        ("ranks", tickets.ranks, splits.train),
        ("ranks_test", tickets.ranks_test, splits.test),
    ):
        if ranks is not None:
            _check_ranks(ranks, (len(images), grid[0] * grid[1]), f"{tickets.folder.name}/{name}.npy")
    if tickets.ranks is not None and cutmix:
        raise InvalidInput(
            "cutmix pastes a box of another image, and a cached patch ticket knows only one image",
            "set cutmix: 0, ticket.patches.view: online, or patches.keep: 1.0",
        )


def _check_data(tickets: Tickets, splits: Splits) -> None:
    """The splits that the tickets are about must be these, by their content."""
    for name in ("train", "calibration", "test"):
        made, here = tickets.record["data"][name], splits[name].fingerprint()
        if made["image_size"] != here["image_size"]:
            raise InvalidInput(
                f"the tickets are for images of {made['image_size']} px, data.image_size is {here['image_size']}", AGAIN
            )
        if made["images"] != here["images"]:
            raise InvalidInput(
                f"the tickets are for a {name} split of {made['images']} images, this one has {here['images']}", AGAIN
            )
        if made["labels"] != here["labels"]:
            raise InvalidInput(
                f"the tickets are for another {name} split: labels and class names have the digest {made['labels']}, "
                f"here {here['labels']}",
                AGAIN,
            )


def _check_kept(kept: np.ndarray, examples: int) -> None:
    """Positions in the training split, each once."""
    if len(kept) == 0:
        raise InvalidInput("the tickets keep no image", AGAIN)
    low, high = int(kept.min()), int(kept.max())
    if low < 0 or high >= examples:
        raise InvalidInput(
            f"the tickets keep image {low if low < 0 else high}, the training split has images 0 to {examples - 1}",
            AGAIN,
        )
    if (different := len(np.unique(kept))) != len(kept):
        raise InvalidInput(f"the tickets keep {len(kept)} images, {len(kept) - different} of them twice", AGAIN)


def _check_ranks(ranks: np.ndarray, shape: tuple[int, int], name: str) -> None:
    """A permutation of 0..N-1 in every row, as far as its highest number and its sums tell."""
    if ranks.shape != shape or ranks.dtype.kind != "u":
        raise InvalidInput(f"{name} holds {ranks.shape} of {ranks.dtype}, expected {shape} unsigned", AGAIN)
    if ranks.size and (highest := int(ranks.max())) >= shape[1]:
        raise InvalidInput(f"{name} names rank {highest}, {shape[1]} patches have ranks 0 to {shape[1] - 1}", AGAIN)
    wrong = np.flatnonzero(ranks.sum(axis=1, dtype=np.int64) != shape[1] * (shape[1] - 1) // 2)
    if len(wrong):
        raise InvalidInput(f"{name}: {len(wrong)} rows are no order of {shape[1]} patches, first row {wrong[0]}", AGAIN)


def policy(tickets: Tickets | None, *, seed: int, device: torch.device) -> PatchPolicy | None:
    """Which patches training sees; None for all. The selector of online tickets is read from their artifact."""
    if tickets is None or tickets.ranks_test is None:
        return None
    grid, method = tickets.grid, tickets.record["patches"]["method"]
    if method == "random":
        return Drawn(grid[0] * grid[1], tickets.patches, seed)
    if tickets.ranks is not None:
        return Cached(tickets.ranks, tickets.patches, grid)
    selector = load_selector(tickets.folder, device) if method in ("attention", "inverse") else None
    macs = 0 if selector is None else selector.selector.architecture.selector_macs()
    return Online(ranker(method, grid, selector), tickets.patches, macs)


def in_words(pool: Pool, use: Literal["zero", "mosaic"] | None, finish: float, network: Network) -> str:
    """The token policy of a training. use: the setting train.patches; finish: share of the steps on all patches;
    network: as it is in the end.
    """
    kind = {None: "tickets", "zero": "tickets with the other patches blanked (no compute saved)", "mosaic": "mosaics"}
    seen = "all" if pool.whole else f"{kind[use]}, then all for {finish:.0%} of the steps"
    left = network.architecture.tokens
    return f"reduced to {left[-1].after} patches" + ("" if pool.whole else f"; {seen}") if left else seen


def pool(images: Images, tickets: Tickets | None, patches: PatchPolicy | None) -> Pool:
    """What is trained on: the tickets' examples (without tickets, all), and these patches of them."""
    return Pool(images, np.arange(len(images)) if tickets is None else tickets.kept, patches)


def accuracy(
    network: Network, test: Images, tickets: Tickets | None, normalise: Normaliser, device: torch.device, *, seed: int
) -> dict[str, float]:
    """Top-1 on the test split by token policy: all patches; with patch tickets also on tickets and on random patches
    of the same number. On the plain test images cached and online tickets are the same.
    """
    result = {"all": top1(network, test, normalise, device)}
    if tickets is not None and tickets.ranks_test is not None:
        ranks = {"tickets": tickets.ranks_test, "random": by_chance(len(test), tickets.ranks_test.shape[1], seed)}
        for name, rank in ranks.items():
            result[name] = top1(network, test, normalise, device, ranks=rank, patches=tickets.patches)
    return result
