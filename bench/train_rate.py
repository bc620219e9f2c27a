"""The training loop beside timm's own: what the loader takes of a step, and images a second on equal work.

    python bench/train_rate.py [--timm-train train.py] [--source torch/cifar10 --root data] [--device cuda --workers 8]

DeiT-T at 32 px with patches of 4, from nothing: AdamW, clipping, label smoothing, mixup, random crops and flips.

1. The loader's share: everything of a step that is neither forward, backward nor update (order, pixels, augmentation,
   mixing, normalisation, the patches that are kept), with whole images and with tickets. Clipping and averaging are a
   part of the update.
2. Images a second. Three runs take turns, in an order that turns from round to round: timm on whole images, Sievit's
   `fit` on whole images, and `fit` on tickets. Each round is a fresh run whose first steps are not counted, and a ratio
   is within a round. timm reads a folder of PNG files, written here from the pixels that Sievit has in memory.
   --timm-train names timm's own train.py (in its repository, not in its wheel), which runs as a user would run it and
   whose own printed rates are read; without it timm's parts are put together here in that script's order.
   "ticket, a pass": a ticket keeps --keep of the examples and --keep of the patches, so a pass over its examples counts
   as one over all of them. "ticket, an image" leaves the examples out: as many images, each with fewer patches. Neither
   has a share of the schedule on whole images (`finish`), nor what choosing the ticket took.

Processor seconds are those of a process and its children. On a host with other work they are what can be compared, and
--clock processor lets them decide; a GPU does not show in them. timm's workers read ahead, so that a part of their work
falls into the steps that are not counted. Prints tables and, last, one line of JSON. Exit code 1 when a bar is missed:
on a CPU a loader under 5% of a step, 1x timm's rate, and 1.5x for a pass with a ticket; on a GPU 3x timm's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from PIL import Image

from sievit.pipeline.settings import DataConfig
from sievit.stages.methods.patch_tickets import random_ranks
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import Images, load_split
from sievit.stages.vision.device import open_device
from sievit.stages.vision.network import Network, create
from sievit.stages.vision.patches import Cached
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.training import fit

MODEL, SIZE = "deit_tiny_patch16_224", 32
LR, DECAY, CLIP, SMOOTHING, MIXUP = 1e-3, 0.05, 1.0, 0.1, 0.8
CROP = 0.8  # smallest side of a random crop; its aspect stays 1
HALF = (0.5, 0.5, 0.5)  # mean and std of every channel
LOADER_SHARE, RATE, GPU_RATE, TICKET_RATE = 0.05, 1.0, 3.0, 1.5  # the bars
TIMM_STEP = re.compile(r"Train: .*? Time: [\d.]+s, +([\d.]+)/s")


@dataclass(frozen=True)
class Seconds:
    """Of a clock on the wall, and of a processor."""

    wall: float
    processor: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.processor - other.processor)

    def __truediv__(self, steps: int) -> Seconds:
        return Seconds(self.wall / steps, self.processor / steps)


def now(device: torch.device) -> Seconds:
    """Of this process alone."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def now_of(family: psutil.Process) -> Seconds:
    """Of a process and its children. Some milliseconds for a look at all processes: not for every step."""
    used = 0.0
    for process in (family, *family.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return Seconds(time.perf_counter(), used)


@dataclass(frozen=True)
class Work:
    """What all sides are given. members: as many as all steps take, again from the first where the data has fewer."""

    images: Images
    batch: int
    steps: int  # that are counted
    warm: int  # before them
    patch: int
    depth: int
    ema: float | None
    keep: float
    device: torch.device

    @property
    def members(self) -> np.ndarray:
        return np.resize(np.arange(len(self.images)), (self.steps + self.warm) * self.batch)

    @property
    def classes(self) -> int:
        return len(self.images.classes)

    @property
    def args(self) -> dict[str, Any]:
        return {"patch_size": self.patch, "depth": self.depth}

    def network(self) -> Network:
        torch.manual_seed(0)
        return create(MODEL, classes=self.classes, image_size=SIZE, args=self.args).to(self.device).train()

    def recipe(self) -> Recipe:
        augment = Augmentation(shift=0.0, zoom=CROP, flip=True)
        return Recipe(
            steps=self.steps + self.warm, batch_size=self.batch, lr=LR, weight_decay=DECAY, warmup=0.0, clip=CLIP,
            smoothing=SMOOTHING, mixup=MIXUP, ema=self.ema, augment=augment,
        )  # fmt: skip

    def pool(self, network: Network, ticketed: bool) -> Pool:
        shape = network.architecture
        if not ticketed:
            return Pool(self.images, self.members)
        ranks = random_ranks(torch.arange(len(self.images)), shape.patches, seed=0).numpy().astype(np.uint8)
        return Pool(self.images, self.members, Cached(ranks, keep_count(shape.patches, self.keep), shape.grid))


@dataclass(frozen=True)
class Step:
    """What comes before the network is called, and from there to the end of the update."""

    loader: Seconds
    rest: Seconds


def of_fit(work: Work, *, ticketed: bool) -> list[Step]:
    """Each counted step of a fresh run."""
    network = work.network()
    called, done = [], [now(work.device)]
    network.register_forward_pre_hook(lambda module, inputs: called.append(now(work.device)))
    fit(
        network,
        work.pool(network, ticketed),
        work.recipe(),
        seed=0,
        device=work.device,
        normalise=Normaliser(HALF, HALF, work.device),
        tick=lambda steps, values: done.append(now(work.device)),
    )
    steps = zip(done, called, done[1:], strict=False)
    return [Step(call - before, after - call) for before, call, after in steps][work.warm :]


def a_step(steps: Sequence[Step]) -> Seconds:
    """The mean."""
    nothing = Seconds(0.0, 0.0)
    return sum((step.loader + step.rest for step in steps), nothing) / len(steps)


def loader_share(work: Work, ticketed: bool) -> dict[str, Any]:
    """One row of the first table."""
    steps = of_fit(work, ticketed=ticketed)
    row: dict[str, Any] = {"images": "ticket" if ticketed else "whole", "batch": work.batch}
    for clock in ("wall", "processor"):
        row[clock] = spread([getattr(step.loader, clock) / getattr(step.loader + step.rest, clock) for step in steps])
    return row | {"loader_ms": round(1e3 * statistics.median(step.loader.wall for step in steps), 2)}


def timm_arguments(work: Work, folder: Path, workers: int) -> list[str]:
    """The command line of timm's train.py for this work: one epoch, every step told."""
    values = {
        "data-dir": folder, "device": work.device.type, "workers": workers, "output": folder / "output",
        "model": MODEL, "num-classes": work.classes, "img-size": SIZE, "batch-size": work.batch,
        "opt": "adamw", "lr": LR, "weight-decay": DECAY, "clip-grad": CLIP, "smoothing": SMOOTHING, "mixup": MIXUP,
        "hflip": 0.5, "color-jitter": 0.0, "train-interpolation": "bilinear",
        "epochs": 1, "warmup-epochs": 0, "log-interval": 1,
    }  # fmt: skip
    several = {
        "model-kwargs": [f"img_size={SIZE}", *(f"{name}={value}" for name, value in work.args.items())],
        "mean": HALF, "std": HALF, "scale": [CROP**2, 1.0], "ratio": [1.0, 1.0],
    }  # fmt: skip
    command = [f"--{name}={value}" for name, value in values.items()] + ["--sched-on-updates"]
    for name, parts in several.items():
        command += [f"--{name}", *map(str, parts)]
    return command + ([] if work.ema is None else ["--model-ema", f"--model-ema-decay={work.ema}"])


def of_timm_script(work: Work, script: Path, folder: Path, workers: int) -> Seconds:
    """A step of timm's train.py in a process of its own; on the wall, by the rates that it prints of every step."""
    command = [sys.executable, str(script), *timm_arguments(work, folder, workers)]
    told, rates, begun, ended = [], [], Seconds(0.0, 0.0), Seconds(0.0, 0.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if (rate := TIMM_STEP.search(line)) is None:
                continue
            rates.append(float(rate[1]))
            if len(rates) == work.warm:
                begun = now_of(psutil.Process(process.pid))
            if len(rates) == work.warm + work.steps:
                ended = now_of(psutil.Process(process.pid))
    if process.returncode or len(rates) != work.warm + work.steps:
        raise SystemExit(f"{script} ended with {process.returncode} after {len(rates)} steps:\n{''.join(told[-20:])}")
    wall = statistics.fmean(work.batch / rate for rate in rates[work.warm :])
    return Seconds(wall, (ended - begun).processor / work.steps)


def of_timm_parts(work: Work, folder: Path, workers: int) -> Seconds:
    """A step of timm's factories, put together in the order of its train.py, in this process."""
    from timm.data import FastCollateMixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad

    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=work.classes, img_size=SIZE, **work.args).to(work.device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY)
    average = None if work.ema is None else ModelEmaV3(model, decay=work.ema)
    loader = create_loader(
        create_dataset("", root=str(folder), split="train", is_training=True, batch_size=work.batch),
        input_size=(3, SIZE, SIZE), batch_size=work.batch, is_training=True, scale=(CROP**2, 1.0), ratio=(1.0, 1.0),
        hflip=0.5, color_jitter=0.0, interpolation="bilinear", mean=HALF, std=HALF, num_workers=workers,
        collate_fn=FastCollateMixup(mixup_alpha=MIXUP, label_smoothing=SMOOTHING, num_classes=work.classes),
        device=work.device,
    )  # fmt: skip
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    criterion, losses, begun = SoftTargetCrossEntropy(), AverageMeter(), Seconds(0.0, 0.0)
    model.train()
    for number, (images, targets) in enumerate(loader):
        loss = criterion(model(images), targets)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=CLIP, mode="norm")
        optimizer.step()
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        if average is not None:
            average.update(model, step=number)
        schedule.step_update(num_updates=number + 1, metric=losses.avg)
        if number + 1 == work.warm:
            begun = now_of(psutil.Process())
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    return (now_of(psutil.Process()) - begun) / work.steps


