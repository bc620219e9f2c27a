"""The paragraph that people forward: how much faster, at what accuracy, how sure that is, and whether choosing paid.

It never claims more than the benchmark shows: "faster" needs the whole interval of the speed-up above both 1 and the
noise floor (what two runs of the same file differ by); a missing interval or baseline is said. Where an arm is the
random control of main, the paragraph says whether main beats it, or that this is not decided. Under several seeds it
speaks of their means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .controls import Contest, contest
from .facts import Facts, Gate, Row
from .numbers import DASH, interval, p_equals, percent, points, ratio, significant
from .reading import dig, listing, number, text

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class Verdict:
    text: str
    tone: Tone
    remarks: tuple[str, ...] = ()


def verdict(facts: Facts) -> Verdict:
    """The sentence for the top of the report, and remarks on how far to trust it."""
    if facts.state in ("failed", "interrupted", "running") or facts.unfinished:
        return _unfinished(facts)
    against = contests(facts)
    own = [one.sentence for one in against if one.of.arm == "main"]
    if facts.measurement is None:
        return Verdict(" ".join([_unmeasured(facts), *own]), "plain")
    shipped = facts.shipped
    if shipped is None:
        return Verdict(
            "The benchmark holds no row for the final file of the main arm, so there is no verdict.", "plain"
        )
    if facts.baseline is None:
        found = Verdict(_alone(facts, shipped), "plain", _remarks(facts, shipped, None))
    else:
        found = _compared(facts, shipped, facts.baseline)
    lost = any(one.outcome == "worse" for one in against if one.of.arm == "main")
    tone: Tone = "plain" if lost and found.tone == "good" else found.tone
    others = [one.sentence for one in against if one.of.arm != "main"]
    return Verdict(" ".join([found.text, *own]), tone, (*others, *found.remarks))


def contests(facts: Facts) -> tuple[Contest, ...]:
    """Every arm against its random control, main's first. What controls main is no control of further arms here."""
    metrics = [step.metrics for step in facts.steps if step.across_arms]
    of_main = {pair.control for pair in facts.controls if pair.arm == "main"}
    told = [pair for pair in facts.controls if pair.arm == "main" or pair.control not in of_main]
    return tuple(contest(pair, metrics) for pair in told)


def speed_word(row: Row, facts: Facts) -> Literal["faster", "slower", "no clear difference", ""]:
    """Faster or slower only when the interval says so and the difference is above the noise floor."""
    value, low, high = row.get("speedup"), row.get("speedup_low"), row.get("speedup_high")
    if value is None or low is None or high is None or row.baseline:
        return ""
    noise = dig(facts.measurement.metrics if facts.measurement else {}, "noise_floor")
    ceiling = max(1.0, number(noise, "ratio_high") or 1.0)
    floor = min(1.0, number(noise, "ratio_low") or 1.0)
    if low > 1 and value > ceiling:
        return "faster"
    if high < 1 and value < floor:
        return "slower"
    return "no clear difference"


def gate_sentence(gate: Gate) -> tuple[str, str, str]:
    """What is asked, what was measured, and met, missed or not measured."""
    form = points if gate.name == "accuracy_drop" else ratio
    asked = f"at most {form(gate.bound)}" if gate.name == "accuracy_drop" else f"at least {form(gate.bound)}"
    name = "Top-1 lost against dense" if gate.name == "accuracy_drop" else "Speed-up of p50 against dense"
    outcome = {True: "met", False: "missed", None: "not measured"}[gate.met]
    return f"{name}: {asked}", form(gate.measured), outcome


@dataclass(frozen=True, slots=True)
class _Told:
    """What the sentence says of main's files: of one, or of those of all seeds in the mean."""

    subject: str
    word: str
    value: float | None
    within: str
    accuracy: str


def _compared(facts: Facts, shipped: Row, base: Row) -> Verdict:
    name, at = _base_name(base), _setting(shipped)
    told = _over_seeds(facts, shipped, base) or _of_one(facts, shipped, base)
    speed, rest = f"{ratio(told.value)}{told.within}", f"{at}{told.accuracy}"
    if told.value is None:
        return Verdict(f"The speed of the compressed file against {name} was not recorded{told.accuracy}.", "plain")
    match told.word:
        case "faster":
            sentence = f"{told.subject} is {ratio(told.value)} as fast{told.within} as {name} {rest}."
        case "slower":
            sentence = f"{told.subject} is slower than {name}: its speed-up is {speed} {rest}."
        case "":
            sentence = f"{told.subject} ran at {speed} the speed of {name} {at}, without an interval to judge it by"
            sentence = f"{sentence}{told.accuracy}."
        case _:
            sentence = f"{told.subject} is not measurably faster than {name}: its speed-up is {speed} {rest}."
    tone: Tone = "good" if told.word == "faster" else "bad" if told.word == "slower" else "plain"
    if tone == "good" and dig(facts.measurement.metrics if facts.measurement else {}, "disturbed") is True:
        tone = "plain"
    if any(gate.met is False for gate in facts.gates):
        tone = "bad"
    return Verdict(sentence, tone, _remarks(facts, shipped, base))


