"""How several processes hold the network that they train: each the whole of it (DDP), or a part each (FSDP2).

Both are torch's. What is looked at, written and handed on is always a whole network, in every process, so that nothing
else needs to know, and a checkpoint can be read by any number of processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import processes
from .network import Network
from .processes import Share
from .tensors import full, like


class Copies(Protocol):
    """What a step knows of it. trained: what its forward calls. parted: whether a whole network has to be put together,
    which all processes do at once.
    """

    trained: Network
    parted: bool

    def part(self, rows: Share, number: int, of: int) -> AbstractContextManager[None]:
        """Around forward and backward of part `number` (from 0) of a step, which is about these rows."""

    def whole(self) -> Network:
        """The network as it stands."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set it to the state of a whole body."""


class Whole:
    """The network itself; of several processes gradients are averaged while the backward runs."""

    parted = False

    def __init__(self, network: Network) -> None:
        self.network = self.trained = network
        self.norms = norms_together(network)
        if processes.count() > 1:
            from torch.nn.parallel import DistributedDataParallel

            where = [torch.cuda.current_device()] if network.body.patch_embed.proj.weight.is_cuda else None
            # It is about a copy of the class token's gradient.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.trained = cast(Network, DistributedDataParallel(network, device_ids=where))

    @contextmanager
    def part(self, rows: Share, number: int, of: int) -> Iterator[None]:
        for norm in self.norms:
            norm.own = rows.own
        replicas: Any = self.trained
        # Gradients are sent once a step, with those of the last part.
        with nullcontext() if number == of - 1 or processes.count() == 1 else replicas.no_sync():
            yield

    def whole(self) -> Network:
        return self.network

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.network.body.load_state_dict(tensors)


class Parted:
    """Weights, gradients and moments divided among the processes. For a forward and its backward the MLPs are put
    together one by one, all else at once, since blocks are not called as modules. The network given becomes this
    process's parts; beside it there is a whole one in its own memory, filled when it is asked for.
    """

    parted = True

    def __init__(self, network: Network) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.trained, self.plain = network, copy.deepcopy(network)
        self.norms = norms_together(network)
        mesh = init_device_mesh(network.body.patch_embed.proj.weight.device.type, (processes.count(),))
        for block in network.blocks:
            fully_shard(block.mlp, mesh=mesh)
        fully_shard(network, mesh=mesh)

    @contextmanager
    def part(self, rows: Share, number: int, of: int) -> Iterator[None]:
        for norm in self.norms:
            norm.own = rows.own
        yield

    def whole(self) -> Network:
        state = {name: full(tensor) for name, tensor in self.trained.body.state_dict().items()}
        self.plain.body.load_state_dict(state)
        return self.plain

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.trained.body.state_dict()
        self.trained.body.load_state_dict({name: like(tensor, own[name]) for name, tensor in tensors.items()})


class NormTogether(nn.BatchNorm2d):
    """A batch norm (LV-ViT's stem has them) over the whole batch of several processes. torch's own needs a GPU, and
    counts a row that is computed for nothing. own: rows that count, the first ones.
    """

    own: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or processes.count() == 1:
            return super().forward(x)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        counting = x[: self.own]
        sums = torch.cat([counting.sum((0, 2, 3)), counting.new_tensor([counting[:, 0].numel()])])
        sums = _summed(sums)
        number = sums[-1].detach()
        mean = (sums[:-1] / number).view(1, -1, 1, 1)
        variance = (_summed((counting - mean).square().sum((0, 2, 3))) / number).view(1, -1, 1, 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * number / (number - 1), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return (x - mean) * (variance + self.eps).rsqrt() * weight + bias


def norms_together(network: nn.Module) -> list[NormTogether]:
    """The batch norms of a network, made such that several processes normalise by the statistics of all their rows."""
    found = []
    for module in network.modules() if processes.count() > 1 else ():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = NormTogether
            found.append(cast(NormTogether, module))
    return found


def _summed(values: Tensor) -> Tensor:
    """The sum over the processes, through which gradients flow."""
    return cast(Tensor, _Sum.apply(values))


class _Sum(torch.autograd.Function):
    """Every process's loss depends on the values of all: gradients are summed as the values are."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
