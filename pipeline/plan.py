"""Which stage runs when, and what each reads: the file's arms as one graph in the order of execution.

The rule of wiring is one sentence: a stage reads what its `needs` name, else the nearest earlier stage of its arm that
writes what it reads. A stage that stands once for the pipeline (the benchmark) comes last and reads all arms, under all
seeds. Planning is pure, and everything that can be known to fail before a run starts fails here, at its place in the
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .diagnostics import Problems, Span, suggest
from .document import Node as YamlNode
from .spec import ArmSpec, DataConfig, EntrySpec, ModelConfig, PipelineSpec
from .stage import Config, Reads, Stage


@dataclass(frozen=True, slots=True)
class Edge:
    """One input of a node: another node (arm, entry), or a text for the store or the stage (train@7, timm:...)."""

    role: str
    source: tuple[str, str] | None
    ref: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A stage in an arm. Edges of a role that takes many come in the order of arms and entries."""

    arm: str
    entry: EntrySpec
    stage: Stage
    inputs: tuple[Edge, ...]
    seed: int
    data: DataConfig
    model: ModelConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """The nodes so that each stands after all it reads: the main arm, the other arms, the stages across arms."""

    spec: PipelineSpec
    nodes: tuple[Node, ...]

    def node(self, arm: str, entry: str) -> Node | None:
        return next((n for n in self.nodes if (n.arm, n.entry.name) == (arm, entry)), None)


def make_plan(spec: PipelineSpec, stages: Sequence[Stage]) -> Plan:
    """The plan of a pipeline. Raises SpecError for wiring that cannot work: nothing to read, a cycle, idle gates."""
    kinds = {s.name: s for s in stages}
    problems = Problems()
    nodes: list[Node] = []
    for arm in spec.arms.values():
        own = Problems()
        entries = [entry for entry in arm.entries if not kinds[entry.uses].across_arms]
        wired = [_wired(arm, entry, kinds, spec.arms, own) for entry in entries]
        if not own.errors:
            nodes += _ordered(wired, own)
        told = {error.where for error in problems.errors}  # an arm shares most lines with main, and their mistakes
        problems.errors += [error for error in own.errors if error.where not in told]
    if not problems.errors:
        nodes = _ordered(nodes, problems)  # once more: an arm may name a stage of another
    main = spec.arms["main"]
    for entry in main.entries:
        if kinds[entry.uses].across_arms:
            edges = tuple(_across(entry, spec, kinds, problems))
            nodes.append(Node("main", entry, kinds[entry.uses], edges, main.seed, main.data, main.model))
    _check_gates(spec, kinds, problems)
    problems.raise_if_any()
    return Plan(spec, tuple(nodes))


def part_of(entry: str, role: str) -> str:
    """What a part of an entry's work is called. No entry can be, so it never passes for the entry's own artifact."""
    return f"{entry}:{role}"


def beside(plan: Plan, stages: Sequence[Stage], arm: str, stage: Stage, config: Config, *, like: str) -> Node:
    """A node that no file names: `stage`, reading what the arm's first stage of the kind `like` reads, and called as a
    part of that one would be; in an arm without one it reads what a last stage would.

    Raises: SpecError when there is nothing for it to read.
    """
    spec = plan.spec.arms[arm]
    model = next((entry for entry in spec.entries if entry.uses == like), None)
    if model is None:
        key = plan.spec.root.keys["stages"]
        model = EntrySpec(like, like, (), config, {}, key, YamlNode({}, key, {}))
    entry = replace(model, name=part_of(model.name, stage.name), uses=stage.name, config=config)
    before = [one.name for one in spec.entries].index(model.name) if model in spec.entries else len(spec.entries)
    entries = (*spec.entries[:before], entry, *spec.entries[before:])
    problems = Problems()
    kinds = {one.name: one for one in (*stages, stage)}
    node = _wired(replace(spec, entries=entries), entry, kinds, plan.spec.arms, problems)
    problems.raise_if_any()
    return node


