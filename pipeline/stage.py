"""What a stage is to the engine: a declaration, and the context that its function is given.

A stage file declares one `Stage`. The engine validates the stage's block of pipeline.yaml with `Stage.config`, resolves
what it `reads`, computes the key, and calls `Stage.run(context)` only when no artifact has that key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from .spec import DataConfig, ModelConfig
    from .store import Artifact

Kind = Literal["tickets", "model", "onnx", "measurement", "evaluation"]
Sharding = Literal["ddp", "fsdp2"]
JSON = Any  # a value that json.dumps accepts


class Config(BaseModel):
    """Base of every config: frozen, strict about types, unknown keys refused. A config never acts."""

    # Validators are built at first use: `sievit ls` needs none of them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    # Fields that the result does not depend on, such as how long is waited: they stand in no key.
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Reads:
    """One input of a stage: by default the nearest earlier stage of the same arm that writes `kind`.

    many: every file of that kind in all arms (only for stages that stand once for the whole pipeline).
    """

    role: str
    kind: Kind
    optional: bool = False
    many: bool = False


@dataclass(frozen=True)
class Preflight:
    """A stage as it is going to run: all that is settled about it before anything does, for its checks to look at.

    arm:    under one of several seeds: main@seed1.
    reads:  role -> the stage of this plan whose result it will read.
    many:   the same for the roles that take many: the stages in all arms.
    inputs: role -> an artifact that is there already: named as train@7, or handed to a stage command.
    base:   the folder of pipeline.yaml.
    device: "cpu" or "cuda", what it will compute on.
    processes, sharding: of the file's launch block.
    """

    config: Any
    data: DataConfig
    model: ModelConfig
    seed: int
    arm: str
    entry: str
    base: Path
    processes: int = 1
    sharding: Sharding = "ddp"
    reads: Mapping[str, Preflight] = field(default_factory=dict)
    many: Mapping[str, Sequence[Preflight]] = field(default_factory=dict)
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def family(self) -> str:
        """The arm as the file names it, whatever the seed."""
        return self.arm.partition("@")[0]

    def at(self, path: str) -> str:
        """The place of one of its own settings in pipeline.yaml, for an error to point to: "stages.train.cutmix"."""
        return f"stages.{self.entry}.{path}"


@dataclass(frozen=True, slots=True)
class Reached:
    """How far the checkpoint of a stopped stage is: `done` of `total` of its units of work."""

    done: float
    total: float
    unit: str = "epoch"

    @property
    def left(self) -> float:
        """The share of the work that is left."""
        return max(0.0, 1 - self.done / self.total) if self.total > 0 else 1.0


def _untold(work: Path) -> Reached | None:
    """For stages whose checkpoints do not say how far they are."""
    return None


def _nothing_to_check(seen: Preflight) -> None:
    """For stages whose settings cannot be wrong in any way that their config does not refuse by itself."""


def _nothing_idle(seen: Preflight) -> dict[str, str]:
    """For stages whose settings always have an effect."""
    return {}


@dataclass(frozen=True)
class Stage:
    """The declaration of a stage. `version` is raised whenever its results change for equal inputs."""

    name: str
    version: int
    config: type[Config]
    run: Callable[[Context], None]
    reads: tuple[Reads, ...]
    writes: Kind
    manual: str  # the stage file's docstring; `--help` prints it
    packages: tuple[str, ...] = ()  # distributions whose version changes the numbers
    uses: frozenset[Literal["data", "model", "device", "host", "seed"]] = frozenset({"data", "seed", "device"})
    across_arms: bool = False  # stands once for the pipeline, reads the files of all arms
    shares: bool = False  # its function can be run by several processes at once, each with a share of the images
    # Further inputs that a config field names, role -> the text of the field. The text is a stage of this pipeline, an
    # artifact reference (train@7), or "timm:<model name>", which the engine leaves to the stage.
    references: Callable[[Any], Mapping[str, str]] = lambda config: {}
    reference_kind: Kind = "model"  # what all of them must be
    # Files of the user's that config fields name, field -> paths from the folder of pipeline.yaml: in the key stands
    # what they hold, not where they lie.
    files: Callable[[Any], Mapping[str, Sequence[str]]] = lambda config: {}
    # Whether the result under these settings hangs on how fast the host is, although the stage does not always use it.
    timed: Callable[[Any], bool] = lambda config: False
    # Refuses settings that contradict each other or those of the stages it reads. Part of every plan, so it reads the
    # configs and nothing else. What it raises is shown as what `preflight` raises.
    coherent: Callable[[Preflight], None] = _nothing_to_check
    # Settings without effect as things stand: field -> why ("selector.lr" -> "adapt_epochs is 0"). Those that were
    # written are refused, unless another arm, which inherits them, has a use for them.
    idle: Callable[[Preflight], Mapping[str, str]] = _nothing_idle
    # Refuses what can be known to be wrong before the stage runs. Called for every stage that is about to execute,
    # before the first of them does and before anything is written; it may import torch. What it raises may carry
    # `field`, a path in pipeline.yaml such as "model.name" or preflight.at("tokens.blocks"): the user sees the line.
    preflight: Callable[[Preflight], None] = _nothing_to_check
    # Settings without a bearing on how long it takes, as dotted paths; one that is named covers those below it. What it
    # will take is told by a run with others.
    costless: Callable[[Any], Collection[str]] = lambda config: ()
    # Settings that its time is in proportion to while all else stays: ("epochs",).
    paced_by: Callable[[Any], Collection[str]] = lambda config: ()
    # How far the checkpoint in its work folder is; None: there is none, or it does not say. It imports no torch.
    reached: Callable[[Path], Reached | None] = _untold
    # What two of its artifacts have in common beyond their settings, for `sievit diff`: name -> number or text.
    compare: Callable[[Artifact, Artifact], Mapping[str, JSON]] | None = None

    def uses_host(self, config: Config) -> bool:
        """Whether a key has the host's fingerprint in it."""
        return "host" in self.uses or self.timed(config)


