"""From scores to kept examples at ImageNet's size: seconds and peak memory of every method.

    python bench/select_examples.py [--examples 1300000] [--classes 1000] [--keep 0.3]

The scores are generated: what is measured is what happens once they are there. Each row is a process of its own, so
that its peak is that method's, interpreter and imports included. Prints a table and, last, one line of JSON. Exit
code 1 when a method takes 10 s or 500 MB, which is what the project promises for the default size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

METHODS = ("random", "el2n", "grand", "forgetting", "margin", "entropy", "moderate", "ccs")
SECONDS, MEGABYTES = 10, 500


def generated(method: str, examples: int, seed: int = 0) -> np.ndarray:
    """(M,) float32 of the shape that such scores have: few levels with many ties, or a long tail."""
    rng = np.random.default_rng(seed)
    if method == "forgetting":
        return rng.poisson(1.5, examples).astype(np.float32)
    return rng.gamma(2, 0.2, examples).astype(np.float32)


def measure(method: str, balanced: bool, examples: int, classes: int, keep: float) -> dict[str, float | int | str]:
    """One row, in this process."""
    from sievit.stages.methods.example_scores import moderate, random_scores
    from sievit.stages.methods.example_selection import select_examples

    labels = np.random.default_rng(1).integers(0, classes, examples)
    scores = generated(method, examples)
    begun = time.perf_counter()
    if method == "random":
        scores = random_scores(examples, 0)
    elif method == "moderate":
        scores = moderate(scores, labels if balanced else np.zeros_like(labels))
    kept = select_examples(
        scores, labels, keep, balanced=balanced, skip_hardest=0.1 if method == "ccs" else 0,
        strata=50 if method == "ccs" else None,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    choice = "balanced" if balanced else "over all"
    return {"method": method, "choice": choice, "kept": len(kept), "seconds": round(seconds, 3), "peak_mb": round(peak)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--row", nargs=2, metavar=("METHOD", "BALANCED"), help="one row, as JSON; used by this script")
    options = parser.parse_args()
    sizes = (options.examples, options.classes, options.keep)
    if options.row:
        print(json.dumps(measure(options.row[0], options.row[1] == "balanced", *sizes)))
        return 0
    rows = []
    print(f"{options.examples:,} examples, {options.classes} classes, keep {options.keep}")
    print(f"{'method':12} {'choice':10} {'kept':>9} {'seconds':>9} {'peak MB':>9}")
    for method in METHODS:
        for choice in ("over all", "balanced"):
            command = [sys.executable, __file__, "--row", method, choice]
            command += ["--examples", str(sizes[0]), "--classes", str(sizes[1]), "--keep", str(sizes[2])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            row = json.loads(done.stdout)
            rows.append(row)
            print(f"{method:12} {choice:10} {row['kept']:>9,} {row['seconds']:>9.2f} {row['peak_mb']:>9}", flush=True)
    print(json.dumps({"examples": sizes[0], "classes": sizes[1], "keep": sizes[2], "rows": rows}))
    return int(any(row["seconds"] > SECONDS or row["peak_mb"] > MEGABYTES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
