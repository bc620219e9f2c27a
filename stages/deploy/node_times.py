"""What every operator of a file takes, by ONNX Runtime's own profile: over many calls, files interleaved.

Only the CPU provider says it: cards report when work was queued, and OpenVINO runs a whole graph as one operator.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from .child import Child
from .latency import Progress, Setting, Subject, load_command

ROUNDS = 6
SECONDS = 1.5  # of timed calls of a file, over all rounds
MOST = 60  # calls in a round: what quick files say is said after some hundred, and each takes a while to be read


@dataclass(frozen=True, slots=True)
class NodeTime:
    """An operator of the optimised graph, in order of execution. name: of the file's node that it was made of, where
    the runtime kept it. operator: what it is, such as "FusedMatMul".
    """

    name: str
    operator: str
    ms: float


def node_times(
    subjects: Sequence[Subject],
    setting: Setting,
    progress: Progress,
    *,
    seconds: float = SECONDS,
    seed: int = 0,
    timeout_s: float = 300.0,
) -> list[list[NodeTime]]:
    """The operators of each file. Raises InvalidInput when a file does not run, ChildFailed when a worker crashes."""
    order = random.Random(f"{seed}/{setting}")
    with (
        ExitStack() as stack,
        tempfile.TemporaryDirectory() as cache,
        progress.task("operators", len(subjects) * (1 + ROUNDS)) as task,
    ):
        children = [stack.enter_context(Child("worker", subject.name)) for subject in subjects]
        calls = {}
        for place, (child, subject) in enumerate(zip(children, subjects, strict=True)):
            child.ask(load_command("trace", subject, setting, cache), timeout_s)
            child.ask({"do": "prepare", "shape": [setting.batch, *subject.image], "io": setting.io}, timeout_s)
            call_ms = child.ask({"do": "warm", "limit_s": 1.0}, timeout_s)["call_ms"]
            calls[place] = max(1, min(MOST, round(seconds / ROUNDS * 1e3 / max(call_ms, 1e-3))))
            task.advance()
        for _ in range(ROUNDS):
            for place in order.sample(range(len(subjects)), len(subjects)):
                children[place].ask({"do": "time", "calls": calls[place]}, timeout_s)
                task.advance()
        for child in children:  # they read their profiles side by side
            child.send({"do": "traced"})
        found = [child.receive("traced", timeout_s)["nodes"] for child in children]
    return [[NodeTime(*node) for node in nodes] for nodes in found]
