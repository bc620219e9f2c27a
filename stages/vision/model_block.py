"""The network of the pipeline's model block, as every stage begins with it that is given no other; and another of its
kind, as `start` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..methods import InvalidInput
from .architecture import Architecture, SwinArchitecture, load_architecture
from .network import Network, check_trained, create, outline
from .preprocessing import Preprocessing, check, choose, load
from .weights import load_network


class ModelBlock(Protocol):
    """The settings under `model` in pipeline.yaml; at most one of pretrained and weights."""

    @property
    def name(self) -> str: ...
    @property
    def args(self) -> Mapping[str, Any]: ...
    @property
    def pretrained(self) -> bool: ...
    @property
    def weights(self) -> str | None: ...


def begin(
    block: ModelBlock,
    data: Any,
    classes: tuple[str, ...],
    base: Path,
    *,
    drop_path: float = 0.0,
    trained_head: bool = False,
) -> tuple[Network, Preprocessing]:
    """The network with the weights that its block names, else random ones, and what images go through before it.

    Args:
        data: the data block; base: the folder that a path to weights is meant from.
        drop_path, trained_head: as in network.create.
    Raises: InvalidInput as network.create.
    """
    network = create(
        block.name,
        classes=len(classes),
        image_size=data.image_size,
        args=dict(block.args),
        pretrained=block.pretrained,
        weights=None if block.weights is None else base / block.weights,
        drop_path=drop_path,
        trained_head=trained_head,
    )
    return network, choose(network, data, classes, block.pretrained or block.weights is not None)


def go_on(
    block: ModelBlock, data: Any, classes: tuple[str, ...], folder: Path, who: str, *, drop_path: float = 0.0
) -> tuple[Network, Preprocessing]:
    """The network of a model artifact with its weights and widths; what it did with tokens is left behind.

    who: its reference, for messages. Raises: InvalidInput for other classes or images, or as `outlined`.
    """
    preprocessing = load(folder)
    check(preprocessing, classes, data.image_size, f"start {who}")
    network = load_network(folder, drop_path=drop_path).with_tokens(())
    _check_same(network.architecture, block, who)
    return network, preprocessing


def outlined(
    block: ModelBlock, image_size: int, start: tuple[Path, str] | None, at: str
) -> Architecture | SwinArchitecture:
    """The architecture that training begins with, no weights read or fetched. start: folder and reference of a model
    artifact, in place of the block's own network; at: where it is named in pipeline.yaml.

    Raises: InvalidInput as network.create, and for an artifact of another network than the block's; its widths may have
    been cut.
    """
    if start is None:
        if block.pretrained:
            check_trained(block.name)
        return outline(block.name, image_size=image_size, args=block.args)
    folder, who = start
    architecture = load_architecture(folder / "architecture.json")
    _check_same(architecture, block, who, at)
    return replace(architecture, tokens=()) if isinstance(architecture, Architecture) else architecture


def _check_same(architecture: Architecture | SwinArchitecture, block: ModelBlock, who: str, at: str = "start") -> None:
    if (architecture.model, architecture.args) != (block.name, dict(block.args)):
        raise InvalidInput(
            f"start {who} is {architecture.model} with {architecture.args}, and the model block says {block.name} with "
            f"{dict(block.args)}",
            "name in start a network of the model block, or write that network into the model block",
            field=at,
        )