def _wired(
    arm: ArmSpec, entry: EntrySpec, kinds: Mapping[str, Stage], arms: Mapping[str, ArmSpec], problems: Problems
) -> Node:
    stage = kinds[entry.uses]
    edges = [*_inputs(arm, entry, stage, kinds, problems), *_references(arm, entry, stage, kinds, arms, problems)]
    return Node(arm.name, entry, stage, tuple(edges), arm.seed, arm.data, arm.model)


def _inputs(
    arm: ArmSpec, entry: EntrySpec, stage: Stage, kinds: Mapping[str, Stage], problems: Problems
) -> Iterator[Edge]:
    """An edge for each of the stage's Reads."""
    path = _path(arm, entry)
    named = _needed(arm, entry, kinds, problems)
    earlier = arm.entries[: arm.entries.index(entry)]
    for reads in stage.reads:
        by_name = [other for other in named if kinds[other.uses].writes == reads.kind]
        if len(by_name) > 1:
            message = f"{path}.needs names two that write {reads.kind}: '{by_name[0].name}' and '{by_name[1].name}'"
            problems.add(message, _item(entry, by_name[1].name), "keep one of the two")
        before = [other for other in earlier if kinds[other.uses].writes == reads.kind]
        source = by_name[0] if by_name else before[-1] if before else None
        if source is not None:
            yield Edge(reads.role, (arm.name, source.name))
        elif not reads.optional:
            message = f"{path} reads {reads.kind}, and no earlier stage{_of(arm)} writes it"
            problems.add(message, entry.key, _producers(reads, arm, kinds))


def _needed(arm: ArmSpec, entry: EntrySpec, kinds: Mapping[str, Stage], problems: Problems) -> list[EntrySpec]:
    """The entries that `needs` names; a name that is none is a problem."""
    found = []
    stage = kinds[entry.uses]
    for name in entry.needs:
        other = arm.entry(name)
        if other is not None and kinds[other.uses].across_arms:
            message = f"{_path(arm, entry)}.needs: '{name}' stands once for all arms and runs after them"
            problems.add(message, _item(entry, name))
        elif other is not None and all(kinds[other.uses].writes != reads.kind for reads in stage.reads):
            hint = f"it reads: {', '.join(dict.fromkeys(r.kind for r in stage.reads)) or 'nothing'}"
            message = f"{_path(arm, entry)}.needs: '{name}' writes {kinds[other.uses].writes}, which this does not read"
            problems.add(message, _item(entry, name), hint)
        elif other is not None:
            found.append(other)
        elif name in arm.left_out:
            _left_out(f"{_path(arm, entry)}.needs", name, arm, _item(entry, name), problems)
        else:
            hint = suggest(name, _others(arm, entry, kinds), kind="stages")
            message = f"{_path(arm, entry)}.needs: there is no stage '{name}' in this pipeline"
            problems.add(message, _item(entry, name), hint)
    return found


def _left_out(field: str, name: str, arm: ArmSpec, span: Span, problems: Problems) -> None:
    place = arm.left_out[name]
    who = "this pipeline" if arm.name == "main" else f"arm '{arm.name}'"
    hint = f"override {field} in that arm too" if arm.name != "main" else f"give '{name}' its settings, or name another"
    problems.add(f"{field}: {who} leaves out '{name}' ({place.short})", span, hint)


