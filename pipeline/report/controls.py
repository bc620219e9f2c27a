"""Whether what an arm chose was worth choosing: every arm beside its random control, in a sentence.

A control is known by its settings and never by its name: the same stages with the same settings, data, model and seed,
but that something is drawn by lot which the other arm chooses by a method. An arm that differs in anything else as well
is another arm and no control: what it shows may come from that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

from .numbers import count, p_equals, points, points_between
from .reading import listing, mapping, number, objects, text

LEVEL = 0.05  # as that of the stages' own tests
BY_LOT = ("random", "random_fixed")
CHOOSING = ("method", "importance")  # fields that say how something is chosen
APART = ("arm", "inputs", "config")  # of a node: compared otherwise than for being the very same
Outcome = Literal["better", "worse", "not decided", "not tested"]


@dataclass(frozen=True, slots=True)
class Control:
    """An arm, its control, and the fields that are drawn by lot in the control, dotted, its stage first."""

    arm: str
    control: str
    fields: tuple[str, ...]

    @property
    def chosen(self) -> str:
        """What lots take the place of: examples and patches."""
        names = list(dict.fromkeys(_noun(field) for field in self.fields))
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True, slots=True)
class Contest:
    """An arm against its control on the same test images: what came of it, in a word and in a sentence."""

    of: Control
    outcome: Outcome
    sentence: str


def roles(arms: Collection[str], baseline: str, found: Collection[Control]) -> tuple[tuple[str, str], ...]:
    """What each arm is for, in words, as far as its settings tell; "" for others. Further seeds are no arms here."""
    told: dict[str, list[str]] = {arm: [] for arm in arms if "@" not in arm}
    for arm, words in told.items():
        words += ["the pipeline as it is written"] if arm == "main" else []
        words += ["the baseline"] if arm == baseline else []
        words += [f"random control of {pair.arm}, {pair.chosen} by lot" for pair in found if pair.control == arm]
    return tuple((arm, "; ".join(words)) for arm, words in told.items())


def controls(record: Mapping[str, Any], across: Collection[tuple[str, str]]) -> tuple[Control, ...]:
    """Every arm with its controls, those of main first. across: (arm, entry) of stages that stand once for all arms."""
    arms: dict[str, dict[str, Mapping[str, Any]]] = {}
    for node in objects(record, "spec", "nodes"):
        arm, entry = text(node, "arm"), text(node, "entry")
        if "@" not in arm and (arm, entry) not in across:  # further seeds have the same settings
            arms.setdefault(arm, {})[entry] = node
    pairs = [(one, other, _by_lot(arms[one], arms[other])) for one, other in permutations(arms, 2)]
    found = [Control(one, other, fields) for one, other, fields in pairs if fields]
    return tuple(sorted(found, key=lambda pair: pair.arm != "main"))


def contest(control: Control, metrics: Iterable[Mapping[str, Any]]) -> Contest:
    """What a test of the two says, and no more. metrics: of the stages that may have tested them, the benchmark's
    `between_arms` or the matrix's claims.
    """
    who = "It" if control.arm == "main" else f"Arm {control.arm}"
    it = who if control.arm != "main" else "it"
    other = f"its random control, arm {control.control} (the same, but {control.chosen} by lot)"
    line = next((found for each in metrics for line in tested(each) if (found := _between(line, control))), {})
    gap = number(line, "difference")
    if gap is None:
        reason = "no test of the two on the same images was recorded"
        return Contest(control, "not tested", f"Whether {it} beats {other}, is not decided: {reason}.")
    size, how = points(abs(gap)), f"({_how(line)})"
    match text(line, "verdict"):
        case "better":
            return Contest(control, "better", f"{who} beats {other}, by {size} of top-1 {how}.")
        case "worse":
            return Contest(control, "worse", f"{who} is worse than {other}, by {size} of top-1 {how}.")
    way = "more" if gap > 0 else "less"
    apart = f"{size} {way}" if round(100 * gap, 1) else "as much"
    return Contest(control, "not decided", f"Whether {it} beats {other}, is not decided: its top-1 is {apart} {how}.")


def tested(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A line for every two arms that a stage tested on the same images, whole images first."""
    matrix = mapping(metrics, "matrix")
    common = {"seeds": listing(matrix, "seeds"), "images": number(matrix, "test_images")}
    claims = [common | _of_claim(claim) for claim in objects(matrix, "claims") if text(claim, "expect") == "greater"]
    same = [line for line in claims if line["patches"]]
    return [*objects(metrics, "between_arms"), *sorted(same, key=lambda line: bool(line["patches"] != "full"))]