def _of_one(facts: Facts, shipped: Row, base: Row) -> _Told:
    value = shipped.get("speedup")
    within = _interval("95% interval", interval(shipped.get("speedup_low"), shipped.get("speedup_high"), ratio))
    return _Told("The compressed file", speed_word(shipped, facts), value, within, _accuracy(shipped, base))


def _over_seeds(facts: Facts, shipped: Row, base: Row) -> _Told | None:
    """Means over the seeds of both arms; None where there is one seed. Faster or slower is said where each seed is."""
    lines = {text(line, "arm"): line for line in _lines_over_seeds(facts, shipped)}
    own, other = lines.get("main"), lines.get(base.arm)
    if own is None or other is None:
        return None
    of_main = [row for row in facts.first_setting if row.final and _family(row) == "main"]
    words = {speed_word(row, facts) for row in of_main}
    word = words.pop() if len(words) == 1 else "no clear difference"
    each = ", ".join(ratio(value) for value in listing(own, "speedup"))
    ends = [interval(number(line, "top1_low"), number(line, "top1_high"), percent) for line in (own, other)]
    one, two = (percent(number(line, "top1_mean")) for line in (own, other))
    accuracy = f", with top-1 {one} against {two} (95% intervals over seeds {' and '.join(ends)})"
    count = len(listing(own, "seeds"))
    return _Told(
        f"In the mean over {count} seeds the compressed file",
        word,
        number(own, "speedup_mean"),
        f" (each seed: {each})",
        accuracy,
    )


def _lines_over_seeds(facts: Facts, shipped: Row) -> list[Any]:
    """Of every arm, in the setting of the shipped file."""
    return [
        line
        for line in listing(facts.measurement.metrics if facts.measurement else {}, "over_seeds")
        if (text(line, "provider"), number(line, "batch"), number(line, "threads"))
        == (shipped.provider, shipped.batch, shipped.threads)
    ]


def _family(row: Row) -> str:
    """The arm as the file names it, whatever the seed."""
    return text(row.values, "family") or row.arm.partition("@")[0]


def _alone(facts: Facts, shipped: Row) -> str:
    p50, top1 = shipped.get("p50_ms"), shipped.get("top1")
    if p50 is None:
        return "The benchmark recorded no latency of the main arm's final file, so whether it is faster is open."
    if "dense" not in facts.arms:
        why = "there is no dense arm to compare it with"
    else:
        why = "it was not compared with another file"
    within = _interval("95% interval", interval(shipped.get("p50_low"), shipped.get("p50_high"), significant))
    accuracy = "top-1 not recorded" if top1 is None else f"top-1 {percent(top1)}{_own_interval(shipped)}"
    speed = " ".join(part for part in (f"p50 {significant(p50)} ms{within}", _setting(shipped)) if part)
    return f"The final file of the main arm: {speed}, {accuracy}; whether it is faster is open, because {why}."


def _unfinished(facts: Facts) -> Verdict:
    done = sum(len(step.places) for step in facts.steps if step.state in ("done", "cached"))
    every = sum(len(step.places) for step in facts.steps)
    broken = facts.broken
    progress = f"{done} of {every} stages are done"
    place = f"{broken.arms} / {broken.name}" if broken else ""
    if broken and (facts.state == "failed" or broken.state == "failed"):
        reason = f": {broken.error.strip().splitlines()[0].rstrip('.')}" if broken.error.strip() else ""
        return Verdict(f"The run failed in {place}{reason}. {progress}.", "bad")
    if facts.state == "interrupted":
        where = f" in {place}" if broken else ""
        return Verdict(f"The run was interrupted{where}. {progress}; the same command goes on from there.", "bad")
    if facts.state == "running":
        return Verdict(f"The run is still going. {progress}{f'; now {place}' if broken else ''}.", "plain")
    if not every:
        return Verdict("The run record names no stage, so there is nothing to report.", "plain")
    rest = f"The run did not go to its end: {progress}{f', {place} is not' if broken else ''}."
    return Verdict(rest, "plain")


