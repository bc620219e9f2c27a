"""One line for each arm under several seeds: mean, spread and interval of its accuracy, and its speed-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean, stdev
from typing import Any

from ..methods.paired_tests import accuracy_interval

_SETTING = ("provider", "batch", "threads", "io")


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The final files of an arm in a setting, over its seeds; [] when no arm has two.

    rows: of the benchmark, with `family` and `seed`. Lists are in the order of the seeds. top1_low and top1_high: the
    95 % interval of the mean by Student's t over seeds. speedup_mean: geometric, since speed-ups are ratios.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["final"]:
            groups.setdefault((row["family"], *(row.get(name) for name in _SETTING)), []).append(row)
    return [_line(group) for group in groups.values() if len(group) > 1]


def _line(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    top1 = [row["top1"] for row in group]
    speedup = [row["speedup"] for row in group]
    low, high = accuracy_interval(top1, group[0]["test_images"])
    return {
        "arm": group[0]["family"],
        **{name: group[0].get(name) for name in _SETTING},
        "seeds": [row["seed"] for row in group],
        "variant": [row["variant"] for row in group],
        "top1": top1,
        "top1_mean": fmean(top1),
        "top1_sd": stdev(top1),
        "top1_low": low,
        "top1_high": high,
        "speedup": speedup,
        "speedup_mean": geometric_mean(speedup),
        "bytes": [row["bytes"] for row in group],
    }