def _of_claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    """patches: those that both arms were tested on, "" where each was tested on others."""
    arm, _, patches = text(claim, "left").partition("/")
    against, _, theirs = text(claim, "right").partition("/")
    value, p = number(claim, "value"), number(claim, "p")
    word = "not decided" if value is None or p is None or p >= LEVEL else "better" if value > 0 else "worse"
    ends = {"difference": value, "low": number(claim, "low"), "high": number(claim, "high"), "p": p}
    same = patches if patches == theirs else ""
    return {"arm": arm, "against": against, "verdict": word, "patches": same, **ends}


def _between(line: Mapping[str, Any], control: Control) -> Mapping[str, Any]:
    """The line as of the arm against its control; {} when it is of other arms."""
    match (text(line, "arm"), text(line, "against")):
        case (control.arm, control.control):
            return line
        case (control.control, control.arm):
            return _turned(line)
    return {}


def _turned(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same difference, seen from the other side."""
    ends = {
        name: number(line, other) for name, other in (("difference", "difference"), ("low", "high"), ("high", "low"))
    }
    turned = {name: None if value is None else -value for name, value in ends.items()}
    word = {"better": "worse", "worse": "better"}.get(text(line, "verdict"), text(line, "verdict"))
    return {**line, **turned, "verdict": word}


def _how(line: Mapping[str, Any]) -> str:
    """95% interval 0.2 to 2.8 points; McNemar's p = 0.02 on the same 450 test images; one seed: said of these two
    networks, not of the method
    """
    within, p = points_between(number(line, "low"), number(line, "high")), number(line, "p")
    seeds, images = len(listing(line, "seeds")), count(number(line, "images"))
    parts = [f"95% interval {within}"] if within else []
    if seeds > 1:
        parts.append(f"paired t test over {seeds} seeds, {p_equals(p)}, the same {images} test images")
    else:
        parts.append(f"McNemar's {p_equals(p)} on the same {images} test images")
        parts.append("one seed: said of these two networks, not of the method")
    if text(line, "patches") not in ("", "full"):
        parts.append(f"both on {text(line, 'patches')} patches")
    return "; ".join(parts)


def _by_lot(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The fields that `other` draws by lot and `one` does not; () where they differ in anything else."""
    if list(one) != list(other):
        return ()
    found: list[str] = []
    for entry, node in one.items():
        theirs = other[entry]
        if _rest(node) != _rest(theirs) or _read(node) != _read(theirs):
            return ()
        for path, mine, lot in _unlike(mapping(node, "config"), mapping(theirs, "config"), entry):
            if path.rpartition(".")[2] not in CHOOSING or lot not in BY_LOT or mine in BY_LOT or mine is None:
                return ()
            found.append(path)
    return tuple(found)


def _rest(node: Mapping[str, Any]) -> dict[str, Any]:
    """Stage, seed, data, model and versions."""
    return {name: value for name, value in node.items() if name not in APART}


def _read(node: Mapping[str, Any]) -> list[Any]:
    """What a node reads: role, entry, text; a stage of its own arm without the arm's name."""
    found = []
    for edge in listing(node, "inputs"):
        role, source, ref = edge if isinstance(edge, list | tuple) and len(edge) == 3 else (edge, None, None)
        if isinstance(source, list | tuple) and len(source) == 2 and source[0] == text(node, "arm"):
            source = ["", source[1]]
        found.append([role, None if source is None else list(source), ref])
    return found


def _unlike(one: Any, other: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values of everything that differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys((*one, *other)):
            yield from _unlike(one.get(name), other.get(name), f"{path}.{name}")
    elif one != other:
        yield path, one, other


def _noun(field: str) -> str:
    """ticket.examples.method -> examples; prune.importance -> importance."""
    *above, last = field.split(".")
    return above[-1] if last == "method" else last
