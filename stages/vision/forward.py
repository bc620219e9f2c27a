"""The forward of a training step: in the precision and, where asked for, through the compiler of the recipe; and, when
a number is no longer one, the layer where that began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from .network import Network
from .recipe import Recipe

Forward = Callable[..., Any]  # called as the network is: images, kept, after -> logits (and states) in float32
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Levels of tokens, ticket or whole images, and the shorter last batch of a pass: each is compiled for itself.
VARIANTS = 64


class Precise:
    """A network in the recipe's precision. Weights, answers and what follows them are float32 whatever it is."""

    def __init__(self, network: Network, recipe: Recipe, device: torch.device) -> None:
        """Raises: InvalidInput where compiling is asked for and there is no compiler."""
        self.network, self.device, self.kind = network, device, KINDS.get(recipe.precision)
        self.run: Forward = network
        if recipe.compile:
            check_compiler(device.type)
            self.run = _compiled(network)

    def __call__(self, images: Tensor, kept: Tensor | None = None, after: tuple[int, ...] = ()) -> Any:
        return self._through(self.run, images, kept, after)

    def eager(self, images: Tensor, kept: Tensor | None = None, after: tuple[int, ...] = ()) -> Any:
        """As a call, and never compiled, so that hooks on layers see what passes."""
        return self._through(self.network, images, kept, after)

    def _through(self, run: Forward, images: Tensor, kept: Tensor | None, after: tuple[int, ...]) -> Any:
        if self.kind is None:
            return run(images, kept, after)
        with torch.autocast(self.device.type, dtype=self.kind):
            answers = run(images, kept, after)
        return _in_full(answers)


def _in_full(answers: Any) -> Any:
    """In float32: logits, a pair of them, either with states beside them."""
    return tuple(_in_full(one) for one in answers) if isinstance(answers, tuple) else answers.float()


def _compiled(network: Network) -> Forward:
    """Every shape is compiled by itself: code for shapes of any size depends on which of them came first, and a resumed
    run meets them in another order. The whole graph, and too many variants, are errors where torch would return to the
    slow path in silence.
    """
    fast = torch.compile(network, fullgraph=True, dynamic=False)

    def run(images: Tensor, kept: Tensor | None = None, after: tuple[int, ...] = ()) -> Any:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return fast(images, kept, after)

    return run


@contextmanager
def compiling() -> Iterator[None]:
    """Around whatever compiles, forward or backward. Raises: InvalidInput where the compiler fails.

    torch keeps what it compiled in a folder, for all runs of a user, and a run that is killed while it writes there
    leaves half a library, over which every later run falls.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        yield
    except (InductorError, BackendCompilerFailed) as error:
        raise InvalidInput(
            f"compile: torch's compiler failed: {str(error).splitlines()[0]}",
            f"a killed run may have left half a file in {cache_dir()}: remove that folder; or set compile: false",
        ) from error


def check_compiler(device: str, field: str = "compile") -> None:
    """Raises: InvalidInput where torch.compile has nothing to compile with. device: "cpu" or "cuda"; field: the setting
    that asks for it.
    """
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InvalidInput(
                "compile: torch compiles for this GPU through Triton, which is not usable here",
                "install triton and a GPU of compute capability 7.0 or later, or set compile: false",
                field=field,
            )
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise InvalidInput(
            "compile: torch compiles for the CPU through a C++ compiler, and finds none",
            "install g++ or clang++, or name one in the environment: CXX=/path/to/g++; or set compile: false",
            field=field,
        ) from error


def first_not_finite(network: Network, again: Callable[[], Any]) -> str | None:
    """The innermost module whose output is the first to hold NaN or infinity while `again` runs; None for none."""
    found: list[str] = []
    with _watching(network, found), torch.no_grad():
        again()
    return found[0] if found else None


@contextmanager
def _watching(network: Network, found: list[str]) -> Iterator[None]:
    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(
                isinstance(one, Tensor) and one.is_floating_point() and not bool(one.isfinite().all())
                for one in outputs
            ):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in network.body.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradient_not_finite(network: Network, beside: nn.Module) -> str | None:
    """The last parameter, in the order of the forward, whose gradient holds NaN or infinity: the backward met it
    first. None for none. beside: weights that the objective has of its own, after the network's.
    """
    bad = [
        name
        for name, parameter in (*network.body.named_parameters(), *beside.named_parameters())
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    return bad[-1] if bad else None
