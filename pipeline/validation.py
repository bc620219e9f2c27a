"""From a node of pipeline.yaml to a config, or to errors in plain words at the place that caused them.

pydantic judges; its messages and locations ("Input should be a valid integer", `('u', "literal['auto']")`) are not for
readers. Each of its errors is walked along the config's own annotations and along the YAML nodes at once, so that the
message can say what the field takes, in words and with its whole range, and the caret can stand under what is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .diagnostics import Span, located, nearest, suggest
from .document import Node, describe
from .errors import SpecError
from .stage import Config

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake. Two arms that share a mistake have equal `signature`s (where in the config, and which rule)."""

    signature: tuple[object, ...]
    error: SpecError


def validate(
    model: type[ConfigT], node: Node, *, path: str, key: Span, other_keys: Sequence[str] = ()
) -> tuple[ConfigT | None, list[Fault]]:
    """The config of a mapping node, or None and what is wrong with it.

    path: what the node is called in messages ("stages.prune"; "" for the root). key: where to point when the node
    itself is at fault. other_keys: keys that are allowed beside the config's own; only told in hints.
    """
    try:
        return model.model_validate_json(json.dumps(node.plain())), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
        return None, _faults([(_Place(model, node, path, key).at(e["loc"]), e) for e in errors], other_keys)


def keys_of(model: type[BaseModel]) -> list[str]:
    """The names that a mapping for this config may have."""
    return list(model.model_fields)


@dataclass
class _Place:
    """A place in the config and in the file at once: what is expected there, and what stands there."""

    expected: Any
    node: Node | None
    path: str
    key: Span
    limits: tuple[Any, ...] = ()
    note: str = ""
    branch: tuple[str, str] | None = None  # in a union: its path, and the member that pydantic tried
    settled: bool = True  # False: the value fits no member of a union, which is told as a whole
    missing: str | int | None = None
    unknown: str | None = None

    def at(self, loc: tuple[str | int, ...]) -> _Place:
        """Walk down a location of pydantic."""
        for step in loc:
            expected, limits = _unwrapped(self.expected)
            members = [m for m in _members(expected) if m is not NoneType]
            if len(members) > 1:
                self.branch = self.branch or (self.path, str(step))
                chosen = [m for m in members if _is_model(m) and _answers_to(m, str(step))]
                if not chosen or self.node is None or not isinstance(self.node.value, dict):
                    self.settled = False
                    return self
                self.expected = chosen[0]
                continue
            self.expected = members[0] if members else expected
            self.limits += limits
            self.down(step)
            if self.missing is not None or self.unknown is not None:
                return self
        return self

    def down(self, step: str | int) -> None:
        if isinstance(step, int):
            if self.node is None or step >= len(self.node.items):
                self.missing = step
                return
            arguments = get_args(self.expected)
            repeated = get_origin(self.expected) is not tuple or (len(arguments) == 2 and arguments[1] is Ellipsis)
            self.expected = arguments[0 if repeated else step] if arguments else Any
            self.node = self.node.items[step]
            self.key, self.path, self.limits = self.node.span, f"{self.path}[{step}]", ()
            return
        fields: dict[str, FieldInfo] = self.expected.model_fields if _is_model(self.expected) else {}
        present = self.node is not None and step in self.node.mapping
        if _is_model(self.expected) and step not in fields:
            self.unknown = step
        elif not present:
            self.missing = step
        if self.node is None or not present:
            return
        self.key = self.node.keys[step]
        if self.unknown is not None:
            return
        if fields:
            self.expected, self.limits = fields[step].annotation, tuple(fields[step].metadata)
            described = fields[step].description
            self.note = f"{step}: {described}" if described else ""
        else:
            self.expected, self.limits = (get_args(self.expected) or (Any, Any))[-1], ()
        self.node, self.path = self.node.mapping[step], f"{self.path}.{step}".lstrip(".")

    @property
    def span(self) -> Span:
        """Under the value where one stands, else under its key."""
        return self.key if self.node is None or self.node.empty or not self.node.span.length else self.node.span


