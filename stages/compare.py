"""`sievit compare`: whether B may replace A: accuracy on the same test images, latency on this host, size.

Accuracy by McNemar's exact test (`methods/paired_tests.py`), latency by the benchmark's own protocol, in which both
files run in turn and A runs twice, so that a difference inside the noise is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sievit.pipeline import completion, options
from sievit.pipeline.console import results_only
from sievit.pipeline.errors import GateError, InputError, UsageError
from sievit.pipeline.session import session_of, written_store

from . import benchmark, products
from .conditions import ACCURACY, Condition, parse
from .deploy.providers import Provider
from .same_images import Side, accuracies, load, opened, test_images

if TYPE_CHECKING:
    from rich.console import RenderableType


PROVIDERS = get_args(Provider)


def compare(
    context: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="what there was: an arm, a run, an artifact, an .onnx file",
            autocompletion=completion.arms_and_refs,
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="what is to replace it", autocompletion=completion.arms_and_refs)
    ],
    *,
    fail_if: Annotated[
        list[str],
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="exit code 6 when it holds, as 'speedup < 1.5'; repeatable",
            default_factory=list,
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PIPELINE", help="a pipeline file, for its test images")
    ] = None,
    provider: Annotated[str, typer.Option("--provider", metavar="|".join(PROVIDERS))] = "cpu",
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="images at once")] = 1,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads")] = 1,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, max=3600, help="timed calls of each file")
    ] = 2.0,
    store: options.StoreFolder = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two files: accuracy, latency, size. A gate for a team's own CI.

    A and B are each an arm (its last file in the newest whole run), a run (5f3a91, 5f3a91/dense), an artifact
    (quantize@3), or an .onnx file. Both classify the same test images: those of the pipeline that made them, or those
    of --data. Top-1 is compared by McNemar's exact test. Latency is measured here and now, both files in turn, A twice:
    what that pair shows is the noise floor, and a difference inside it is called no difference.

    A condition is a field, a comparator and a bound; accuracies are fractions, 0.01 is one point. One that cannot be
    judged, for want of labels or of calls, is an error and no pass. Fields:

        accuracy            top-1 of B
        accuracy_drop       top-1 of A less that of B; accuracy_drop_high: the upper end of its 95% interval
        accuracy_p          p of McNemar's test; accuracy_verdict: better, worse or no difference
        agreement           images to which both give the same class
        speedup             p50 of A over that of B; speedup_low: the lower end of its 95% interval
        latency_verdict     faster, slower or no difference
        p50_ms              of B; so are p90_ms, p99_ms, peak_memory_mb, bytes, parameters and macs
        bytes_ratio         B's over A's; so are parameters_ratio and macs_ratio

    Exit codes: 0 compared, 6 a condition holds, 2 a condition is wrong, 3 it cannot be judged.

        sievit compare dense main --fail-if 'accuracy_drop > 0.01' --fail-if 'speedup < 1.5'
        sievit compare old.onnx new.onnx --data pipeline.yaml --fail-if 'latency_verdict == slower'
    """
    conditions = [parse(text) for text in fail_if]
    if provider not in PROVIDERS:
        raise UsageError(f"there is no provider {provider!r}", hint=f"providers: {', '.join(PROVIDERS)}")
    session, place = session_of(context), written_store(store)
    first, second = (opened(products.find(asked, place, session.stages)) for asked in (a, b))
    test, unsaid = test_images(first, second, data, place, session)
    _require(conditions, unsaid, first, second)
    progress = session.display(quiet)
    with results_only():
        images = load(test, (first, second)) if test is not None else None
        # First what takes seconds, and refuses a provider, a batch size or a file that does not run.
        timed = benchmark.benchmark_files(
            [first.product.path, second.product.path], (provider,), (batch,), (threads,), seconds, progress
        )
        found = accuracies(first, second, images, provider, progress) if images is not None else {}
    document = compared(first, second, found, unsaid, timed)
    judged, error = judge(conditions, document["fields"], document["unsaid"])
    session.console.result(document | {"conditions": judged}, draw)
    if error is not None:
        raise error
    if held := [each for each in judged if each["holds"]]:
        raise GateError(
            "; ".join(f"{each['condition']}: it is {_short(each['value'])}" for each in held),
            where=f"{first.product.name} against {second.product.name}",
            hint="keep A, or change B or the conditions",
        )


# ---- side by side


def compared(a: Side, b: Side, found: Mapping[str, Any], unsaid: str, timed: Mapping[str, Any]) -> dict[str, Any]:
    """The document: both sides, their accuracy and latency, and the fields that conditions may name."""
    rows = [dict(row) for row in timed["rows"][:2]]  # on a card: data stays there
    sides = []
    for side, row in zip((a, b), rows, strict=True):
        ref = side.product.artifact.ref if side.product.artifact else None
        place = {"name": side.product.name, "path": str(side.product.path), "ref": ref}
        sides.append({**row, **place, "bytes": side.bundle.bytes, "parameters": side.parameters, "macs": side.macs})
    for name in ("top1", "top1_low", "top1_high"):
        for side_row, value in zip(sides, found.get(name, (None, None)), strict=True):
            side_row[name] = value
    row = sides[1]
    verdict = "no difference" if row["verdict"] == "baseline" else row["verdict"]  # the same file twice
    fields = {
        "accuracy": row["top1"],
        "accuracy_drop": found.get("drop"),
        "accuracy_drop_high": found.get("drop_high"),
        "accuracy_p": found.get("p"),
        "accuracy_verdict": found.get("verdict"),
        "agreement": found.get("agreement"),
        "latency_verdict": verdict,
        **{name: row[name] for name in ("speedup", "speedup_low", "p50_ms", "p90_ms", "p99_ms", "peak_memory_mb")},
        **{name: row[name] for name in ("bytes", "parameters", "macs")},
        **{f"{name}_ratio": _over(row[name], sides[0][name]) for name in ("bytes", "parameters", "macs")},
    }
    missing = {f"{rank}_ms": f"there are {row.get(f'{rank}_unsaid')}; raise --seconds" for rank in ("p90", "p99")}
    return {
        "a": sides[0],
        "b": row,
        "accuracy": dict(found) or None,
        "fields": fields,
        "unsaid": {name: why for name, why in missing.items() if fields[name] is None}
        | (dict.fromkeys(sorted(ACCURACY), unsaid) if unsaid else {}),
        **{name: timed[name] for name in ("noise_floor", "host", "disturbed", "disturbed_reason", "protocol")},
    }


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


