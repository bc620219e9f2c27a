"""Scores from a process of its own: a file from elsewhere may crash ONNX Runtime, loop for ever or ask for a terabyte,
and takes nothing down with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .child import Child, answering, serve
from .isa import usable_cores
from .predict import scores
from .sessions import GRAPHICS

# A slow network on a busy machine needs seconds an image; what takes longer is taken for an endless loop.
FIRST_S, EACH_S = 60.0, 5.0

Score = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@contextmanager
def scorer(path: Path, *, provider: str = "cpu", first_s: float = FIRST_S, each_s: float = EACH_S) -> Iterator[Score]:
    """Gives a function: uint8 [n, size, size, 3] -> float32 [n, classes], as `predict.scores`, on all usable cores.

    first_s, each_s: seconds to wait for an answer at most, and more for each image. The function raises InvalidInput
    for a file that does not run, ChildFailed for one that crashes or does not answer.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Child("scorer", path.name, limited=provider not in GRAPHICS) as child,
    ):
        pixels_file, scores_file = Path(folder) / "pixels.npy", Path(folder) / "scores.npy"

        def score(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            np.save(pixels_file, pixels, allow_pickle=False)
            command = {"do": "scores", "path": str(path.absolute()), "provider": provider}
            files = {"pixels": str(pixels_file), "scores": str(scores_file)}
            child.ask(command | files, first_s + each_s * len(pixels))
            found: NDArray[np.float32] = np.load(scores_file, allow_pickle=False)
            return found

        yield score


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    for command, stream in serve():
        with answering(stream):
            pixels = np.load(command["pixels"], allow_pickle=False)
            threads = len(usable_cores())
            found = scores(Path(command["path"]), pixels, provider=command["provider"], threads=threads)
            np.save(command["scores"], found, allow_pickle=False)


if __name__ == "__main__":
    main()
