"""Test every arm's network on ticket, random and full patches of the same images, and say which claims that bears out.

The claim of the data-level lottery ticket (Shen et al., IJCAI 2023) is about training and about testing: a network
trained on ticket patches and tested on them does as well as one trained and tested on full images, and better than one
trained on random patches. The paper tests the random one on ticket patches too, which it was not trained for; so the
whole matrix is measured, and three claims are judged unless others are stated:

    main/ticket   greater than   random/ticket    the paper's own comparison
    main/ticket   greater than   random/random    each on what it was trained for
    main/ticket   equal to       full/full        to within 1 point of top-1

ARM/PATCHES is an arm and what it is tested on. `ticket` are the best-ranked patches of the main arm's tickets, under
each seed its own; `random` as many, drawn for each image and seed; `full` all. The network of an arm is the last one
that a `train` stage made; `needs` names another.

Over two seeds or more, intervals are Student's t over seeds and claims are judged by paired t, "equal" by two one-sided
tests; with one seed, by Wilson's interval and McNemar's test, which speak of these networks and not of the method.
McNemar's is told for each seed in any case. Every test has the level of 5 %, none is corrected for their number.

reads    the models and tickets of all arms, the test split
writes   matrix.json (cells, claims, budgets), correct.npy (arms, patches, seeds, images; bool)

    sievit matrix pipeline.yaml
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sievit.pipeline.stage import Config, Context, Labelled, Preflight, Reads, Stage

from .methods import InvalidInput
from .vision.recipe import Settings

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .vision.budget import Spent
    from .vision.dataset import Images
    from .vision.network import Network
    from .vision.tickets import Tickets

Patches = Literal["ticket", "random", "full"]
Place = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*/(ticket|random|full)$")]
RANDOM = 7_001_003  # keeps the draws of this stage apart from those of the tickets


class Claim(Settings):
    """Two cells of the matrix and what is claimed of them."""

    left: Place = Field(description="ARM/PATCHES, such as main/ticket")
    right: Place = Field(description="what it is compared with")
    expect: Literal["greater", "equal"] = Field("greater", description="left better than right, or as good as right")
    margin: float = Field(0.01, gt=0, lt=1, description="largest difference in top-1 that counts as equal, a fraction")


class MatrixConfig(Config):
    """Settings of the matrix stage."""

    test: Annotated[tuple[Patches, ...], Field(min_length=1)] = Field(
        ("ticket", "random", "full"), description="patches of the test images that every arm is tested on"
    )
    claims: tuple[Claim, ...] | None = Field(
        None, description="what is judged; null: the three of the paper, with arms called random and full"
    )

    @property
    def judged(self) -> tuple[Claim, ...]:
        """The claims that are stated, or else those of the paper."""
        if self.claims is not None:
            return self.claims
        return (
            Claim(left="main/ticket", right="random/ticket", expect="greater"),
            Claim(left="main/ticket", right="random/random", expect="greater"),
            Claim(left="main/ticket", right="full/full", expect="equal"),
        )


@dataclass(frozen=True)
class Trained:
    """The network of one arm under one seed, and what it was trained on."""

    seed: int
    model: Labelled
    tickets: Tickets | None
    spent: Spent | None


def run(ctx: Context) -> None:
    """Answers of all networks on all patches; from them cells and verdicts."""
    import numpy as np

    from .vision.dataset import load_split
    from .vision.device import open_device
    from .vision.evaluate import logits
    from .vision.preprocessing import check, load

    config: MatrixConfig = ctx.config
    device = open_device(ctx.device)
    images = load_split(ctx.data.model_dump(), ctx.base, "test")
    arms = _arms(ctx, images)
    _refuse_claims(config, tuple(arms), ctx.entry)
    seeds = [trained.seed for trained in arms["main"]]
    correct = np.zeros((len(arms), len(config.test), len(seeds), len(images)), dtype=bool)
    with ctx.progress.task("testing", correct[..., 0].size) as task:
        for number in range(len(seeds)):
            ticket = arms["main"][number].tickets
            ranks = _ranks(config, ticket, len(images), seeds[number])
            for row, trained in enumerate(of_arm[number] for of_arm in arms.values()):
                folder, who = trained.model.artifact.root, f"{trained.model.arm}/{trained.model.entry}"
                preprocessing = load(folder)
                check(preprocessing, images.classes, ctx.data.image_size, who)
                whole, on_tickets = _networks(trained, ticket, arms["main"][number], who, device)
                for column, patches in enumerate(config.test):
                    found = logits(
                        whole if patches == "full" else on_tickets,
                        images,
                        preprocessing.normaliser(device),
                        device,
                        ranks=ranks[patches],
                        patches=None if ticket is None else ticket.patches,
                    )
                    correct[row, column, number] = found.argmax(1).numpy() == images.labels
                    task.advance(1)
    np.save(ctx.out / "correct.npy", correct)
    matrix = {
        "schema": 1,
        "seeds": seeds,
        "test_images": len(images),
        "test": list(config.test),
        "arms": [_described(name, of_arm) for name, of_arm in arms.items()],
        "cells": [
            _cell(name, patches, correct[row, column])
            for row, name in enumerate(arms)
            for column, patches in enumerate(config.test)
        ],
        "claims": [
            _judged(claim, *(_answers(correct, place, list(arms), config.test) for place in (claim.left, claim.right)))
            for claim in config.judged
        ],
        "budget": _budget(ctx, arms),
    }
    (ctx.out / "matrix.json").write_text(json.dumps(matrix, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    ctx.metrics["matrix"] = matrix


def _arms(ctx: Context, images: Images) -> dict[str, list[Trained]]:
    """Arm -> its networks in the order of the seeds. Raises: InvalidInput when arms lack one, or were trained to be
    tested on other images.
    """
    from .vision import budget, tickets

    found: dict[str, dict[str, dict[str, list[Labelled]]]] = {}
    for one in ctx.many:
        of_arm = found.setdefault(one.family, {}).setdefault(one.arm.removeprefix(one.family), {})
        of_arm.setdefault(str(one.artifact.manifest["writes"]), []).append(one)
    arms: dict[str, list[Trained]] = {}
    for arm, seeds in found.items():
        for at, read in seeds.items():
            if "model" not in read:
                raise InvalidInput(f"arm {arm}{at} has tickets and no trained network", "give every arm a train stage")
            made = [one for one in read["model"] if one.artifact.kind_of_stage == "train"]
            model = (made or read["model"])[-1]
            _refuse_other_images(model, images, ctx)
            chosen = tickets.load(read["tickets"][-1].artifact.root) if "tickets" in read else None
            arms.setdefault(arm, []).append(Trained(model.seed, model, chosen, budget.load(model.artifact.root)))
    if "main" not in arms or len({len(of_arm) for of_arm in arms.values()}) > 1:
        have = ", ".join(f"{arm} {len(of_arm)}" for arm, of_arm in arms.items())
        raise InvalidInput(f"the arms have networks of different seeds: {have}", "run the whole pipeline")
    return arms


def _refuse_other_images(model: Labelled, images: Images, ctx: Context) -> None:
    from .vision.dataset import load_split

    theirs = load_split(model.artifact.manifest["data"], ctx.base, "test")
    if [theirs.name(i) for i in range(len(theirs))] != [images.name(i) for i in range(len(images))]:
        raise InvalidInput(
            f"arm {model.arm} has {len(theirs)} test images that are not the {len(images)} of the main arm",
            "arms are compared on the same images: set what decides the test split under 'data:', not in an arm",
        )


def _ranks(config: MatrixConfig, ticket: Tickets | None, images: int, seed: int) -> Mapping[str, np.ndarray | None]:
    """What decides the patches of each test image: ranks (M, N), or None for all patches."""
    from .vision.ranking import by_chance

    if config.test == ("full",):
        return {"full": None}
    if ticket is None or ticket.ranks_test is None:
        raise InvalidInput("the main arm keeps all patches: there is no ticket to test on", "set matrix.test: [full]")
    if len(ticket.ranks_test) != images:
        raise InvalidInput(
            f"the main arm's tickets rank {len(ticket.ranks_test)} test images, the test split has {images}",
            "run the ticket stage on this data",
        )
    chance = by_chance(images, ticket.ranks_test.shape[1], RANDOM + seed)
    return {"ticket": ticket.ranks_test, "random": chance, "full": None}


def _networks(
    trained: Trained, ticket: Tickets | None, main: Trained, who: str, device: torch.device
) -> tuple[Network, Network]:
    """The network for all patches, and as it takes the main arm's tickets."""
    from .vision.tickets import adapt
    from .vision.weights import load_network

    network = load_network(trained.model.artifact.root).to(device)
    if ticket is None or ticket.shape is None:
        return network, network
    ticketed = adapt(network, ticket, main.model.artifact.manifest["config"].get("patches")).to(device)
    (high, wide), (rows, columns) = ticketed.ticket_grid, ticket.grid
    if (high, wide) != (rows, columns):
        raise InvalidInput(
            f"the network of {who} sees {high} x {wide} patches, the main arm's tickets rank {rows} x {columns}",
            "give all arms one model.args.patch_size and one data.image_size",
        )
    return network, ticketed


