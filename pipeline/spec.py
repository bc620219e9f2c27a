"""pipeline.yaml as typed values: what was asked for, checked, every arm resolved, nothing decided yet.

An arm is the file with other settings: its overrides are merged into the YAML (mappings deeply, anything else replaces,
`null` leaves a stage out) and the result is validated as if it had been written out. Everything here is pure: it reads
one file and writes none, and finds all independent mistakes of the file in one go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .diagnostics import Problems, Source, Span, located, nearest, suggest
from .document import EXAMPLE, Node, contents, describe, parse
from .errors import SpecError
from .overrides import apply, merge
from .settings import DataConfig, GatesConfig, LaunchConfig, ModelConfig, TrackConfig
from .stage import JSON, Config, Stage
from .validation import Fault, validate

__all__ = [
    "ArmSpec",
    "DataConfig",
    "EntrySpec",
    "GatesConfig",
    "LaunchConfig",
    "ModelConfig",
    "PipelineSpec",
    "TrackConfig",
    "json_schema",
    "load_pipeline",
]

TOP_KEYS = ("name", "seed", "seeds", "device", "launch", "data", "model", "stages", "arms", "gates", "track")
RESERVED = (
    "name",
    "seed",
    "seeds",
    "data",
    "model",
    "device",
    "launch",
    "arms",
    "gates",
    "stages",
    "main",
    "runs",
    "track",
)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = "lower-case letters, digits, '.', '_' and '-', a letter or digit first, at most 64"
NEEDS = "write the name of an earlier stage, or a list of them, each once"

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class _Header(Config):
    name: str = "pipeline"
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is a GPU")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.seeds is not None and "seed" in self.model_fields_set:
            raise ValueError("seeds: contradicts 'seed'; give one of the two")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: names a seed twice; give each once")
        return self


class _Seed(Config):
    seed: Seed = 0


@dataclass(frozen=True)
class EntrySpec:
    """One entry under `stages:`, as an arm sees it. `key` and `node` are where it stands in the file."""

    name: str
    uses: str
    needs: tuple[str, ...]
    config: Config
    config_raw: dict[str, JSON] = field(compare=False)
    key: Span = field(repr=False, compare=False)
    node: Node = field(repr=False, compare=False)


@dataclass(frozen=True)
class ArmSpec:
    """A resolved arm under one seed: its entries in the order of the file, and where those it leaves out were left out.

    Under the first seed it has its name in the file, under seed 1 `main@seed1`: no name in a file can hold an '@'.
    """

    name: str
    seed: int
    data: DataConfig
    model: ModelConfig
    entries: tuple[EntrySpec, ...]
    left_out: Mapping[str, Span] = field(repr=False, compare=False)

    def entry(self, name: str) -> EntrySpec | None:
        return next((e for e in self.entries if e.name == name), None)


@dataclass(frozen=True)
class PipelineSpec:
    """The whole file after overrides. `text` is what stands in the file, `root` what was read from it."""

    path: Path
    base: Path
    name: str
    seeds: tuple[int, ...]
    device: Literal["auto", "cpu", "cuda"]
    data: DataConfig
    model: ModelConfig
    arms: Mapping[str, ArmSpec]  # "main" first; all arms under the first seed, then all under the next one
    gates: GatesConfig
    launch: LaunchConfig
    track: TrackConfig
    text: str = field(repr=False)
    root: Node = field(repr=False, compare=False)


def load_pipeline(path: Path, stages: Sequence[Stage], overrides: Sequence[str | Source] = ()) -> PipelineSpec:
    """Read, override and check a pipeline. Raises SpecError, or UsageError for an override that is none."""
    root = parse(contents(path), str(path))
    text = root.span.source.text
    return _Reader(apply(root, overrides), {s.name: s for s in stages}).pipeline(path, text)


class _Reader:
    """Goes through the sections of one file and gathers their problems."""

    def __init__(self, root: Node, kinds: Mapping[str, Stage]) -> None:
        self.root = root
        self.kinds = kinds
        self.problems = Problems()
        self.faults: dict[str, set[tuple[object, ...]]] = {}  # of main's entries; an arm does not tell them again
        self.misspelt: set[str | None] = (
            set()
        )  # stages probably meant under 'stages:'; arms that spell them right are right

    def pipeline(self, path: Path, text: str) -> PipelineSpec:
        self.top_keys()
        header = self.checked(_Header, self.part(("name", "seed", "seeds", "device")), "")
        if header is not None and "name" in self.root.mapping:
            self.name_ok(header.name, self.root.mapping["name"].span, "a pipeline name")
        data = self.checked(DataConfig, self.section("data"), "data", self.root.keys.get("data"))
        model = self.checked(ModelConfig, self.section("model"), "model", self.root.keys.get("model"))
        gates = self.checked(GatesConfig, self.section("gates"), "gates", self.root.keys.get("gates"))
        launch = self.checked(LaunchConfig, self.section("launch"), "launch", self.root.keys.get("launch"))
        track = self.checked(TrackConfig, self.section("track"), "track", self.root.keys.get("track"))
        main = self.main(header, data, model)
        arms = [self.arm(name, main, header) for name in self.section("arms").mapping]
        self.problems.raise_if_any()
        assert header is not None and data is not None and model is not None
        assert gates is not None and launch is not None and track is not None
        resolved = {arm.name: arm for arm in [main, *arms] if arm is not None}
        self.differs(resolved)
        seeds = header.seeds or (header.seed,)
        base = path.absolute().parent
        rest = {"data": data, "model": model, "gates": gates, "launch": launch, "text": text, "root": self.root}
        rest |= {"track": track, "seeds": seeds, "arms": _under(seeds, resolved)}
        return PipelineSpec(path=path, base=base, name=header.name, device=header.device, **rest)

    def top_keys(self) -> None:
        for key, span in self.root.keys.items():
            if key not in TOP_KEYS:
                hint = suggest(key, TOP_KEYS, kind="keys")
                if key in self.kinds:
                    hint = "stages stand under 'stages:'"
                self.problems.add(f"unknown key '{key}'", span, hint)
        stages = self.root.mapping.get("stages")
        if stages is None and not self.problems.errors:
            where = self.root.span.source.name
            self.problems.keep(SpecError("'stages' is missing: there is nothing to run", where=where, hint=EXAMPLE))
        elif stages is not None and not stages.items and stages.value in (None, {}):
            self.problems.add("'stages' is empty: there is nothing to run", self.root.keys["stages"], EXAMPLE)

    def part(self, keys: Sequence[str]) -> Node:
        """The root with only these keys."""
        present = {k: v for k, v in self.root.mapping.items() if k in keys}
        return Node(present, self.root.span, self.root.keys)

    def section(self, name: str) -> Node:
        """A mapping of the root; empty when it is absent, null, or (which is a problem) something else."""
        node = self.root.mapping.get(name)
        if node is not None and isinstance(node.value, dict):
            return node
        if node is not None and node.value is not None:
            self.problems.add(f"'{name}' must be a mapping, got {describe(node)}", node.span)
        return Node({}, self.root.keys.get(name, self.root.span))

    def checked(self, model: type[Any], node: Node, path: str, key: Span | None = None) -> Any:
        config, faults = validate(model, node, path=path, key=key or self.root.span)
        for fault in faults:
            self.problems.keep(fault.error)
        return config

    def name_ok(self, name: str, span: Span, what: str, reserved: Sequence[str] = ()) -> bool:
        if not NAME.fullmatch(name) or name.endswith("."):
            self.problems.add(f"'{name[:80]}' cannot be {what}", span, f"allowed: {NAME_RULE}")
            return False
        if name in reserved:
            self.problems.add(f"'{name}' is a reserved word, not {what}", span, f"reserved: {', '.join(reserved)}")
            return False
        return True

    def main(self, header: Any, data: Any, model: Any) -> ArmSpec | None:
        stages = self.section("stages")
        entries: list[EntrySpec | None] = []
        left_out: dict[str, Span] = {}
        for name, node in stages.mapping.items():
            key = stages.keys[name]
            if not self.name_ok(name, key, "a stage name", RESERVED) or not self.block_ok(name, node, key):
                entries.append(None)
            elif node.value is None:
                left_out[name] = key
            else:
                entry, faults = self.entry(name, node, key, f"stages.{name}")
                self.faults[name] = {f.signature for f in faults}
                for fault in faults:
                    self.problems.keep(fault.error)
                entries.append(entry)
        whole = [e for e in entries if e is not None]
        if header is None or data is None or model is None or len(whole) < len(entries):
            return None
        seed = header.seeds[0] if header.seeds else header.seed
        return ArmSpec("main", seed, data, model, tuple(whole), left_out)

    def block_ok(self, name: str, node: Node, key: Span) -> bool:
        if node.empty:
            hint = "write {} for its defaults, or null to leave the stage out"
            self.problems.add(f"'{name}:' has nothing behind it", key, hint)
            return False
        if node.value is not None and not isinstance(node.value, dict):
            self.problems.add(f"'{name}' must be a mapping of its settings, or null, got {describe(node)}", node.span)
            return False
        return True

    def entry(self, name: str, node: Node, key: Span, path: str) -> tuple[EntrySpec | None, list[Fault]]:
        """An entry with its config validated by the stage it uses."""
        uses = node.mapping.get("uses", Node(name, key))
        if not isinstance(uses.value, str) or uses.value not in self.kinds:
            explicit = "uses" in node.mapping
            self.misspelt |= set() if explicit else {nearest(name, self.kinds)}
            if explicit and not isinstance(uses.value, str):
                message = f"{path}.uses must be the name of a stage, got {describe(uses)}"
            else:
                message = f"{path}.uses: there is no stage '{uses.value}'" if explicit else f"'{name}' is no stage"
            hint = suggest(str(uses.value), self.kinds, kind="stages")
            hint += "" if explicit else f"; to give a stage another name write '{name}: {{uses: <stage>}}'"
            return None, [Fault((name, "uses"), located(message, uses.span if explicit else key, hint))]
        faults = []
        needs: list[str] = []
        given = node.mapping.get("needs")
        for item in (given.items if isinstance(given.value, tuple) else (given,)) if given is not None else ():
            if not isinstance(item.value, str):
                message = f"{path}.needs must be a stage of this pipeline or a list of them, got {describe(item)}"
                faults.append(Fault((name, "needs"), located(message, key if item.empty else item.span, NEEDS)))
            elif item.value in needs:
                faults.append(
                    Fault((name, "twice"), located(f"{path}.needs names '{item.value}' twice", item.span, NEEDS))
                )
            else:
                needs.append(item.value)
        own = {k: v for k, v in node.mapping.items() if k not in ("uses", "needs")}
        settings = Node(own, node.span, node.keys)
        kind = self.kinds[uses.value]
        config, wrong = validate(kind.config, settings, path=path, key=key, other_keys=("uses", "needs"))
        faults += wrong
        if config is None or faults:
            return None, faults
        return EntrySpec(name, kind.name, tuple(needs), config, settings.plain(), key, node), []

    def arm(self, name: str, main: ArmSpec | None, header: Any) -> ArmSpec | None:
        arms = self.section("arms")
        key, overrides = arms.keys[name], arms.mapping[name]
        if not self.name_ok(name, key, "an arm name", ("main",)):
            return None
        if not overrides.mapping:
            what = (
                "overrides nothing"
                if overrides.value in (None, {})
                else f"must be a mapping, got {describe(overrides)}"
            )
            self.problems.add(f"arm '{name}' {what}", key, "give it the settings that differ, or remove it")
            return None
        stages = self.section("stages")
        valid = [*stages.mapping, "data", "model", "seed"]
        for entry in overrides.mapping:
            if entry not in valid and entry not in self.misspelt:
                hint = suggest(entry, valid, kind="names")
                self.problems.add(f"arm '{name}' overrides '{entry}', which is not there", overrides.keys[entry], hint)
        path = f"arms.{name}"
        seed = self.seed(overrides, header, path)
        data = self.merged(DataConfig, "data", overrides, main.data if main else None, path)
        model = self.merged(ModelConfig, "model", overrides, main.model if main else None, path)
        entries: list[EntrySpec | None] = []
        left_out: dict[str, Span] = {}
        for entry_name, base in stages.mapping.items():
            own = overrides.mapping.get(entry_name)
            entry_key = overrides.keys.get(entry_name, stages.keys[entry_name])
            if own is None:
                whole = base
            elif not self.override_ok(name, entry_name, own, base, entry_key):
                entries.append(None)
                continue
            else:
                whole = merge(base, own)
            if whole.value is None:
                left_out[entry_name] = entry_key
            elif own is None:
                entries.append(main.entry(entry_name) if main else None)
            else:
                entries.append(self.overridden(entry_name, whole, entry_key, path))
        present = [e for e in entries if e is not None]
        if seed is None or data is None or model is None or len(present) < len(entries):
            return None
        return ArmSpec(name, seed, data, model, tuple(present), left_out)

    def seed(self, overrides: Node, header: Any, path: str) -> int | None:
        if "seed" in overrides.mapping and header is not None and header.seeds:
            message = f"{path}.seed: the pipeline has 'seeds', and every arm runs under each of them"
            self.problems.add(message, overrides.keys["seed"], "leave it out")
            return None
        if "seed" in overrides.mapping:
            own = Node({"seed": overrides.mapping["seed"]}, overrides.span, overrides.keys)
            config: _Seed | None = self.checked(_Seed, own, path)
            return config.seed if config else None
        return (header.seeds[0] if header.seeds else header.seed) if header else None

    def merged(self, model: type[Config], name: str, overrides: Node, base: Config | None, path: str) -> Any:
        own = overrides.mapping.get(name)
        if own is None:
            return base
        if not isinstance(own.value, dict):
            self.problems.add(f"{path}.{name} must be a mapping, got {describe(own)}", overrides.keys[name])
            return None
        if base is None:  # main's own section is wrong; told there
            return None
        return self.checked(model, merge(self.section(name), own), f"{path}.{name}", overrides.keys[name])

    def override_ok(self, arm: str, name: str, own: Node, base: Node, key: Span) -> bool:
        if not self.block_ok(name, own, key):
            return False
        uses = base.mapping.get("uses", Node(name, key)).value
        if "uses" in own.mapping and base.value is not None and own.mapping["uses"].value != uses:
            message = f"arm '{arm}' makes another stage of '{name}', which is '{uses}'"
            self.problems.add(message, own.keys["uses"], "give the other stage an entry of its own, null elsewhere")
            return False
        if isinstance(uses, str) and uses in self.kinds and self.kinds[uses].across_arms:
            message = f"'{name}' stands once for all arms; arm '{arm}' cannot override it"
            self.problems.add(message, key, "set it under 'stages:'")
            return False
        return True

    def overridden(self, name: str, whole: Node, key: Span, path: str) -> EntrySpec | None:
        entry, faults = self.entry(name, whole, key, f"{path}.{name}")
        for fault in faults:
            if fault.signature not in self.faults.get(name, set()):
                self.problems.keep(fault.error)
        return entry

    def differs(self, arms: Mapping[str, ArmSpec]) -> None:
        """An arm that resolves to the main arm compares nothing, which nobody can have meant."""
        main = arms["main"]
        for name, arm in arms.items():
            same = (arm.seed, arm.data, arm.model, arm.entries) == (main.seed, main.data, main.model, main.entries)
            if name != "main" and same:
                message = f"arm '{name}' is equal to the main arm: it compares nothing"
                self.problems.add(message, self.section("arms").keys[name], "give it a setting that differs")
        self.problems.raise_if_any()


def _under(seeds: Sequence[int], arms: Mapping[str, ArmSpec]) -> dict[str, ArmSpec]:
    """The arms, read under the first seed, under each of them. What does not depend on a seed has equal keys in all."""
    more = [replace(arm, name=f"{arm.name}@seed{seed}", seed=seed) for seed in seeds[1:] for arm in arms.values()]
    return {**arms, **{arm.name: arm for arm in more}}


def json_schema(stages: Sequence[Stage]) -> dict[str, JSON]:
    """The JSON schema of pipeline.yaml with these stages, for editors."""
    from .schema import schema_of  # half of pydantic, which only editors need

    return schema_of(stages)