def _unmeasured(facts: Facts) -> str:
    gone = [step for step in facts.steps if step.absent]
    if gone:
        return f"Nothing can be said: {gone[-1].absent}."
    scored = [
        (step, top1)
        for step in facts.steps
        if any(arm == "main" for arm, _ in step.places) and (top1 := number(step.metrics, "top1", "all")) is not None
    ]
    if not scored:
        return "This pipeline measures nothing: it holds no benchmark."
    claims = [text(claim, "words") for each in facts.steps for claim in listing(each.metrics, "matrix", "claims")]
    if claims:
        return f"{'; '.join(words.partition(' (')[0] for words in claims)}."
    step, top1 = scored[-1]
    reached = f"the last model, of {step.name}, reaches top-1 {percent(top1)}"
    return f"No latency was measured, because there is no benchmark; {reached}."


def _remarks(facts: Facts, shipped: Row, base: Row | None) -> tuple[str, ...]:
    metrics = facts.measurement.metrics if facts.measurement else {}
    remarks = _of_seeds(facts, shipped, base)
    noise = number(metrics, "noise_floor", "percent")
    if noise is not None:
        remarks.append(f"Noise floor: here, two runs of the same file may differ by up to {noise:.1f}%.")
    if base is not None:
        remarks += _paired(metrics, shipped, base)
    if dig(metrics, "disturbed") is True:
        reason = text(metrics, "disturbed_reason")
        remarks.append(
            f"The host was busy while measuring{f' ({reason})' if reason else ''}: repeat before relying on it."
        )
    return tuple(remarks)


def _of_seeds(facts: Facts, shipped: Row, base: Row | None) -> list[str]:
    """Which seeds the sentence above speaks of, and what the others say."""
    lines = _lines_over_seeds(facts, shipped)
    if base is not None and _over_seeds(facts, shipped, base) is not None:
        one, two = percent(shipped.get("top1")), percent(base.get("top1"))
        return [
            f"The first seed alone: {ratio(shipped.get('speedup'))}, top-1 {one} against {two}. Tiles, contributions "
            "and pictures below are of it."
        ]
    said = [
        f"{text(line, 'arm')} {percent(number(line, 'top1_mean'))}"
        f"{_interval('95% interval', interval(number(line, 'top1_low'), number(line, 'top1_high'), percent))}"
        f" at {ratio(number(line, 'speedup_mean'))}"
        for line in lines
    ]
    count = max((len(listing(line, "seeds")) for line in lines), default=0)
    return [f"Those are the numbers of the first seed. Means over {count} seeds: {', '.join(said)}."] if said else []


def _paired(metrics: Mapping[str, Any], one: Row, other: Row) -> list[str]:
    """Whether the difference in accuracy may be chance: over seeds by a paired t test, else by McNemar's on the same
    images. Two intervals that overlap prove nothing of it.
    """
    name = _base_name(other)
    for line in listing(metrics, "between_arms"):
        if (text(line, "arm"), text(line, "against")) == (_family(one), _family(other)):
            seeds = len(listing(line, "seeds"))
            if seeds > 1 and (p := number(line, "p")) is not None:
                said = "is not decided" if text(line, "verdict") == "not decided" else "is more than chance"
                test = f"paired t test over {seeds} seeds, {p_equals(p)}"
                return [f"The difference in accuracy to {name} {said} ({test})."]
    for flips in listing(metrics, "flips"):
        same = [text(flips, name) for name in ("arm", "entry", "variant")] == [one.arm, one.entry, one.variant]
        against = [text(flips, "against", name) for name in ("arm", "entry", "variant")]
        p = number(flips, "p")
        if p is not None and same and against == [other.arm, other.entry, other.variant]:
            said = "may be chance" if p >= 0.05 else "is more than chance"
            return [f"The difference in accuracy to {name} {said} (McNemar's {p_equals(p)}, on the same images)."]
    return []


def _accuracy(shipped: Row, base: Row) -> str:
    one, two = shipped.get("top1"), base.get("top1")
    if one is None or two is None:
        return "; top-1 was not measured for both"
    first = interval(shipped.get("top1_low"), shipped.get("top1_high"), percent)
    second = interval(base.get("top1_low"), base.get("top1_high"), percent)
    both = f" (95% intervals {first} and {second})" if first and second else ""
    return f", with top-1 {percent(one)} against {percent(two)}{both}"


def _own_interval(row: Row) -> str:
    return _interval("95% interval", interval(row.get("top1_low"), row.get("top1_high"), percent))


def _interval(words: str, shown: str) -> str:
    return f" ({words} {shown})" if shown and shown != DASH else ""


def _base_name(base: Row) -> str:
    return base.arm if base.arm == "dense" else f"the {base.variant or 'file'} of arm {base.arm} ({base.entry})"


def _setting(row: Row) -> str:
    """at batch 1 on 1 thread (cpu)"""
    words = [] if row.batch is None else [f"at batch {row.batch:g}"]
    if row.threads is not None:
        words.append(f"on {row.threads:g} thread{'' if row.threads == 1 else 's'}")
    if row.provider:
        words.append(f"({row.provider})")
    return " ".join(words)