# ---- conditions


def _require(conditions: Sequence[Condition], unsaid: str, a: Side, b: Side) -> None:
    """Raises InputError for a condition that could not be judged after all the measuring."""
    missing = dict.fromkeys(ACCURACY, unsaid) if unsaid else {}
    for side, fields in ((a, ("macs_ratio",)), (b, ("macs", "macs_ratio"))):
        if side.macs is None:
            why = f"the MACs of {side.product.path.name} stand in no sidecar .json, and its graph does not tell them"
            missing |= dict.fromkeys(fields, why)
    for condition in conditions:
        if condition.field in missing:
            condition.holds({"unsaid": missing})


def judge(
    conditions: Sequence[Condition], fields: Mapping[str, Any], unsaid: Mapping[str, str]
) -> tuple[list[dict[str, Any]], InputError | None]:
    """Each condition with what was measured and whether it holds (None: it cannot be judged), and the first error."""
    judged: list[dict[str, Any]] = []
    first: InputError | None = None
    for condition in conditions:
        holds: bool | None = None
        try:
            holds = condition.holds({**fields, "unsaid": unsaid})
        except InputError as error:
            first = first or error
        judged.append(
            {
                "condition": condition.text,
                "field": condition.field,
                "comparator": condition.comparator,
                "bound": condition.bound,
                "value": fields.get(condition.field),
                "holds": holds,
            }
        )
    return judged, first


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


# ---- drawing


def draw(document: dict[str, Any]) -> RenderableType:
    """A and B in columns, what the difference is worth, and the conditions."""
    from rich.console import Group

    from sievit.pipeline.drawing import line, table
    from sievit.pipeline.report.numbers import big, percent, points, ratio, share, significant, size

    a, b, found = document["a"], document["b"], document["accuracy"]
    fields = document["fields"]
    rows: list[Sequence[str]] = []
    if found:
        gain, low, high = (points(-found[name]) for name in ("drop", "drop_high", "drop_low"))
        change = f"{gain}\n{low.removesuffix(' points')} to {high}"
        cells = [_below(percent(side["top1"]), percent, side["top1_low"], side["top1_high"]) for side in (a, b)]
        rows.append(("top-1", *cells, f"{change}\n{found['verdict']}, p {found['p']:.2g}"))
    speed = _below(ratio(b["speedup"]), ratio, b["speedup_low"], b["speedup_high"])
    for rank in ("p50", "p90", "p99"):
        cells = [
            _below(significant(side[f"{rank}_ms"]), significant, side[f"{rank}_low"], side[f"{rank}_high"])
            for side in (a, b)
        ]
        rows.append((f"{rank} ms", *cells, f"{speed}\n{fields['latency_verdict']}" if rank == "p50" else ""))
    for title, name, form in (("size", "bytes", size), ("parameters", "parameters", big), ("MACs", "macs", big)):
        rows.append((title, form(a[name]), form(b[name]), share(fields[f"{name}_ratio"])))
    memory = [significant(side["peak_memory_mb"]) for side in (a, b)]
    rows.append(("peak memory, MB", *memory, share(_over(b["peak_memory_mb"], a["peak_memory_mb"]))))
    columns = ("", "A", "B", "B against A")
    parts: list[RenderableType] = [
        *(line(f"{title}: {side['name']} ({side['variant']})", "bold") for title, side in (("A", a), ("B", b))),
        table(*columns, rows=rows, right=columns[1:]),
        line(_remark(document), "dim"),
    ]
    if found:
        told = f"{found['images']} test images: {found['only_a']} only A has right, {found['only_b']} only B"
        parts.append(line(told, "dim"))
    else:
        parts.append(line(f"no accuracy: {document['unsaid']['accuracy']}", "yellow"))
    if document["disturbed"]:
        parts.append(line("the machine was busy: these latencies are disturbed", "yellow"))
    for each in document["conditions"]:
        verdict = {True: "fails: it holds", False: "passes", None: "cannot be judged"}[each["holds"]]
        value = "" if each["value"] is None else f" ({_short(each['value'])})"
        parts.append(line(f"{each['condition']}{value}: {verdict}", "green" if each["holds"] is False else "bold red"))
    return Group(*parts)


def _below(value: str, form: Callable[[float | None], str], low: float | None, high: float | None) -> str:
    """A value, and its interval in the line below."""
    from sievit.pipeline.report.numbers import interval

    ends = "" if low == high else interval(low, high, form)
    return f"{value}\n{ends}" if ends else value


def _remark(document: Mapping[str, Any]) -> str:
    row, floor = document["b"], document["noise_floor"]["percent"]
    setting = f"{row['provider']}, batch {row['batch']}, {row['threads']} thread{'s' * (row['threads'] != 1)}"
    host = (document.get("host") or {}).get("processor")
    return f"{f'{host}, ' if host else ''}{setting}; below: 95% intervals; noise floor {floor:.1f}% between equal files"
