"""The model card: what a file is, what it was measured to do and where, what it was made from, who may use it.

Only what is known is said: no number without its interval and its host, "not known" where nobody wrote it down. The
same facts give the same text, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sievit.pipeline.report.numbers import NARROW, big, count, interval, percent, ratio, significant, size

UNKNOWN = "not known"


@dataclass(frozen=True)
class Measured:
    """A benchmark artifact's word on this very file. rows: one a setting; host and the rest as in its metrics."""

    ref: str
    key: str
    created: str
    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """All that a card tells. size: bytes of the file and of the weights beside it. lineage: from the file backwards."""

    name: str
    sha256: str
    size: int
    signature: str
    opset: int
    precision: str
    parameters: int
    macs: int | None
    classes: Sequence[str]
    preprocessing: Mapping[str, Any]
    files: Mapping[str, str]  # name -> what it is
    measured: Measured | None = None
    lineage: Sequence[Mapping[str, Any]] = ()
    model: Mapping[str, Any] = field(default_factory=dict)  # the pipeline's model block
    data: str | None = None  # the pipeline's data source
    weights_licence: str | None = None
    scores: str = "logits"  # what the output holds


def card(facts: Facts) -> str:
    """README.md of a pack: Markdown below the header that the Hugging Face hub reads."""
    parts = [
        _header(facts),
        f"# {facts.name}\n\n{_summary(facts)}",
        f"## Use\n\n{_USE}",
        f"## Measured\n\n{_measurement(facts.measured) if facts.measured else _NOT_MEASURED}",
        f"## The file\n\n{_table(('', ''), _file(facts))}",
        f"## Preprocessing\n\n{_preprocessing(facts.preprocessing)}",
        f"## Made from\n\n{_lineage(facts)}",
        f"## Licences\n\n{_table(('of', 'licence'), _licences(facts))}",
        "## Files\n\n" + _table(("file", "what it is"), list(facts.files.items())),
    ]
    return "\n\n".join(parts).replace(NARROW, " ") + "\n"


_USE = """    sha256sum -c SHA256SUMS
    pip install onnxruntime numpy pillow
    python predict.py photo.jpg"""
_NOT_MEASURED = (
    "No benchmark of this very file is in the store that it was packed from. `sievit benchmark` makes one, and "
    "`sievit pack` then writes its numbers here."
)


def _header(facts: Facts) -> str:
    fields: dict[str, str] = {"library_name": "onnxruntime", "pipeline_tag": "image-classification"}
    if facts.weights_licence:
        fields["license"] = facts.weights_licence
    if facts.model.get("pretrained"):
        fields["base_model"] = f"timm/{facts.model['name']}"
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in sorted(fields.items())), "---"])


def _summary(facts: Facts) -> str:
    model = f", made with timm's {facts.model['name']}" if facts.model.get("name") else ""
    pixels = facts.preprocessing["size"]
    return (
        f"An image classifier in ONNX{model}: {len(facts.classes)} classes, images of {pixels} x {pixels} pixels, "
        f"{facts.precision}, {size(facts.size)}. {_accuracy(facts.measured)}"
    )


def _accuracy(measured: Measured | None) -> str:
    row = measured.rows[0] if measured else {}
    if row.get("top1") is None:
        return "Its accuracy was not measured."
    ends = interval(row["top1_low"], row["top1_high"], percent)
    return f"Top-1 is {percent(row['top1'])} ({ends}) of {count(row['test_images'])} test images."


def _measurement(measured: Measured) -> str:
    metrics, host = measured.metrics, measured.metrics.get("host") or {}
    baseline = metrics.get("baseline") or {}
    against = " ".join(str(baseline[part]) for part in ("arm", "entry", "variant") if baseline.get(part))
    columns = ("setting", "p50 ms", "p90 ms", "p99 ms", f"speed-up over {against}")
    lines = [
        _accuracy(measured),
        "",
        _table(columns, [_latency(row) for row in measured.rows]),
        "",
        "In brackets 95% intervals: Wilson's for top-1, over sessions for the rest.",
    ]
    if (floor := metrics.get("noise_floor")) is not None:
        lines.append(f"Two measurements of one file differed by up to {floor['percent']:.1f}%.")
    lines.append(f"Host: {_host(host)}.")
    if metrics.get("disturbed"):
        lines.append(f"**The host was busy meanwhile** ({metrics.get('disturbed_reason')}): repeat this before use.")
    lines.append(f"Measured {measured.created[:10]}, artifact benchmark {measured.key}.")
    return "\n".join(lines)


