"""Time of a training step against the fraction of patches kept: DeiT-T at 224 px (patch 16) and at 32 px (patch 4).

    python bench/step_time.py [--keep 0.75 0.5 0.25] [--rounds 15] [--device cuda] [--selector deit_small_patch16_224]

A step is forward, backward and AdamW. Every round takes one step of each kind, in an order that turns from round to
round, so that a machine that is slow for a while is slow for all; ratios are within a round, their median and quartiles
over rounds. For a ticket three times are taken: the step of the student on indices that are there already, looking them
up (cached: ranks carried through the view's geometry), and finding them (online: a frozen selector of the student's own
size, or --selector, that looks at the view). Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sievit.stages.methods.patch_tickets import random_ranks
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.vision.network import create
from sievit.stages.vision.patches import Cached, Online, PatchPolicy, Views
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.ranking import ByAttention
from sievit.stages.vision.selector import arrange
from sievit.stages.vision.vit import ViT

STUDENT = "deit_tiny_patch16_224"
SETTINGS: dict[int, tuple[dict[str, Any], int]] = {  # image size -> arguments of the model, images a step
    224: ({}, 4),
    32: ({"patch_size": 4}, 16),
}


class Bench:
    """One image size: a student, and for every keep rate its cached and its online policy."""

    def __init__(self, size: int, keeps: Sequence[float], selector: str, device: torch.device) -> None:
        args, self.batch = SETTINGS[size]
        self.device = device
        self.student = create(STUDENT, classes=10, image_size=size, args=args).to(device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.images = torch.rand(self.batch, 3, size, size, device=device)
        self.labels = torch.randint(10, (self.batch,), device=device)
        shape = self.student.architecture
        ranks = random_ranks(torch.arange(self.batch), shape.patches, seed=0).numpy().astype(np.uint8)
        frozen = create(selector, classes=10, image_size=size, args=args).to(device).requires_grad_(False)
        half = Normaliser((0.5,) * 3, (0.5,) * 3, device)
        self.policies: dict[float, tuple[PatchPolicy, PatchPolicy]] = {}
        for keep in keeps:
            count = keep_count(shape.patches, keep)
            dropping = frozen.with_tokens(arrange(frozen.architecture, shape, None, count)).eval()
            assert isinstance(dropping, ViT), "a selector is a ViT"
            online = Online(ByAttention(dropping, half), count, dropping.architecture.selector_macs())
            self.policies[keep] = Cached(ranks, count, shape.grid), online

    def step(self, kept: torch.Tensor | None) -> None:
        loss = torch.nn.functional.cross_entropy(self.student(self.images, kept), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def timed(self, act: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what it gave."""
        self._wait()
        begun = time.perf_counter()
        result = act()
        self._wait()
        return time.perf_counter() - begun, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def round(self, number: int) -> dict[str, float]:
        """Seconds of everything once."""
        theta = torch.tensor([[-1.0, 0, 0.1], [0, 1, -0.1]]).expand(self.batch, -1, -1)
        views = Views(np.arange(self.batch), theta, 1.0, number, self.images)
        times: dict[str, float] = {}
        kinds: list[float | None] = [None, *self.policies]
        first = number % len(kinds)
        for keep in kinds[first:] + kinds[:first]:
            if keep is None:
                times["dense"], _ = self.timed(partial(self.step, None))
                continue
            cached, online = self.policies[keep]
            times[f"lookup {keep}"], kept = self.timed(partial(cached.kept, views))
            times[f"selector {keep}"], _ = self.timed(partial(online.kept, views))
            times[f"student {keep}"], _ = self.timed(partial(self.step, kept))
        return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """A row for each keep rate. speedup: dense seconds over the student's; speedup_cached, speedup_online: with the
    lookup, with the selector in it.
    """
    bench.round(0)  # warm-up
    taken = [bench.round(number) for number in range(rounds)]
    shape = bench.student.architecture
    rows = []
    for keep, (cached, online) in bench.policies.items():
        parts = {name: [t[f"{name} {keep}"] for t in taken] for name in ("student", "lookup", "selector")}
        parts["dense"] = [t["dense"] for t in taken]
        row: dict[str, Any] = {"image_size": shape.image_size, "batch": bench.batch, "keep": keep}
        row |= {"kept": cached.count, "of": shape.patches}
        row |= {f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in parts.items()}
        for name, more in (("speedup", None), ("speedup_cached", "lookup"), ("speedup_online", "selector")):
            added = [0.0] * rounds if more is None else parts[more]
            steps = zip(parts["dense"], parts["student"], added, strict=True)
            row[name] = spread([dense / (student + extra) for dense, student, extra in steps])
        trained = 3 * bench.student.ticket_cost(cached.count)[1]
        row["speedup_by_macs"] = round(3 * shape.macs() / trained, 3)
        row["speedup_online_by_macs"] = round(3 * shape.macs() / (trained + online.macs), 3)
        rows.append(row)
    return rows


def shown(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.75, 0.5, 0.25])
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=15, help="2 or more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--selector", default=STUDENT, help="a timm ViT whose patches are the student's")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in arguments.sizes:
        bench = Bench(size, arguments.keep, arguments.selector, torch.device(arguments.device))
        for row in measure(bench, arguments.rounds):
            rows.append(row)
            print(
                f"{size} px, batch {row['batch']}, {row['kept']:>3} of {row['of']} patches: "
                f"dense {row['dense_ms']:.0f} ms, student {row['student_ms']:.0f} ms, {shown(row['speedup'])} faster; "
                f"cached {shown(row['speedup_cached'])}, online {shown(row['speedup_online'])}; "
                f"by MACs {row['speedup_by_macs']:.2f}x, online {row['speedup_online_by_macs']:.2f}x",
                flush=True,
            )
    print(json.dumps({**vars(arguments), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
