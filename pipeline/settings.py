"""The sections of pipeline.yaml that belong to no stage: images, first network, gates, processes, trackers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .stage import JSON, Config

Name = Annotated[str, Field(min_length=1)]


class DataConfig(Config):
    """The images. Relative paths are meant from the folder of pipeline.yaml."""

    source: Name = Field(
        default="builtin:digits",
        description="builtin:digits | a folder per class | a .tar of one | torch/<data set> | hfds/<data set>",
    )
    test: Name | None = Field(
        default=None, description="the test split's own folder or tar; null: found beside the train split, else carved"
    )
    root: Name | None = Field(default=None, description="folder where torch/... data sets are kept")
    image_size: int = Field(default=32, ge=8, le=1024, description="pixels, square")
    calibration: float = Field(
        default=0.1, ge=0.01, le=0.5, description="fraction of the training images set aside for calibration"
    )
    test_fraction: float = Field(
        default=0.25, ge=0.01, le=0.9, description="fraction carved from a source without a test split"
    )
    max_train: int | None = Field(
        default=None, ge=1, description="at most so many training images, stratified by class"
    )
    max_test: int | None = Field(default=None, ge=1, description="at most so many test images, stratified by class")
    bad_images: Literal["refuse", "skip"] = Field(default="refuse", description="what to do with an unreadable image")
    max_megapixels: float = Field(default=64.0, gt=0, le=10_000, description="larger images are bad images")
    in_memory: bool | None = Field(default=None, description="null: when the images fit into 2 GB as uint8")
    workers: int = Field(default=0, ge=0, le=256, description="loader processes for sources that do not fit in memory")
    mean: tuple[float, float, float] | None = Field(
        default=None, description="of each channel, images in 0..1; null: the pretrained model's own, else 0.5"
    )
    std: tuple[float, float, float] | None = Field(
        default=None, description="of each channel, images in 0..1; null: the pretrained model's own, else 0.5"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.test is not None and self.source.lower().startswith(("builtin:", "torch/", "hfds/")):
            raise ValueError(f"test: {self.source} brings its own test split; leave this out")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std: must be above 0 in every channel")
        return self


class ModelConfig(Config):
    """The network to start from."""

    name: Name = Field(default="deit_tiny_patch16_224", description="timm model name, or hf-hub:timm/...")
    pretrained: bool = Field(default=False, description="start from timm's pretrained weights")
    weights: Name | None = Field(default=None, description="local .safetensors checkpoint of that timm model")
    args: dict[str, JSON] = Field(default={}, description="keyword arguments of timm.create_model")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.pretrained and self.weights is not None:
            raise ValueError("weights: contradicts 'pretrained: true'; give one of the two")
        elsewhere = {
            "pretrained": "model.pretrained",
            "checkpoint_path": "model.weights",
            "num_classes": "the data",
            "img_size": "data.image_size",
            "in_chans": "the images, which are RGB",
            "patch_drop_rate": "ticket.patches",
            "drop_path_rate": "train.drop_path",
        }
        for argument, owner in elsewhere.items():
            if argument in self.args:
                raise ValueError(f"args.{argument}: is set by {owner}, not here")
        return self


class GatesConfig(Config):
    """Bounds on the main arm against the dense arm; a run that misses one ends with exit code 6."""

    accuracy_drop: float | None = Field(default=None, ge=0, le=1, description="largest top-1 fraction lost")
    speedup: float | None = Field(default=None, gt=0, description="smallest ratio of the p50 latencies, dense / main")


class LaunchConfig(Config):
    """The processes that share the work of training, scoring and evaluation. Part of no key: whatever their number, a
    step sees the same batch.
    """

    processes: int = Field(default=1, ge=1, le=1024, description="processes on each machine; on cuda one a GPU")
    nodes: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="machines that share the folder of artifacts; each starts the same command",
    )
    rendezvous: Annotated[str, Field(pattern=r"^[^\s:/]+:\d{1,5}$")] | None = Field(
        default=None, description="host:port on one of the machines that all of them reach; needed with nodes"
    )
    sharding: Literal["ddp", "fsdp2"] = Field(
        default="ddp",
        description="ddp: every process holds the whole network; fsdp2: weights and moments are divided among them",
    )

    @property
    def total(self) -> int:
        """Processes on all machines together."""
        return self.processes * self.nodes

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError("rendezvous: several nodes must know where to meet; give host:port of one of them")
        if self.nodes == 1 and self.rendezvous is not None:
            raise ValueError("rendezvous: has no effect on one machine; leave it out, or give nodes")
        if self.sharding == "fsdp2" and self.total == 1:
            raise ValueError("sharding: fsdp2 divides a network among processes, and there is one; give processes")
        return self


class TrackConfig(Config):
    """Where runs are told to while they go on. Part of no key."""

    tensorboard: Name | None = Field(default=None, description="folder of TensorBoard's event files, a folder a run")
    mlflow: Annotated[str, Field(pattern=r"^(sqlite:///|https?://).+")] | None = Field(
        default=None, description="MLflow's tracking URI: sqlite:///mlflow.db, or http://host:port of a server"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.mlflow is not None and "@" in self.mlflow.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError("mlflow: holds a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead")
        return self