class PartOf(Protocol):
    """Gives an artifact of its own to a part of a stage's work, so that whatever needs the same part shares it.

    The part is declared as a stage that stands in no pipeline file. Its key covers its own config, what it uses and
    what it reads; it is made when no artifact has that key, keeps its checkpoints when killed, and is named in the
    manifest of the artifact that asked for it under `role`. model: other than the pipeline's. reads: roles of the
    asking stage's inputs that the part is given too, where they are there.
    """

    def __call__(
        self, stage: Stage, config: Config, *, role: str, model: ModelConfig | None = None, reads: Sequence[str] = ()
    ) -> Part: ...


class Task(Protocol):
    """One progress bar."""

    def advance(self, steps: int = 1, **values: float) -> None: ...


class Progress(Protocol):
    """Where a stage tells how far it is. Bars on a terminal, plain lines elsewhere, nothing with --json."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]: ...

    def note(self, text: str) -> None:
        """A line that stays on the screen and in the manifest."""

    def warn(self, text: str) -> None:
        """As note, marked as a warning."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """An input of a stage that stands once for the pipeline: which arm and which stage entry made it."""

    arm: str  # under one of several seeds: main@seed1
    entry: str
    artifact: Artifact
    final: bool  # the last of its kind in that arm: the file that the arm ships
    seed: int

    @property
    def family(self) -> str:
        """The arm as the file names it, whatever the seed."""
        return self.arm.partition("@")[0]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stage's work. made: by this very call; otherwise it was there."""

    artifact: Artifact
    made: bool


def _no_store(
    stage: Stage, config: Config, *, role: str, model: ModelConfig | None = None, reads: Sequence[str] = ()
) -> Part:
    raise RuntimeError(f"there is no store to keep {stage.name} in as {role!r}")


@dataclass
class Context:
    """Everything a stage function may touch.

    out:   an empty folder; every file left in it becomes the artifact's payload (its content digest is what
           later stages' keys depend on, so nothing that varies between equal runs may be written there).
    work:  survives a kill; checkpoints go here, each written to a temporary name, synced, then renamed. Removed after
           commit.
    base:  the folder of pipeline.yaml; relative paths in the config are meant from there.

    Where several processes run a function that shares its work, what the first of them leaves is kept: the others have
    an `out` of their own that is thrown away, and may read `work` but never write it.
    """

    config: Any
    data: DataConfig
    model: ModelConfig
    seed: int
    device: str  # "cpu" or "cuda"
    arm: str
    entry: str
    base: Path
    out: Path
    work: Path
    inputs: Mapping[str, Artifact]
    many: Sequence[Labelled]
    references: Mapping[str, str]  # role -> text that the engine left to the stage, such as "timm:regnety_160"
    progress: Progress
    metrics: dict[str, JSON] = field(default_factory=dict)  # what was measured; goes into the manifest
    ledger: dict[str, JSON] = field(default_factory=dict)  # what it cost; goes into the manifest
    figures: list[Figure] = field(default_factory=list)
    part: PartOf = _no_store
    sharding: Sharding = "ddp"  # how several processes hold a network

    def figure(self, name: str, svg: str, *, title: str, caption: str = "") -> None:
        """Keep a picture (SVG text) with the artifact; the report shows it. Not part of the content digest."""
        self.figures.append(Figure(name, title, caption, svg))


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture of a stage. `name` is a file stem, unique within the artifact."""

    name: str
    title: str
    caption: str
    svg: str
