"""Tensors on disk: safetensors, written so that a kill leaves the old file or the new one. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..methods import InvalidInput
from .architecture import AGAIN


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write beside the target, sync, rename. `facts` (JSON) travel in the header."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"facts": json.dumps(facts, sort_keys=True)} if facts is not None else None
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(save(flat, metadata=header))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file. Raises: InvalidInput for a file that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in names}, facts
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable safetensors file ({error})", AGAIN) from error


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Strict load with the first differences named; NaN and infinity are refused."""
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name}: {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        raise InvalidInput(f"{path}: the weights do not fit the architecture: {'; '.join(wrong[:5])}", AGAIN)
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise InvalidInput(f"{path}: {bad[0]} holds NaN or infinity", AGAIN)
    module.load_state_dict(dict(tensors))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, also of one that processes hold a part each of; all of them then ask at once."""
    gather = getattr(tensor, "full_tensor", None)  # of torch's DTensor
    return tensor if gather is None else cast(Tensor, gather())


def like(whole: Tensor, reference: Tensor) -> Tensor:
    """Undo full: this process's part, if the reference is one of a tensor of that shape."""
    if not hasattr(reference, "full_tensor") or whole.shape != reference.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    there = whole.to(reference.device)
    return distribute_tensor(there, reference.device_mesh, reference.placements, src_data_rank=None)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments as named tensors, whole also where processes hold a part each; scalars as 0-d ones."""
    flat = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            flat[f"{index}.{name}"] = full(value) if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Undo flatten_optimizer on an optimiser built the same way."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = like(value, weights[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