def _references(
    arm: ArmSpec,
    entry: EntrySpec,
    stage: Stage,
    kinds: Mapping[str, Stage],
    arms: Mapping[str, ArmSpec],
    problems: Problems,
) -> Iterator[Edge]:
    """An edge for each input that a field of the config names: a stage of this arm, or of another one, ARM/STAGE, under
    the same seed.
    """
    for role, text in stage.references(entry.config).items():
        path, span = _field(entry.node, text, role, _path(arm, entry)) or (_path(arm, entry), entry.key)
        if text.startswith("timm:"):
            yield Edge(role, None, text)
            continue
        if "@" in text:
            kind = text.split("@")[0]
            if kind not in kinds:
                problems.add(f"{path}: there is no stage '{kind}'", span, suggest(kind, kinds, kind="stages"))
            yield Edge(role, None, text)
            continue
        place, _, name = text.rpartition("/")
        owner = _same_seed(place, arm, arms) if place else arm
        if owner is None:
            known = [other.partition("@")[0] for other in arms]
            problems.add(f"{path}: there is no arm '{place}'", span, suggest(place, dict.fromkeys(known), kind="arms"))
            continue
        other, wanted = owner.entry(name), stage.reference_kind
        writers = _writers(wanted, owner, entry, kinds)
        if other is not None and kinds[other.uses].across_arms:
            problems.add(f"{path}: '{text}' stands once for all arms and runs after them", span)
        elif other is not None and kinds[other.uses].writes != wanted:
            hint = f"name a stage that writes {wanted}: {writers}"
            problems.add(f"{path}: '{text}' writes {kinds[other.uses].writes}, not {wanted}", span, hint)
        elif other is not None:
            yield Edge(role, (owner.name, name))
        elif name in owner.left_out:
            _left_out(path, name, owner, span, problems)
        else:
            hint = suggest(name, writers.split(", "), kind="stages")
            message = f"{path}: '{text}' is no stage of this pipeline"
            others = "one of another arm such as dense/train, an artifact such as train@latest, or timm:<model>"
            problems.add(message, span, f"{hint}; or {others}")


def _same_seed(name: str, arm: ArmSpec, arms: Mapping[str, ArmSpec]) -> ArmSpec | None:
    """The arm of that name in the file, under the seed of this one."""
    _, at, seed = arm.name.partition("@")
    return arms.get(f"{name}{at}{seed}")


def _writers(kind: str, arm: ArmSpec, entry: EntrySpec, kinds: Mapping[str, Stage]) -> str:
    return ", ".join(e.name for e in arm.entries if e is not entry and kinds[e.uses].writes == kind)


def _across(entry: EntrySpec, spec: PipelineSpec, kinds: Mapping[str, Stage], problems: Problems) -> Iterator[Edge]:
    """The edges of a stage that stands once: from every arm what it takes many of, else from the main arm."""
    stage, main = kinds[entry.uses], spec.arms["main"]
    needed = _needed(main, entry, kinds, problems)
    for reads in stage.reads:
        named = {other.name for other in needed if kinds[other.uses].writes == reads.kind}
        sources = [
            (arm.name, other.name)
            for arm in spec.arms.values()
            for other in arm.entries
            if kinds[other.uses].writes == reads.kind
            and not kinds[other.uses].across_arms
            and (not named or other.name in named)
        ]
        if not reads.many:
            sources = [source for source in sources if source[0] == "main"][-1:]
        if not sources and not reads.optional:
            message = f"{_path(main, entry)} reads {reads.kind}, and no stage writes it"
            problems.add(message, entry.key, _producers(reads, main, kinds))
        yield from (Edge(reads.role, source) for source in sources)
    yield from _references(main, entry, stage, kinds, spec.arms, problems)


def _ordered(nodes: list[Node], problems: Problems) -> list[Node]:
    """The nodes so that each stands after those of them that it reads, otherwise in the order that they come in."""
    waiting = {(node.arm, node.entry.name): node for node in nodes}
    done: list[Node] = []
    while waiting:
        ready = next((n for n in waiting.values() if not any(s in waiting for s in _sources(n))), None)
        if ready is None:
            _add_cycle(waiting, problems)
            break
        done.append(waiting.pop((ready.arm, ready.entry.name)))
    return done


def _sources(node: Node) -> list[tuple[str, str]]:
    return [edge.source for edge in node.inputs if edge.source is not None]


