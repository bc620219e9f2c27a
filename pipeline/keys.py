"""The key of an artifact: what its content depends on, and nothing else.

In it: stage kind and code version, its config, the content digests of its inputs, and, each only where the stage says
that it uses it, data, model, seed, device class and host. Not in it: paths, names of machines, times, running
versions, the number of loader processes, how long is waited for a process that is silent. The material is kept in the
manifest, so that `explain` can name the field that made the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import host
from .errors import InputError
from .manifest import sha256_file, sha256_of

if TYPE_CHECKING:
    from .spec import DataConfig, ModelConfig
    from .stage import Labelled, Stage
    from .store import Artifact

# Fields of the data config that say where data lies or how it is read, not what is read: its fingerprint covers the
# content.
_NOT_CONTENT = {"source", "test", "root", "workers", "in_memory"}


class Change(NamedTuple):
    """One field in which two keys' materials differ; None on the side that lacks it."""

    field: str
    old: Any
    new: Any


def key_of(material: Mapping[str, Any]) -> str:
    """The key: the first 12 hex digits of the SHA-256 of the material's canonical JSON."""
    return sha256_of(material)[:12]


def material(
    stage: Stage,
    config: Any,
    *,
    inputs: Mapping[str, Artifact],
    many: Mapping[str, Sequence[Labelled]],
    references: Mapping[str, str],
    files: Mapping[str, Sequence[str]],
    data: DataConfig,
    data_fingerprint: str,
    model: ModelConfig,
    weights_digest: str | None,
    seed: int,
    device: str,
    host_fingerprint: str,
) -> dict[str, Any]:
    """Everything that the stage's result depends on, as plain JSON. files: config field -> SHA-256 of each of them."""
    uses = stage.uses
    found: dict[str, Any] = {
        "stage": stage.name,
        "code_version": stage.version,
        "config": config.model_dump(mode="json", exclude={*files, *config.WITHOUT_EFFECT}),
        "inputs": {role: artifact.digest for role, artifact in inputs.items()}
        | {role: [_labelled(one) for one in ones] for role, ones in many.items()},
        "packages": versions(stage.packages),
    }
    if references:
        found["references"] = dict(references)
    if files:
        found["files"] = {name: " ".join(digests) for name, digests in files.items()}
    if "data" in uses:
        config_of_data = data.model_dump(mode="json", exclude=_NOT_CONTENT)
        decoder = {"pillow": host.version("pillow")}  # what it makes of a file is the image
        found["data"] = {"fingerprint": data_fingerprint, "config": config_of_data} | decoder
    if "model" in uses:
        found["model"] = model.model_dump(mode="json", exclude={"weights"}) | {"weights_sha256": weights_digest}
    if "seed" in uses:
        found["seed"] = seed
    if "device" in uses:
        found["device"] = device
    if stage.uses_host(config):
        found["host"] = host_fingerprint
    return found


def _labelled(one: Labelled) -> dict[str, Any]:
    return {
        "arm": one.arm,
        "entry": one.entry,
        "final": one.final,
        "seed": one.seed,
        "digest": one.artifact.digest,
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each distribution, None where it is not installed."""
    return {name: host.version(name) for name in packages}


def weights_digest(model: ModelConfig, base: Path) -> str | None:
    """SHA-256 of the local checkpoint that the model config names: its content counts, not its place."""
    if model.weights is None:
        return None
    path = base / Path(model.weights).expanduser()
    try:
        return sha256_file(path)[0]
    except OSError as error:
        raise InputError(
            f"the weights cannot be read ({error.strerror})",
            where=str(path),
            hint="model.weights names a .safetensors file",
        ) from error


def file_digests(named: Mapping[str, Sequence[str]], base: Path, at: str) -> dict[str, list[str]]:
    """SHA-256 of each of the user's files, by the config field that names them. base: where relative paths begin.

    Raises: InputError at the field, below the path `at` of pipeline.yaml.
    """
    found: dict[str, list[str]] = {}
    for name, paths in named.items():
        for path in paths:
            try:
                digest = sha256_file(base / Path(path).expanduser())[0]
            except OSError as error:
                raise InputError(
                    f"{path} cannot be read ({error.strerror})",
                    hint="paths are meant from the folder of pipeline.yaml",
                    field=f"{at}.{name}",
                ) from error
            found.setdefault(name, []).append(digest)
    return found


def explain(wanted: Mapping[str, Any], candidates: Sequence[Artifact]) -> list[Change]:
    """What makes `wanted` another key than the nearest of `candidates` (older ones first): the fewest differing fields,
    the newest of equals. Empty when one of them has this very material, or when there are none."""
    found = nearest(wanted, candidates)
    return found[1] if found else []


def nearest(
    wanted: Mapping[str, Any], candidates: Sequence[Artifact], *, leaving_out: str = ""
) -> tuple[Artifact, list[Change]] | None:
    """As `explain`, with the artifact compared to; None when there are no candidates.

    leaving_out: a part of the material that is not known yet, and not compared.
    """
    best: tuple[Artifact, list[Change]] | None = None
    for one in candidates:
        differences = [
            change
            for change in changes(one.manifest["key_material"], wanted)
            if not leaving_out or change.field.partition(".")[0] != leaving_out
        ]
        if best is None or len(differences) <= len(best[1]):
            best = one, differences
    return best


def changes(old: Any, new: Any, field: str = "") -> list[Change]:
    """The fields in which two JSON values differ, as dotted paths, in order of the new value's keys."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*new, *(name for name in old if name not in new)]
        return [
            change
            for name in names
            for change in changes(old.get(name), new.get(name), f"{field}.{name}" if field else str(name))
        ]
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and any(isinstance(o, Mapping) for o in old)
    ):
        return [c for i, (o, n) in enumerate(zip(old, new, strict=True)) for c in changes(o, n, f"{field}[{i}]")]
    return [] if old == new else [Change(field, old, new)]
