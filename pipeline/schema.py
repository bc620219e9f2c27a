"""The JSON schema of pipeline.yaml, for editors: completion and red underlines while one types.

It says less than `load_pipeline` does (no contradictions between fields, no check that a named stage exists), and
never refuses a file that `load_pipeline` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from .settings import DataConfig, GatesConfig, LaunchConfig, ModelConfig, TrackConfig
from .stage import JSON, Config, Stage

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


def schema_of(stages: Sequence[Stage]) -> dict[str, JSON]:
    """A JSON schema (draft 2020-12) of the whole file, from the configs of these stages."""
    sections = (DataConfig, ModelConfig, GatesConfig, LaunchConfig, TrackConfig)
    configs: list[type[Config]] = [*sections, *(s.config for s in stages)]
    unique = list(dict.fromkeys(configs))
    refs, bundle = models_json_schema([(c, "validation") for c in unique], ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = bundle["$defs"]
    names = {config: refs[config, "validation"]["$ref"].removeprefix("#/$defs/") for config in unique}
    definitions |= {f"{name}Override": _partial(body) for name, body in list(definitions.items())}
    full = {s.name: _entry(definitions[names[s.config]], s) for s in stages}
    partial = {s.name: _entry(definitions[f"{names[s.config]}Override"], s) for s in stages if not s.across_arms}
    renamed = {"anyOf": [{"type": "null"}, *(_renamed(full[s.name]) for s in stages)]}
    arm = {
        "type": "object",
        "properties": {
            "seed": _seed(),
            "data": _ref(f"{names[DataConfig]}Override"),
            "model": _ref(f"{names[ModelConfig]}Override"),
            **{name: _or_null(body) for name, body in partial.items()},
        },
        "minProperties": 1,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Sievit pipeline",
        "type": "object",
        "additionalProperties": False,
        "required": ["stages"],
        "properties": {
            "name": {"type": "string", "pattern": NAME_PATTERN, "default": "pipeline"},
            "seed": _seed(),
            "seeds": {
                "type": "array",
                "items": {k: v for k, v in _seed().items() if k != "default"},
                "minItems": 1,
                "uniqueItems": True,
                "description": "instead of seed: all arms under each of them",
            },
            "device": {"enum": ["auto", "cpu", "cuda"], "default": "auto"},
            "launch": _or_null(_ref(names[LaunchConfig])),
            "data": _or_null(_ref(names[DataConfig])),
            "model": _or_null(_ref(names[ModelConfig])),
            "stages": {
                "type": "object",
                "description": "the stages in order; null leaves one out",
                "properties": {name: _or_null(body) for name, body in full.items()},
                "additionalProperties": renamed,
                "propertyNames": {"pattern": NAME_PATTERN},
                "minProperties": 1,
            },
            "arms": _or_null(
                {
                    "type": "object",
                    "description": "the same pipeline with other settings, compared in the report",
                    "additionalProperties": arm,
                    "propertyNames": {"pattern": NAME_PATTERN},
                }
            ),
            "gates": _or_null(_ref(names[GatesConfig])),
            "track": _or_null(_ref(names[TrackConfig])),
        },
        "$defs": definitions,
    }


def _ref(name: str) -> dict[str, JSON]:
    return {"$ref": f"#/$defs/{name}"}


def _or_null(body: dict[str, JSON]) -> dict[str, JSON]:
    return {"anyOf": [body, {"type": "null"}]}


def _seed() -> dict[str, JSON]:
    return {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0}


def _entry(config: dict[str, JSON], stage: Stage) -> dict[str, JSON]:
    """A stage's config with the keys that every entry may have."""
    name = {"type": "string"}
    wiring = {
        "uses": {"const": stage.name, "description": "the kind of stage; by default the entry's name"},
        "needs": {
            "anyOf": [name, {"type": "array", "items": name, "uniqueItems": True}],
            "description": "the stages it reads; by default the nearest earlier one that writes what it reads",
        },
    }
    lines = stage.manual.strip().splitlines()
    about = lines[0] if lines else config.get("description", "")
    return {**config, "description": about, "properties": {**config.get("properties", {}), **wiring}}


def _renamed(entry: dict[str, JSON]) -> dict[str, JSON]:
    return {**entry, "required": [*entry.get("required", []), "uses"]}


def _partial(body: Any) -> Any:
    """The schema of an override: the same keys, none required."""
    if isinstance(body, dict):
        return {
            key: f"{value}Override" if key == "$ref" else _partial(value)
            for key, value in body.items()
            if key != "required"
        }
    return [_partial(item) for item in body] if isinstance(body, list) else body
