"""How often the 95% intervals of latencies and speed-ups hold the truth, on simulated calls whose truth is known; and
how far that of p99 reaches, in the median, below and above p99.

    python bench/coverage.py [--trials 300]

Calls are log-normal: 5% between calls, 3% between rounds, and so much between sessions as each line says. A session's
offset is one side's alone, as a process's place in memory is. Ten rounds a session, a thousand calls in all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / ".typing")]

from sievit.stages.deploy.statistics import Slot, percentile_interval, ratio_interval  # noqa: E402

CALLS, ROUNDS, WITHIN, BETWEEN = 1000, 10, 0.05, 0.03
RANKS = (50, 90, 99)


def side(rng: np.random.Generator, offsets: np.ndarray) -> list[Slot]:
    """All slots of one file. offsets: of each session, on the logarithm."""
    calls = CALLS // ROUNDS // len(offsets)
    return [
        Slot(session, number, np.exp(offset + BETWEEN * rng.standard_normal() + WITHIN * noise), 1.0, 1.0)
        for session, offset in enumerate(offsets)
        for number in range(ROUNDS)
        for noise in [rng.standard_normal(calls)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    trials = parser.parse_args().trials
    heads = ("sessions", "moves", "ratio", *(f"p{rank}" for rank in RANKS), "below", "above")
    print("".join(f"{head:>9}" for head in heads))
    for sessions, moves in ((3, 0.0), (3, 0.02), (3, 0.1), (5, 0.02), (5, 0.1), (10, 0.02)):
        rng, hits, reach = np.random.default_rng(0), np.zeros(1 + len(RANKS)), []
        spread = np.sqrt(moves**2 + BETWEEN**2 + WITHIN**2)
        truths = np.exp(spread * stats.norm.ppf(np.array(RANKS) / 100))
        for _ in range(trials):
            one = side(rng, moves * rng.standard_normal(sessions))
            other = side(rng, np.zeros(sessions))
            found = [ratio_interval(one, other), *(percentile_interval(one, rank) for rank in RANKS)]
            hits += [i.low <= true <= i.high for i, true in zip(found, (1.0, *truths), strict=True)]
            reach.append([found[-1].low / found[-1].value - 1, found[-1].high / found[-1].value - 1])
        shares = "".join(f"{share:9.2f}" for share in hits / trials)
        print(f"{sessions:9}{moves:9.2f}{shares}" + "".join(f"{end:+9.1%}" for end in np.median(reach, axis=0)))


if __name__ == "__main__":
    main()