def _answers(correct: np.ndarray, place: str, arms: Sequence[str], test: Sequence[str]) -> np.ndarray:
    arm, _, patches = place.rpartition("/")
    answers: np.ndarray = correct[arms.index(arm), test.index(patches)]
    return answers


def _cell(arm: str, patches: str, correct: np.ndarray) -> dict[str, Any]:
    """Accuracy of an arm on patches; correct (S, M)."""
    from .deploy.statistics import wilson
    from .methods.paired_tests import accuracy_interval

    top1 = [float(value) for value in correct.mean(1)]
    low, high = accuracy_interval(top1, correct.shape[1]) if len(top1) > 1 else wilson(int(correct.sum()), correct.size)
    return {"arm": arm, "test": patches, "top1": top1, "mean": float(correct.mean()), "low": low, "high": high}


def _judged(claim: Claim, left: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The verdict on a claim, with all that it rests on; left and right (S, M)."""
    from .methods.paired_tests import equal, greater, mcnemar

    found = greater(left, right) if claim.expect == "greater" else equal(left, right, claim.margin)
    each = [mcnemar(ours, theirs) for ours, theirs in zip(left, right, strict=True)]
    relation = (
        "better than"
        if claim.expect == "greater"
        else f"within {100 * claim.margin:g} point{'s' * (claim.margin != 0.01)} of"
    )
    words = (
        f"{claim.left} is {relation} {claim.right}: {found.verdict} "
        f"(difference {100 * found.value:+.2f} points, 95% interval {100 * found.low:+.2f} to {100 * found.high:+.2f}, "
        f"{found.by}: {_p(found.p)}; McNemar by seed: {', '.join(_p(one.p) for one in each)})"
    )
    return {**claim.model_dump(), **asdict(found), "mcnemar": [asdict(one) for one in each], "words": words}


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _described(name: str, arm: Sequence[Trained]) -> dict[str, Any]:
    """What an arm was trained on, and what it spent under each seed."""
    tickets = arm[0].tickets
    return {
        "arm": name,
        "trained_on": None if tickets is None else {part: tickets.record[part] for part in ("examples", "patches")},
        "spent": [None if one.spent is None else asdict(one.spent) for one in arm],
    }


def _budget(ctx: Context, arms: Mapping[str, Sequence[Trained]]) -> str | None:
    """In what all arms are equal, None when they are not or do not say."""
    stated = {one.spent.budget if one.spent is not None else None for of_arm in arms.values() for one in of_arm}
    if len(stated) > 1:
        ctx.progress.warn("the arms were trained to different budgets: " + ", ".join(sorted(map(str, stated))))
    return stated.pop() if len(stated) == 1 else None


def _refuse_claims(config: MatrixConfig, arms: Sequence[str], entry: str) -> None:
    """Claims about arms or patches that are not there."""
    field = f"stages.{entry}.claims"
    for claim in config.judged:
        for place in (claim.left, claim.right):
            arm, _, patches = place.rpartition("/")
            own = "name the arms 'random' and 'full', or state your own claims; claims: [] states none"
            if arm not in arms:
                hint = own if config.claims is None else f"there are {', '.join(arms)}"
                raise InvalidInput(f"the claim on {place} needs an arm '{arm}'", hint, field=field)
            if patches not in config.test:
                hint = own if config.claims is None else f"test: [{', '.join((*config.test, patches))}]"
                raise InvalidInput(f"the claim on {place} needs the patches '{patches}' in test", hint, field=field)


def _coherent(seen: Preflight) -> None:
    """Refuse what the settings of all arms already show."""
    config: MatrixConfig = seen.config
    _refuse_claims(config, list(dict.fromkeys(one.family for one in seen.many["models"])), seen.entry)
    tickets = {one.family: one.config for one in seen.many.get("tickets", ())}
    if config.test != ("full",) and ("main" not in tickets or tickets["main"].whole):
        raise InvalidInput(
            "the main arm keeps all patches: there is no ticket to test on",
            "set ticket.patches.keep below 1, or test: [full]",
            field=seen.at("test"),
        )
    if config.claims is not None:
        return
    main, control = tickets["main"], tickets.get("random")
    if control is None or not control.patches.method.startswith("random") or _keep(control) != _keep(main):
        has = "all" if control is None or control.whole else f"{_keep(control)} by {control.patches.method}"
        raise InvalidInput(
            f"arm 'random' keeps {has} of the patches: it is no random control of a main arm that keeps {_keep(main)}",
            "give it ticket.patches.method: random and the main arm's keep, or state your own claims",
            field=seen.at("claims"),
        )
    if "full" in tickets and not tickets["full"].whole:
        raise InvalidInput(
            f"arm 'full' keeps {_keep(tickets['full'])} of the patches",
            "give it ticket.patches.keep: 1.0, or state your own claims",
            field=seen.at("claims"),
        )


def preflight(seen: Preflight) -> None:
    """Refuse a device that is not there."""
    from .vision.device import check_device

    check_device(seen.device)


def _keep(tickets: Any) -> str:
    """The fraction of the patches that a ticket stage keeps, as it was written."""
    if tickets.whole:
        return "all"
    in_stages = tickets.selector.keep_per_stage
    return f"{tickets.patches.keep:g}" if in_stages is None else f"{in_stages:g} a stage"


STAGE = Stage(
    name="matrix",
    version=2,
    config=MatrixConfig,
    run=run,
    reads=(Reads("models", "model", many=True), Reads("tickets", "tickets", optional=True, many=True)),
    writes="evaluation",
    manual=__doc__,
    packages=("torch", "timm", "numpy", "scipy"),
    uses=frozenset({"data", "seed", "device"}),
    across_arms=True,
    shares=True,
    coherent=_coherent,
    preflight=preflight,
)
