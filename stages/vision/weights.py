"""A network as files: model.safetensors and architecture.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .architecture import load_architecture
from .network import Network, rebuild
from .tensors import load_state, read_tensors, write_tensors


def save_network(network: Network, folder: Path) -> None:
    """model.safetensors and architecture.json."""
    write_tensors(folder / "model.safetensors", network.body.state_dict())
    network.architecture.save(folder / "architecture.json")


def save_early(states: Mapping[int, Mapping[str, Tensor]], folder: Path) -> None:
    """early/epoch-N.safetensors of each epoch that was set aside."""
    for epoch, state in states.items():
        (folder / "early").mkdir(exist_ok=True)
        write_tensors(folder / "early" / f"epoch-{epoch}.safetensors", state)


def load_network(folder: Path, *, drop_path: float = 0.0) -> Network:
    """The network of a model artifact, in eval mode. Raises: InvalidInput when record and weights do not fit each
    other.
    """
    network = rebuild(load_architecture(folder / "architecture.json"), drop_path=drop_path)
    tensors, _ = read_tensors(folder / "model.safetensors")
    load_state(network.body, tensors, folder / "model.safetensors")
    return network.eval()
