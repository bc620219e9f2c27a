"""`--set prune.target.macs=0.4`: fields of pipeline.yaml set from the command line, before anything is validated.

The value is YAML under the same strict rules as the file. What is set keeps its place in the option, so that a mistake
in it is shown in the option and not in a file that does not hold it: --set, or the --grid and --search of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .diagnostics import Source, Span, excerpt, located, printable, suggest
from .document import Node, describe, read
from .errors import UsageError

SECTIONS = ("data", "model", "gates", "launch", "track")
FIELDS = ("name", "seed", "seeds", "device")
RIVALS = {"seed": "seeds", "seeds": "seed"}  # what an option sets takes the place of what the file says by the other


@dataclass(frozen=True, slots=True)
class Override:
    """One option: the path from the root of the file to the field, where each part stands, and the value."""

    source: Source
    path: tuple[str, ...]
    spans: tuple[Span, ...]
    value: Node


def apply(root: Node, options: Sequence[str | Source]) -> Node:
    """The root with each `path=value` set; a mapping replaces, it is not merged. The root itself is not changed.

    A text is that of a --set; the source of another option is called by its own name in what is said of it.
    """
    done: list[Override] = []
    for option in options:
        source = option if isinstance(option, Source) else Source(f"--set {option}", option, inline=True)
        override = _parsed(source, root)
        for other in done:
            short = min(len(other.path), len(override.path))
            if other.path[:short] == override.path[:short]:
                hint = f"keep one of the two; the other is {other.source.name}"
                raise _usage("the same field is set twice", override.source, override.spans[-1], hint)
        done.append(override)
    ousted = {RIVALS.get(override.path[0]) for override in done}
    root = Node({key: node for key, node in root.mapping.items() if key not in ousted}, root.span, root.keys)
    for override in done:
        root = _set(root, override, 0)
    return root


def merge(base: Node, over: Node) -> Node:
    """Mappings merge key by key, anything else replaces. Places are those of what was written last."""
    if not isinstance(over.value, dict) or not isinstance(base.value, dict):
        return over
    values = dict(base.value)
    for key, node in over.value.items():
        values[key] = merge(values[key], node) if key in values else node
    return Node(values, over.span, {**base.keys, **over.keys})


def _parsed(source: Source, root: Node) -> Override:
    text = source.text
    field, equals, _ = text.partition("=")
    whole = Span(source, 1, 1, len(field))
    if not equals or not field.strip():
        raise _usage(
            "an override is field=value", source, whole, f"for example {_option(source)} prune.target.macs=0.4"
        )
    if "\n" in text or "\r" in text:
        raise _usage("an override is one line", source, whole, "write lists and mappings as [a, b] and {a: 1}")
    node = read(source, len(field) + 1)
    if node is None or node.empty:
        raise _usage(f"no value for {field}", source, whole, f"write {field}=null to set it to nothing")
    path, spans = _path(field, source, root)
    return Override(source, path, spans, node)


def _path(field: str, source: Source, root: Node) -> tuple[tuple[str, ...], tuple[Span, ...]]:
    """The path from the root; entry and arm names may hold dots, so the longest known name wins."""
    entries = _names(root, "stages")
    parts: list[tuple[str, Span]] = []
    at = 0

    def take(valid: Iterable[str], what: str) -> str:
        nonlocal at
        rest = field[at:]
        known = [name for name in valid if rest == name or rest.startswith(name + ".")]
        name = max(known, key=len, default=rest.split(".")[0])
        span = Span(source, 1, at + 1, len(name))
        if not known:
            raise located(f"'{name}' is no {what}", span, suggest(name, valid, kind="names"))
        parts.append((name, span))
        at += len(name) + 1
        return name

    tops = [*entries, *SECTIONS, *FIELDS, "arms", "stages"]
    first = take(tops, "stage or field of this pipeline")
    if first == "stages":
        take(entries, "stage of this pipeline")
    elif first == "arms":
        take(_names(root, "arms"), "arm of this pipeline")
        take([*entries, "data", "model", "seed"], "stage or field of an arm")
    elif first not in SECTIONS + FIELDS:
        parts.insert(0, ("stages", parts[0][1]))
    while at <= len(field):
        name = field[at:].split(".")[0]
        span = Span(source, 1, at + 1, len(name))
        if not name.strip():
            example = f"for example {_option(source)} prune.target.macs=0.4"
            raise _usage("a part of the field's path is empty", source, span, example)
        parts.append((name, span))
        at += len(name) + 1
    return tuple(name for name, _ in parts), tuple(span for _, span in parts)


def _names(root: Node, section: str) -> list[str]:
    node = root.mapping.get(section)
    return list(node.mapping) if node is not None else []


def _set(node: Node, override: Override, depth: int) -> Node:
    """The node with the value at the rest of the path; absent and null mappings are made."""
    if depth == len(override.path):
        return override.value
    name, span = override.path[depth], override.spans[depth]
    if node.value is not None and not isinstance(node.value, dict):
        kind = "a list is set as a whole" if isinstance(node.value, tuple) else "it has no fields to set"
        done = ".".join(override.path[:depth]).removeprefix("stages.")
        raise located(f"'{done}' is {describe(node)}; {kind}", span, f"write {_option(span.source)} '{done}=...'")
    inner = node.mapping.get(name, Node(None, span))
    keys = node.keys if isinstance(node.value, dict) else {}
    return Node({**node.mapping, name: _set(inner, override, depth + 1)}, node.span, {**keys, name: span})


def _option(source: Source) -> str:
    """--set"""
    return source.name.partition(" ")[0]


def _usage(message: str, source: Source, span: Span, hint: str) -> UsageError:
    return UsageError(printable(message), where=printable(source.name), hint=printable(hint), excerpt=excerpt(span))