def _faults(errors: list[tuple[_Place, Any]], other_keys: Sequence[str]) -> list[Fault]:
    """One fault an error; of the members of a union only the one that fits best speaks."""
    tried: dict[str, dict[str, list[_Place]]] = {}
    for place, _ in errors:
        if place.branch:
            tried.setdefault(place.branch[0], {}).setdefault(place.branch[1], []).append(place)
    best = {
        path: min(members, key=lambda m: (not all(p.settled for p in members[m]), len(members[m])))
        for path, members in tried.items()
    }
    faults = []
    locations = [tuple(error["loc"]) for _, error in errors]
    unknown = [(place.path, place.unknown) for place, _ in errors if place.unknown is not None]
    errors = sorted(errors, key=lambda found: found[0].unknown is None)  # a misspelt key is the cause of a missing one
    for place, error in errors:
        if error["type"] == "too_short" and any(loc[:-1] == tuple(error["loc"]) for loc in locations):
            continue  # pydantic counts only the elements that are right
        if any(place.path == path and nearest(name, [str(place.missing)]) for path, name in unknown):
            continue
        if place.branch is None or best[place.branch[0]] == place.branch[1]:
            signature = (tuple(error["loc"]), error["type"], error["msg"])
            faults.append(Fault(signature, _told(place, error, other_keys)))
    return faults


def _told(place: _Place, error: Any, other_keys: Sequence[str]) -> SpecError:
    """An error in words."""
    if place.unknown is not None:
        own = keys_of(place.expected)
        valid = own + [k for k in other_keys if len(error["loc"]) == 1]
        hint = suggest(place.unknown, valid, kind="keys")
        return located(f"unknown key '{place.unknown}' in {place.path}", place.key, hint)
    if isinstance(place.missing, str):
        wanted = place.expected.model_fields[place.missing] if _is_model(place.expected) else None
        takes = words(wanted.annotation, tuple(wanted.metadata)) if wanted is not None else "a value"
        note = f" ({wanted.description})" if wanted is not None and wanted.description else ""
        return located(f"'{place.missing}' is missing in {place.path}", place.key, f"it takes {takes}{note}")
    if error["type"] in ("value_error", "assertion_error"):
        return _judged(place, str(error["ctx"]["error"]))
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _untagged(place, error["ctx"])
    takes = words(place.expected, place.limits)
    if place.node is None:
        return located(f"{place.path} must be {takes}", place.key, place.note)
    if isinstance(place.node.value, tuple) and error["type"] in ("too_short", "too_long", "missing"):
        got = f"a list of {len(place.node.value)}"
    else:
        got = describe(place.node)
    if error["type"] not in _IN_WORDS:
        takes = error["msg"].removeprefix("Input should be ")
    hint = _hint(place.expected, place.node) or place.note
    return located(f"{place.path} must be {takes}, got {got}", place.span, hint)


def _judged(place: _Place, text: str) -> SpecError:
    """A contradiction that the config's own validator found; "field.path: what is wrong; what to do" points to that
    field and says what to do on a line of its own.
    """
    key, path, hint = place.key, place.path, place.note
    models = [m for m in _members(_unwrapped(place.expected)[0]) if _is_model(m)]
    if models:
        text, _, hint = text.partition("; ")
        pointed = re.match(r"([a-z_]\w*(?:\.\w+)*): (.+)", text, re.DOTALL)
        # A field of the config, or a key that only another member of a union takes.
        known = {name for model in models for name in model.model_fields}
        known |= set() if place.node is None else set(place.node.mapping)
        if pointed and pointed[1].split(".")[0] in known:
            path, text = f"{path}.{pointed[1]}".lstrip("."), pointed[2]
            node = place.node
            for step in pointed[1].split("."):
                if node is None or step not in node.mapping:
                    break
                key, node = node.keys[step], node.mapping[step]
    elif place.node is not None:
        key = place.span
    return located(f"{path}: {text}", key, hint)


def _untagged(place: _Place, context: Mapping[str, str]) -> SpecError:
    """A mapping of several kinds without the key that says which, or with another word in it."""
    name = context["discriminator"].strip("'")
    kinds = [m.model_fields[name].annotation for m in _members(_unwrapped(place.expected)[0]) if _is_model(m)]
    tags = [str(tag) for kind in kinds for tag in get_args(kind)]
    takes = f"one of {', '.join(tags)}"
    node = None if place.node is None else place.node.mapping.get(name)
    if node is None:
        return located(f"'{name}' is missing in {place.path}", place.key, f"it takes {takes}")
    close = nearest(str(node.value), tags)
    hint = f"did you mean '{close}'?" if close else ""
    return located(f"{place.path}.{name} must be {takes}, got {describe(node)}", node.span, hint)