def written(work: Work, folder: Path) -> Path:
    """The pixels of the work as files that timm reads: a folder per class, and as few as can be to validate on."""
    pixels, labels = work.images.pixels(), work.images.labels
    for split, members in (("train", work.members), ("validation", np.unique(labels, return_index=True)[1])):
        for number, index in enumerate(members):
            place = folder / split / f"{labels[index]:04d}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(place / f"{number:07d}.png")
    return folder


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def turns(runs: dict[str, Callable[[], Seconds]], rounds: int) -> Iterator[dict[str, Seconds]]:
    """Everything once a round, in an order that turns."""
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        yield {name: runs[name]() for name in names[first:] + names[:first]}


def rates(taken: list[dict[str, Seconds]], work: Work, clock: str) -> list[dict[str, Any]]:
    """The rows of the second table, by one clock."""
    rows = []
    for name, run, share in (
        ("timm", "timm", 1.0),
        ("Sievit", "whole", 1.0),
        ("ticket, an image", "ticket", 1.0),
        ("ticket, a pass", "ticket", work.keep),
    ):
        seconds = [getattr(one[run], clock) * share for one in taken]
        ratios = [getattr(one["timm"], clock) / own for one, own in zip(taken, seconds, strict=True)]
        rate = work.batch / statistics.median(seconds)
        rows.append({"run": name, "clock": clock, "images_per_s": round(rate, 2), "ratio": spread(ratios)})
    return rows