def _add_cycle(waiting: Mapping[tuple[str, str], Node], problems: Problems) -> None:
    """Name one way round. Every waiting node reads a waiting one, so walking back must come round."""
    way = [next(iter(waiting))]
    while way.count(way[-1]) < 2:
        way.append(next(s for s in _sources(waiting[way[-1]]) if s in waiting))
    way = way[way.index(way[-1]) :]
    order = list(waiting)
    # The edge that reads a later stage closes the way round: it was written out, so its place can be shown.
    reader, read = next((a, b) for a, b in pairwise(way) if order.index(b) >= order.index(a))
    node = waiting[reader]
    within = len({arm for arm, _ in way}) == 1
    names = {place: place[1] if within else "/".join(place) for place in way}
    span = _item(node.entry, read[1]) if read[1] in node.entry.needs else None
    if span is None:
        field = _field(node.entry.node, read[1] if within else names[read], "", "")
        span = field[1] if field else node.entry.key
    arm = "" if node.arm == "main" or not within else f" in arm '{node.arm}'"
    message = (
        f"'{names[reader]}' reads itself{arm}"
        if len(way) == 2
        else f"these stages wait for each other{arm}: {' -> '.join(names[place] for place in reversed(way))}"
    )
    problems.add(message, span, f"let '{names[reader]}' read an earlier stage")


def _check_gates(spec: PipelineSpec, kinds: Mapping[str, Stage], problems: Problems) -> None:
    """Gates compare the main arm with the arm `dense` in what a benchmark measured; without these they cannot hold."""
    asked = [name for name, bound in spec.gates.model_dump().items() if bound is not None]
    if not asked:
        return
    key = spec.root.keys["gates"]
    if not any(kinds[e.uses].writes == "measurement" for e in spec.arms["main"].entries):
        problems.add("gates need a benchmark, and 'stages:' has none", key, "add 'benchmark: {}', or remove the gates")
    if "dense" not in spec.arms:
        hint = "add an arm 'dense' that leaves out what compresses, such as {prune: null, quantize: null}"
        problems.add("gates compare with the arm 'dense', and there is none", key, hint)
    elif not any(kinds[e.uses].writes == "onnx" for e in spec.arms["dense"].entries):
        problems.add("gates compare with the arm 'dense', and it exports no file", key, "leave its export stage in")


def _path(arm: ArmSpec, entry: EntrySpec) -> str:
    return f"stages.{entry.name}" if arm.name == "main" else f"arms.{arm.name}.{entry.name}"


def _others(arm: ArmSpec, entry: EntrySpec, kinds: Mapping[str, Stage]) -> list[str]:
    return [e.name for e in arm.entries if e is not entry and not kinds[e.uses].across_arms]


def _of(arm: ArmSpec) -> str:
    return "" if arm.name == "main" else f" of arm '{arm.name}'"


def _producers(reads: Reads, arm: ArmSpec, kinds: Mapping[str, Stage]) -> str:
    """What to do about an input that nobody produces."""
    writers = [name for name, stage in kinds.items() if stage.writes == reads.kind]
    out = [name for name in writers if name in arm.left_out]
    if out:
        return f"'{out[0]}' writes it, and is left out ({arm.left_out[out[0]].short})"
    return f"put one of these before it: {', '.join(writers)}" if writers else "no stage writes it"


def _item(entry: EntrySpec, name: str) -> Span:
    """Where `needs` names a stage."""
    given = entry.node.mapping.get("needs")
    items = (given.items or (given,)) if given is not None else ()
    return next((item.span for item in items if item.value == name), entry.key)


def _field(node: YamlNode, text: str, role: str, path: str) -> tuple[str, Span] | None:
    """Path and place of the field that holds a text; a field called like the role is preferred."""
    found: list[tuple[str, Span]] = []
    for key, inner in node.mapping.items():
        if key in ("uses", "needs"):
            continue
        if inner.value == text:
            hit = (f"{path}.{key}", inner.span)
            found.insert(0, hit) if key == role else found.append(hit)
        elif deeper := _field(inner, text, role, f"{path}.{key}"):
            found.append(deeper)
    return found[0] if found else None
