"""Proof that an exported file answers as its network does, on images that neither has seen.

Each side makes its input of the pixels by its own preprocessing, torch's and the sidecar's, so that the two are
compared as well. Logits and class are compared at batch 1 and N, with the network's fused attention and with the plain
products that were exported. With token reduction the tokens that every block keeps are compared as sets of the patches
behind them: TopK's choice is read from the file, torch's from the network. They may differ only by tokens whose scores,
torch's own, are as good as equal; such an image then says nothing about the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .vision.architecture import Architecture, TokenDrop
    from .vision.network import Network
    from .vision.preprocessing import Preprocessing
    from .vision.vit import ViT

ALONE = 32  # images that are shown one at a time
AT_ONCE = 32  # images that the network sees at once


@dataclass(frozen=True, slots=True)
class KeptSets:
    """How far two runtimes keep the same tokens. blocks: that drop tokens."""

    blocks: int
    images: int
    equal: float  # share of images whose sets are equal in every block
    tied: NDArray[np.bool_]  # (M,), images whose sets differ, first by tokens of equal score
    wrong: NDArray[np.bool_]  # (M,), images whose sets differ otherwise

    def as_json(self) -> dict[str, Any]:
        """agreement: share of images whose sets are equal, or differ by a tie."""
        counts = {"tied": int(self.tied.sum()), "wrong": int(self.wrong.sum())}
        return {"blocks": self.blocks, "equal": self.equal, "agreement": float(1 - self.wrong.mean()), **counts}


def parity(
    network: Network, path: Path, preprocessing: Preprocessing, pixels: NDArray[np.uint8], batch: int, tolerance: float
) -> dict[str, Any]:
    """Compare the file at `path`, whose sidecar is written, with the network that it was made of.

    pixels: uint8 [M, size, size, 3]. batch: the N. tolerance: the allowed difference of a logit; by at most as much of
    their mean do scores of tokens differ that count as equal.
    Returns: max_abs, the largest difference of a logit, also by attention path; top1_agreement, the share of equal
    classes, those left aside whose two best logits are closer than tolerance; images; batches; kept_sets or None.
    """
    import numpy as np
    import torch

    from .deploy.isa import usable_cores
    from .deploy.predict import scores
    from .vision.attention import set_fused

    network.eval()
    images = preprocessing.normaliser(torch.device("cpu"))(
        torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255.0)
    )
    sets, sure = None, np.ones(len(pixels), dtype=bool)
    if network.architecture.tokens:
        set_fused(network, True)
        sets = kept_sets(network, path, images, pixels, tolerance)  # type: ignore[arg-type]  # no Swin has tokens
        sure = ~(sets.tied | sets.wrong)
    cores = len(usable_cores())
    answers = [scores(path, shown, batch=size, threads=cores) for shown, size in ((pixels[:ALONE], 1), (pixels, batch))]
    worst: dict[str, float] = {}
    disagreements, compared = 0, 0
    for name, fused in (("plain", False), ("fused", True)):
        set_fused(network, fused)
        with torch.inference_mode():
            expected = torch.cat([network(part) for part in images.split(AT_ONCE)]).numpy()
        worst[name] = 0.0
        for answer in answers:
            wanted, clear = expected[: len(answer)], sure[: len(answer)]
            # initial: of no image; maximum keeps NaN, which max() would lose
            difference = np.abs(answer - wanted)[clear].max(initial=0)
            worst[name] = float(np.maximum(worst[name], difference))
            top = np.sort(wanted, axis=1)
            decided = clear & ~(top[:, -1] - top[:, -2] <= tolerance)
            disagreements += int(((answer.argmax(1) != wanted.argmax(1)) & decided).sum())
            compared += int(clear.sum())
    return {
        "max_abs": float(np.maximum(worst["plain"], worst["fused"])),
        "by_attention": worst,
        "images": len(images),
        "top1_agreement": 1 - disagreements / compared if compared else 0.0,
        "batches": [1, batch],
        "kept_sets": None if sets is None else sets.as_json(),
    }


def kept_sets(network: ViT, path: Path, images: torch.Tensor, pixels: NDArray[np.uint8], tolerance: float) -> KeptSets:
    """Which tokens the network keeps of the normalised images (M, 3, S, S), and the file of their pixels."""
    import torch

    from .deploy.probe import kept_indices

    with torch.inference_mode():
        seen = [network.select(part) for part in images.split(AT_ONCE)]
    scored = [torch.cat(block).numpy() for block in zip(*(part[0] for part in seen), strict=True)]
    ours = [torch.cat(block).numpy() for block in zip(*(part[1] for part in seen), strict=True)]
    theirs = kept_indices(path, pixels)
    drops = network.architecture.tokens
    # A file merges by the order of all tokens of the first set; the last of them stay.
    theirs = [
        every[:, every.shape[1] - kept.shape[1] :] if drop.method == "tome" else every
        for drop, every, kept in zip(drops, theirs, ours, strict=True)
    ]
    return compare_sets(network.architecture, scored, ours, theirs, tolerance)


def compare_sets(
    architecture: Architecture,
    scored: Sequence[NDArray[np.float32]],
    ours: Sequence[NDArray[np.int64]],
    theirs: Sequence[NDArray[np.int64]],
    tolerance: float,
) -> KeptSets:
    """Compare places kept, (M, K) for every block that drops tokens, in two orders of the tokens.

    scored: (M, n), torch's scores of the tokens that reached each block. An image is looked at until its sets first
    differ: from there on its blocks see other tokens. Of tokens that ToMe leaves alone the order counts as well: the
    next merging splits them in turns.
    """
    import numpy as np

    images = len(scored[0])
    tied, wrong = np.zeros(images, dtype=bool), np.zeros(images, dtype=bool)
    pairs = zip(architecture.tokens, scored, _behind(architecture, ours), _behind(architecture, theirs), strict=True)
    for drop, score, (reaching, first), (_, second) in pairs:
        ordered = drop.method == "tome"
        order = (first, second) if ordered else (np.sort(first, axis=1), np.sort(second, axis=1))
        different = (order[0] != order[1]).any(axis=1) & ~(tied | wrong)
        for image in np.flatnonzero(different):
            of = dict(zip(reaching[image].tolist(), score[image].tolist(), strict=True))
            apart = _apart(of, first[image].tolist(), second[image].tolist(), ordered)
            close = apart <= tolerance * float(np.abs(score[image]).mean())
            (tied if close else wrong)[image] = True
    return KeptSets(len(scored), images, float(1 - (tied | wrong).mean()), tied, wrong)


def _apart(of: dict[int, float], first: list[int], second: list[int], ordered: bool) -> float:
    """How far the scores of tokens lie apart that were taken for each other. of: token -> score."""
    lost, won = set(first) - set(second), set(second) - set(first)
    apart = max(of[token] for token in lost) - min(of[token] for token in won) if lost else 0.0
    exchanged = [abs(of[one] - of[other]) for one, other in zip(first, second, strict=True)] if ordered else []
    return max([apart, *exchanged])


def _behind(
    architecture: Architecture, kept: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For every block that drops tokens: the patches behind the tokens that are ranked, (M, n), and behind those kept,
    (M, K). A fused token, which has many, gets a number of its own; a merged one is known by its place.
    """
    import numpy as np

    tokens = np.tile(np.arange(architecture.patches), (len(kept[0]), 1))
    for number, (drop, places) in enumerate(zip(architecture.tokens, kept, strict=True)):
        ranked = tokens[:, ::2] if drop.method == "tome" else tokens
        chosen = np.take_along_axis(ranked, places, axis=1)
        yield ranked, chosen
        tokens = np.concatenate([chosen, *_joined(drop, tokens, architecture.patches + number)], axis=1)


def _joined(drop: TokenDrop, tokens: NDArray[np.int64], name: int) -> list[NDArray[np.int64]]:
    """What goes on beside the tokens that are kept: ToMe's second set, or a fused token."""
    import numpy as np

    if drop.method == "tome":
        return [tokens[:, 1::2]]
    return [np.full((len(tokens), 1), name)] if drop.fuse else []