def missed(shares: list[dict[str, Any]], rows: list[dict[str, Any]], clock: str, device: str) -> list[str]:
    """The bars that were not reached, in words."""
    ratio = {row["run"]: row["ratio"]["median"] for row in rows if row["clock"] == clock}
    if device == "cuda":
        bars = [("Sievit", ratio["Sievit"], GPU_RATE)]
        shares = []
    else:
        bars = [("Sievit", ratio["Sievit"], RATE), ("ticket, a pass", ratio["ticket, a pass"], TICKET_RATE)]
    slow = [f"{name}: {reached:.2f}x of timm, bar {bar}x" for name, reached, bar in bars if reached < bar]
    return slow + [
        f"the loader takes {row[clock]['median']:.1%} of a step ({row['images']} images, batch {row['batch']}), "
        f"bar {LOADER_SHARE:.0%}"
        for row in shares
        if row[clock]["median"] >= LOADER_SHARE
    ]


def show_shares(shares: list[dict[str, Any]]) -> None:
    print(f"{'loader, of a step':24} {'batch':>6} {'ms':>8} {'wall':>8} {'processor':>10}")
    for row in shares:
        wall, processor = row["wall"]["median"], row["processor"]["median"]
        print(
            f"{row['images']:24} {row['batch']:>6} {row['loader_ms']:>8.1f} {wall:>8.2%} {processor:>10.2%}", flush=True
        )


