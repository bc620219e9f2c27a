"""Learning from a teacher: who it is, what is compared with what, and the objective that comes of it.

A teacher is a frozen network with a normalisation of its own, which sees the student's views. Where those are the same
in every pass, it is asked once about each image, before the first step, and what it answered is looked up. Hidden
states are compared between blocks of the same place: a pruned student's blocks say in architecture.json which of timm's
they are. Where a stream of the student is narrower than the teacher's, a linear projection widens it. The projections
train with the student and are no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.distillation import feature_loss, hard_loss, soft_loss
from . import external, preprocessing, processes
from .architecture import Architecture, SwinArchitecture, TokenDrop
from .batches import Batch, Pool
from .forward import Forward
from .network import Network
from .objective import cross_entropy
from .preprocessing import Normaliser, Preprocessing
from .recipe import Recipe
from .swin import Swin
from .teaching_settings import Distill, Features
from .vit import ViT
from .weights import load_network

FEATURES, BLOCKS = "distill.features", "distill.features.blocks"
Record: TypeAlias = Architecture | SwinArchitecture


class Teacher:
    """A frozen network and its own normalisation, fed with the student's views. macs: of one image's forward."""

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        macs: int,
        student: Preprocessing,
        device: torch.device,
    ) -> None:
        """Args: mean, std: what the teacher was trained with; student: how the images are normalised that it is
        shown."""
        self.network = network.to(device).eval().requires_grad_(False)
        self.macs, self.device = macs, device
        self.own, self.student = Normaliser(mean, std, device), student.normaliser(device)

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S), normalised for the student -> logits (B, K). A distilled DeiT's are the mean of its two
        heads, as whenever it is tested.
        """
        return self.network(self._seen(images))  # type: ignore[no-any-return]

    @torch.no_grad()
    def states(self, images: Tensor, after: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits, and the tokens (B, T, C) as each of these blocks leaves them: of a network of Sievit only."""
        answers, states = self.network(self._seen(images), None, after)
        return answers, states

    @property
    def by_lot(self) -> bool:
        """Whether an answer depends on an image's place in its batch: where tokens are dropped at random."""
        return isinstance(self.network, ViT) and any(d.method == "random" for d in self.network.architecture.tokens)

    def _seen(self, images: Tensor) -> Tensor:
        return self.own(images * self.student.std + self.student.mean)


def from_artifact(folder: Path, who: str, student: Preprocessing, device: torch.device) -> Teacher:
    """The network of a model artifact. who: as the user wrote it. Raises: InvalidInput when it answers other classes or
    takes other images.
    """
    network, own = load_network(folder), preprocessing.load(folder)
    preprocessing.check(own, student.classes, student.image_size, f"teacher {who}")
    return Teacher(network, own.mean, own.std, network.architecture.macs(), student, device)


def from_timm(text: str, student: Preprocessing, device: torch.device) -> Teacher:
    """The pretrained network of "timm:<name>". Raises: InvalidInput as external.load."""
    outside = external.load(text, len(student.classes), student.image_size)
    return Teacher(outside.network, outside.mean, outside.std, outside.macs, student, device)


class Teaching:
    """The objective of a student that has a teacher: labels, the teacher's answers, and its hidden states where they
    are asked for. Called as any objective. A distilled DeiT hears the teacher through its own head.

    pairs: blocks that are compared, the student's number and the teacher's, from 0 in order of execution. projections:
    to be trained beside the student (training.fit). remembered (M, K): the teacher's answers to the images of the
    split, once it was asked about all of them; rows of images outside the pool are zeros. seconds: what that took.
    """

    def __init__(
        self, settings: Distill, student: Network, teacher: Teacher, *, tokens: tuple[TokenDrop, ...] | None = None
    ) -> None:
        """Args: tokens: the reduction that the student is trained with at last; None: the one that it has.
        Raises: InvalidInput as compared."""
        self.settings, self.teacher = settings, teacher
        self.pairs: list[tuple[int, int]] = []
        self.projections = nn.ModuleDict()
        self.remembered: Tensor | None = None
        self.seconds = 0.0
        student.set_distilled_training(True)
        if settings.features is None:
            return
        assert isinstance(teacher.network, ViT | Swin), "a teacher from timm is refused with the settings"
        record, taught = student.architecture, teacher.network.architecture
        self.pairs = compared(record, taught, settings.features, record.tokens if tokens is None else tokens)
        for number, (own, other) in enumerate(self.pairs):
            width, wanted = width_after(record, own), width_after(taught, other)
            if width != wanted:
                self.projections[f"projection_{number}"] = nn.Linear(width, wanted, bias=False)

    def asked_again(self, pool: Pool, recipe: Recipe) -> bool:
        """Whether the teacher would be asked the same again and again: images come more than once, always as the same
        view, and answers are all that is compared. States are not looked up: those of a few thousand images fill a
        memory.
        """
        repeated = recipe.total_steps(len(pool.members)) > -(-len(pool.members) // recipe.batch_size)
        return repeated and recipe.same_views and not self.pairs and not self.teacher.by_lot

    def remember(
        self, pool: Pool, size: int, normalise: Normaliser, tick: Callable[[int], None] = lambda images: None
    ) -> None:
        """Ask the teacher once about every image of the pool, where asked_again. Several processes share the work, and
        each gets all answers.

        size: images a batch; normalise: the student's; tick: called with the number of images that were answered.
        """
        begun, split, members = time.monotonic(), pool.images, pool.members
        order, turns = processes.dealt(len(members), size)

        def answers() -> Iterator[np.ndarray]:
            for pixels in split.batches(members[order], size):
                tick(len(pixels))
                images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.teacher.device)
                views = images.permute(0, 3, 1, 2).float().div_(255.0)
                yield self.teacher.answer(normalise(views)).float().cpu().numpy()

        found = np.concatenate(list(processes.in_order(answers(), turns))).astype(np.float32)
        self.remembered = torch.zeros(len(split), found.shape[1])
        self.remembered[torch.from_numpy(members)] = torch.from_numpy(found)
        self.seconds = time.monotonic() - begun

    def macs(self, pool: Pool, images: int) -> int:
        """Of the teacher's forward passes in a training on so many images."""
        return self.teacher.macs * (images if self.remembered is None else len(pool.members))

    def __call__(self, current: Forward, batch: Batch) -> Tensor:
        """(1 - weight) * labels + weight * answers + features.weight * states: the mean over the batch, (). States are
        those of whole images: a batch of tickets has none to compare.
        """
        settings = self.settings
        if self.pairs:
            own, others = (tuple(numbers) for numbers in zip(*self.pairs, strict=True))
            answers, states = current(batch.images, batch.kept, own)
            taught, shown = self.teacher.states(batch.images, others)
        else:
            answers, states, shown = current(batch.images, batch.kept), (), ()
            taught = self._answer(batch)
        to_labels, to_teacher = answers if isinstance(answers, tuple) else (answers, answers)
        distilled = (
            soft_loss(to_teacher, taught, settings.temperature)
            if settings.kind == "soft"
            else hard_loss(to_teacher, taught)
        )
        loss = (1 - settings.weight) * cross_entropy(to_labels, batch.targets) + settings.weight * distilled
        if settings.features is None:
            return loss
        both = enumerate(zip(states, shown, strict=True))
        of_states = [feature_loss(self._widened(number, own), wanted) for number, (own, wanted) in both]
        return loss + settings.features.weight * torch.stack(of_states).mean()

    def _answer(self, batch: Batch) -> Tensor:
        if self.remembered is None:
            return self.teacher.answer(batch.images)
        return self.remembered[torch.from_numpy(batch.ids)].to(batch.images.device)

    def _widened(self, number: int, state: Tensor) -> Tensor:
        name = f"projection_{number}"
        widened: Tensor = self.projections[name](state) if name in self.projections else state
        return widened


def compared(
    student: Record, teacher: Record, features: Features, tokens: tuple[TokenDrop, ...] = ()
) -> list[tuple[int, int]]:
    """Which blocks are compared, the student's number and the teacher's, ascending. tokens: the student's reduction.

    Raises: InvalidInput for networks whose tokens are not the same ones, for a block that one of them does not have,
    and for one after which one of them has fewer tokens.
    """
    _check_tokens_alike(student, teacher)
    own, others = places(student), places(teacher)
    both = [number for number, place in enumerate(others) if place in own]
    if not both:
        raise _refused("the student has none of the teacher's blocks", "name another teacher, or leave features out")
    named = both if features.blocks is None else sorted(features.blocks)
    for number in named:
        if number >= len(others):
            raise _refused(
                f"{number} for a teacher of {len(others)} blocks", f"use numbers from 0 to {len(others) - 1}", BLOCKS
            )
        if number not in both:
            raise _refused(
                f"the student's block in the place of the teacher's {number} was cut",
                f"choose from {', '.join(map(str, both))}, or leave blocks out",
                BLOCKS,
            )
    pairs = {number: (own.index(others[number]), number) for number in both}
    for who, drops, side in (("student", tokens, 0), ("teacher", teacher.tokens, 1)):
        if not drops:
            continue
        first = min(drop.block for drop in drops)
        whole = [number for number in both if pairs[number][side] < first]
        fewer = [number for number in named if number not in whole]
        if fewer:
            raise _refused(
                f"after the teacher's block {fewer[0]} the {who} has fewer tokens, from its block {first} on",
                f"choose from {', '.join(map(str, whole))}"
                if whole
                else "leave features out, or the tokens' reduction",
                BLOCKS,
            )
    return [pairs[number] for number in named]


def places(architecture: Record) -> list[tuple[int, int]]:
    """Of every block the stage, and its place there among timm's: what blocks of two networks have in common."""
    return [(stage, b.place) for stage, b in zip(architecture.stage_of, architecture.blocks, strict=True)]


def width_after(architecture: Record, block: int) -> int:
    """Channels of the tokens that a block leaves."""
    return architecture.streams[architecture.stage_of[block]]


def _check_tokens_alike(student: Record, teacher: Record) -> None:
    """Raises: InvalidInput unless token i of one network stands for the same part of an image as that of the other."""
    remedy = "name a teacher with the student's tokens, or leave features out"
    if type(student) is not type(teacher):
        raise _refused(f"the teacher {teacher.model} is of another family than {student.model}", remedy)
    if student.grid != teacher.grid:
        (high, wide), (rows, columns) = student.grid, teacher.grid
        raise _refused(f"the teacher has {rows} x {columns} patches, the student {high} x {wide}", remedy)
    if student.prefix != teacher.prefix:
        raise _refused(f"prefix tokens of the teacher: {teacher.prefix}, of the student: {student.prefix}", remedy)


def _refused(what: str, remedy: str, field: str = FEATURES) -> InvalidInput:
    return InvalidInput(f"{field}: {what}", remedy, field=field)