# The errors of pydantic that the words for the annotation answer completely.
_IN_WORDS = {
    *(
        "int_type",
        "int_from_float",
        "int_parsing",
        "float_type",
        "bool_type",
        "string_type",
        "none_required",
        "missing",
    ),
    *("list_type", "tuple_type", "dict_type", "set_type", "model_type", "literal_error", "too_short", "too_long"),
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "string_too_short", "string_too_long"),
}


def words(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """What an annotation accepts: "a whole number from 8 to 1024", "one of taylor, l1, random", "a number or null"."""
    annotation, more = _unwrapped(annotation)
    limits += more
    if get_origin(annotation) in (Union, UnionType):
        members = sorted(get_args(annotation), key=lambda m: m is NoneType)
        return " or ".join(dict.fromkeys(words(m, limits) for m in members))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (tuple, list, set, frozenset):
        fixed = origin is tuple and Ellipsis not in arguments
        count = f"{len(arguments)} " if fixed else ""
        element = words(arguments[0]) if arguments else "a value"
        return f"a list of {count}{_plural(element)}{_length(limits, 'values')}"
    if origin is dict or _is_model(annotation):
        return "a mapping"
    if annotation is str:
        return f"text{_length(limits, 'characters')}"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(limits)
    return {bool: "true or false", NoneType: "null", dict: "a mapping", list: "a list"}.get(annotation, "a value")


def _plural(element: str) -> str:
    if element.startswith("one of "):
        return element.removeprefix("one of ")
    singular = element.startswith("a ")
    head, _, tail = element.removeprefix("a ").partition("number")
    return f"{head}numbers{tail}" if singular and "number" in element else f"values, each {element}"


def _range(limits: tuple[Any, ...]) -> str:
    low = {name: getattr(x, name) for x in limits for name in ("gt", "ge") if getattr(x, name, None) is not None}
    high = {name: getattr(x, name) for x in limits for name in ("lt", "le") if getattr(x, name, None) is not None}
    if "ge" in low and "le" in high:
        return f" from {low['ge']} to {high['le']}"
    parts = [f"above {low['gt']}"] if "gt" in low else [f"of at least {low['ge']}"] if "ge" in low else []
    parts += [f"below {high['lt']}"] if "lt" in high else [f"at most {high['le']}"] if "le" in high else []
    return " " + " and ".join(parts) if parts else ""


def _length(limits: tuple[Any, ...], unit: str) -> str:
    least = next((x.min_length for x in limits if getattr(x, "min_length", None)), None)
    most = next((x.max_length for x in limits if getattr(x, "max_length", None)), None)
    if least is None and most is None:
        return ""
    if least == 1 and most is None:
        return " that is not empty"
    if least is not None and most is not None:
        return f" of {least} to {most} {unit}"
    return f" of at least {least} {unit}" if least is not None else f" of at most {most} {unit}"


def _hint(expected: Any, node: Node) -> str:
    """What to write instead, where that can be told."""
    value = node.value
    kinds = [m for m in _members(_unwrapped(expected)[0]) if m is not NoneType]
    choices = [str(c) for m in kinds if get_origin(m) is Literal for c in get_args(m)]
    if isinstance(value, str) and choices:
        close = nearest(value, choices)
        return f"did you mean '{close}'?" if close else ""
    if isinstance(value, str) and (int in kinds or float in kinds):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f"write {int(number) if number.is_integer() else number} as a plain number"
    if isinstance(value, str) and bool in kinds and value.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return f"write {int(value)}"
    lists = [m for m in kinds if get_origin(m) in (tuple, list)]
    if lists and isinstance(value, str | int | float) and not isinstance(value, bool):
        of_text = any(m is str or get_origin(m) is Literal for m in get_args(lists[0]))
        return f"write [{value}]" if of_text == isinstance(value, str) else ""
    models = [m for m in kinds if _is_model(m)]
    if len(models) == 1 and not isinstance(value, dict):
        return f"its keys are {', '.join(keys_of(models[0]))}"
    return ""


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without Annotated, and the limits that stood there."""
    limits: tuple[Any, ...] = ()
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            limits += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
    return annotation, limits


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType):
        return tuple(inner for m in get_args(annotation) for inner in _members(_unwrapped(m)[0]) or (m,))
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _answers_to(model: type[BaseModel], step: str) -> bool:
    """Whether pydantic's name for a member of a union, its class name or its tag, means this config. The name of a
    class with validators stands within theirs: function-after[_one_list(), Press].
    """
    return step.rstrip("]").rpartition(" ")[2] == model.__name__ or any(
        get_origin(f.annotation) is Literal and step in get_args(f.annotation) for f in model.model_fields.values()
    )