def show_rates(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':24} {'clock':10} {'images/s':>9} {'of timm, median (quartiles)':>30}")
    for row in rows:
        ratio = row["ratio"]
        shown = f"{ratio['median']:.3f}x ({ratio['low']:.3f} to {ratio['high']:.3f})"
        print(f"{row['run']:24} {row['clock']:10} {row['images_per_s']:>9.2f} {shown:>30}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-train", type=Path, help="timm's train.py; without it timm's parts, in this process")
    parser.add_argument("--source", default="builtin:digits", help="data.source of a pipeline.yaml")
    parser.add_argument("--root", help="data.root of a pipeline.yaml")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of timm; Sievit has the set in memory")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 16], help="of the first table; the first is that of the second"
    )
    parser.add_argument("--steps", type=int, default=4, help="counted, of every run")
    parser.add_argument("--warm", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patch", type=int, default=4, help="side of a patch, in pixels")
    parser.add_argument("--depth", type=int, default=12, help="blocks; fewer is not DeiT-T")
    parser.add_argument("--ema", type=float, help="decay of a weight average on both sides")
    parser.add_argument("--keep", type=float, default=0.6, help="of examples, and of patches, in a ticket")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "processor"], help="which one the bars are for")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if min(options.warm, options.steps, options.rounds) < 1:
        raise SystemExit("--warm, --steps and --rounds are 1 or more")
    if options.device == "cuda" and options.clock == "processor":
        raise SystemExit("--clock processor does not see what a GPU does; use --clock wall")
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of timm's process
    device = open_device(options.device)
    needed = (options.steps + options.warm) * max(options.batches)
    data = DataConfig(
        source=options.source, root=options.root, image_size=SIZE, calibration=0.01, max_train=needed, max_test=1000
    ).model_dump()
    begun = time.perf_counter()
    images = load_split(data, Path.cwd(), "train")
    print(
        f"{len(images):,} images decoded into memory in {time.perf_counter() - begun:.1f} s, which no figure below has"
    )
    works = [
        Work(
            images, batch, options.steps, options.warm, options.patch, options.depth, options.ema, options.keep, device
        )
        for batch in options.batches
    ]
    shares = [loader_share(work, ticketed) for work in works for ticketed in (False, True)]
    show_shares(shares)
    work, load = works[0], os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = written(work, Path(temporary))

        def of_timm() -> Seconds:
            if options.timm_train is None:
                return of_timm_parts(work, folder, options.workers)
            return of_timm_script(work, options.timm_train, folder, options.workers)

        runs: dict[str, Callable[[], Seconds]] = {
            "timm": of_timm,
            "whole": lambda: a_step(of_fit(work, ticketed=False)),
            "ticket": lambda: a_step(of_fit(work, ticketed=True)),
        }
        taken = list(turns(runs, options.rounds))
    clocks = ["wall", "processor"] if options.device == "cpu" else ["wall"]
    rows = [row for clock in clocks for row in rates(taken, work, clock)]
    side = "its parts in this process" if options.timm_train is None else f"{options.timm_train.name} as a process"
    print(f"\ntimm {timm.__version__}: {side}, {options.workers} workers; torch {torch.__version__}")
    print(
        f"batch {work.batch}, {options.rounds} rounds of {work.steps} steps, {options.threads} threads; "
        f"load {load[0]:.1f} to {os.getloadavg()[0]:.1f}"
    )
    show_rates(rows)
    short = missed(shares, rows, options.clock, options.device)
    print("\n" + ("\n".join(f"missed: {one}" for one in short) or f"every bar is reached, by {options.clock} seconds"))
    raw = [{name: asdict(seconds) for name, seconds in one.items()} for one in taken]
    facts = {"host": platform.processor(), "torch": torch.__version__, "timm": timm.__version__, "load": load}
    print(json.dumps({**vars(options), **facts, "loader": shares, "rates": rows, "rounds_taken": raw}, default=str))
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
