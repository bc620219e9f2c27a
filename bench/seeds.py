"""One pipeline under several seeds: mean and spread of the accuracy, and of the speed-up measured in each run.

    python bench/seeds.py pipeline.yaml --seeds 0 1 2 [--set key=value ...]

Every seed is a whole `sievit run`, cached as any other. The splits do not depend on the seed: arms and seeds
are compared on the same test images. Prints a table and, last, one line of JSON. Times are not printed: they belong
to a host, ratios come from one run each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any


def run(pipeline: str, seed: int, settings: list[str]) -> list[dict[str, Any]]:
    """The benchmark's rows of one seed."""
    options = [part for text in (f"seed={seed}", *settings) for part in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "sievit.stages", "run", pipeline, "--json", *options], stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, 6):  # 6: a gate was missed, the numbers stand
        raise SystemExit(f"seed {seed} failed with exit code {done.returncode}:\n{done.stdout}")
    result: dict[str, Any] = json.loads(done.stdout)
    return [row for row in result["rows"] if row["final"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    rows = {seed: run(arguments.pipeline, seed, arguments.settings) for seed in arguments.seeds}
    first = rows[arguments.seeds[0]]
    summary = []
    for row in first:
        same = [
            next(r for r in rows[seed] if all(r[k] == row[k] for k in ("arm", "provider", "batch", "threads")))
            for seed in arguments.seeds
        ]
        top1, speedup = [r["top1"] for r in same], [r["speedup"] for r in same]
        known = {key: row[key] for key in ("arm", "batch", "threads")}
        measured = {"bytes": [r["bytes"] for r in same], "variant": [r["variant"] for r in same]}
        summary.append({**known, "top1": top1, "speedup": speedup, **measured})
        spread = statistics.stdev(top1) if len(top1) > 1 else float("nan")
        print(
            f"{row['arm']:10} batch {row['batch']:<4} threads {row['threads']}  top-1 {statistics.mean(top1):.2%} "
            f"(s.d. {spread:.2%}, {', '.join(f'{t:.1%}' for t in top1)})  "
            f"speed-up {', '.join(f'{s:.2f}' for s in speedup)}  {', '.join(r['variant'] for r in same)}"
        )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