def _latency(row: Mapping[str, Any]) -> tuple[str, ...]:
    threads = row["threads"]
    setting = f"{row['provider']}, batch {row['batch']}, {threads} thread{'s' * (threads != 1)}"
    if row.get("io") not in (None, "host"):
        setting += f", data on {row['io']}"
    times = (_estimate(row, f"p{rank}_ms", f"p{rank}", significant) for rank in (50, 90, 99))
    speedup = "1 (it is the baseline)" if row["verdict"] == "baseline" else _estimate(row, "speedup", "speedup", ratio)
    return setting, *times, speedup if row["verdict"] != "no difference" else f"{speedup}, no difference"


def _estimate(row: Mapping[str, Any], value: str, ends: str, form: Any) -> str:
    if row.get(value) is None:
        return f"not said: {row.get(f'{ends}_unsaid') or UNKNOWN}"
    found = interval(row.get(f"{ends}_low"), row.get(f"{ends}_high"), form)
    return f"{form(row[value])} ({found})" if found else str(form(row[value]))


def _host(host: Mapping[str, Any]) -> str:
    cards = [str(card) for card in host.get("graphics_cards") or ()]
    said = [
        host.get("processor"),
        *cards,
        f"{host['usable_cores']} cores" if host.get("usable_cores") else None,
        ", ".join(host.get("instruction_sets") or ()) or None,
        f"{host['memory_gb']} GB" if host.get("memory_gb") else None,
        host.get("system"),
        "a virtual machine" if host.get("virtual_machine") else None,
        f"ONNX Runtime {host['onnxruntime']}" if host.get("onnxruntime") else None,
    ]
    return ", ".join(str(each) for each in said if each) or UNKNOWN


def _file(facts: Facts) -> list[tuple[str, str]]:
    return [
        ("signature", f"`{facts.signature}`"),
        ("scores", facts.scores.replace("_", " ")),
        ("precision", facts.precision),
        ("size", f"{size(facts.size)} ({count(facts.size)} bytes)"),
        ("parameters", f"{big(facts.parameters)} ({count(facts.parameters)})"),
        ("MACs for one image", f"{big(facts.macs)} ({count(facts.macs)})"),
        ("opset", str(facts.opset)),
        ("SHA-256", f"`{facts.sha256}`"),
    ]


def _preprocessing(pre: Mapping[str, Any]) -> str:
    pixels = f"{pre['size']} x {pre['size']}"
    if pre["crop"] == "center":
        shorter = round(pre["size"] / pre["crop_pct"])
        fitted = f"the shorter side to {shorter} pixels ({pre['resize']}), the middle {pixels} cut out"
    else:
        fitted = f"to {pixels} pixels ({pre['resize']}), whatever its shape"
    mean, std = (", ".join(f"{value:g}" for value in pre[name]) for name in ("mean", "std"))
    return (
        f"RGB; {fitted}; times {pre['scale']:.6g}, minus mean ({mean}), over std ({std}). model.json says it to a "
        "program, and predict.py does it."
    )


def _lineage(facts: Facts) -> str:
    if not facts.lineage:
        return "The store that it was packed from does not know this file."
    rows = [
        (
            each["stage"],
            f"{each['arm']}/{each['entry']}" if each.get("arm") else "–",
            f"`{each['key']}`",
            f"`{each['digest']}`",
        )
        for each in facts.lineage
    ]
    return _table(("stage", "made for", "key", "SHA-256 of its content"), rows)


def _licences(facts: Facts) -> list[tuple[str, str]]:
    if facts.weights_licence:
        began = f"{facts.weights_licence}, as timm says of {facts.model['name']}"
    elif facts.model and not facts.model.get("pretrained") and not facts.model.get("weights"):
        began = "trained from random weights: nobody else's"
    else:
        began = UNKNOWN
    data = f"{UNKNOWN} ({facts.data})" if facts.data else UNKNOWN
    return [("the weights that training began with", began), ("the images", data)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
