"""Two files on the same test images: which images those are, and what both answer.

The pixels of an image are made for each file from the image file, by its own sidecar: networks of other image sizes
are compared on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sievit.pipeline.errors import InputError, SievitError

from .methods import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sievit.pipeline.progress import Display
    from sievit.pipeline.session import Session
    from sievit.pipeline.store import Store

    from .deploy.bundle import Bundle
    from .products import Product
    from .vision.dataset import Images

AT_ONCE = 256  # images of one answer of the process that scores them
# Settings that decide nothing about which images the test split has. max_train does: one generator draws all splits.
ASIDE = ("image_size", "mean", "std", "workers", "in_memory")


@dataclass(frozen=True)
class Side:
    """A or B."""

    product: Product
    bundle: Bundle

    @cached_property
    def macs(self) -> int | None:
        from .deploy.variants import Variant

        return Variant("", self.product.name, False, self.bundle).macs

    @property
    def parameters(self) -> int:
        return self.bundle.sidecar.parameters if self.bundle.sidecar else self.bundle.parameters


def opened(product: Product) -> Side:
    from .deploy.bundle import open_bundle

    return Side(product, open_bundle(product.path, sidecar_required=False))


@dataclass(frozen=True)
class Test:
    """Where test images are: a data block, and the folder that its relative paths are meant from."""

    data: Mapping[str, Any]
    base: Path

    def images(self) -> dict[str, Any]:
        """What decides which images these are."""
        paths = {name: self._place(self.data.get(name)) for name in ("source", "test", "root")}
        return {name: value for name, value in self.data.items() if name not in ASIDE} | paths

    def _place(self, path: str | None) -> str | None:
        if path is None or path.startswith(("builtin:", "torch/", "hfds/")):
            return path
        return str((self.base / Path(path).expanduser()).resolve())


def test_images(a: Side, b: Side, pipeline: Path | None, store: Store, session: Session) -> tuple[Test | None, str]:
    """The test images of both, else None and why there are none."""
    for side in (a, b):
        if side.bundle.sidecar is None:
            if pipeline is not None:
                raise InputError(
                    f"{side.product.path.name} has no sidecar, which says how its images are prepared",
                    where=str(side.product.path),
                    hint="put its .json beside it, or leave --data out to compare latency and size alone",
                )
            return None, f"{side.product.path.name} has no sidecar .json, which says how its images are prepared"
    if pipeline is not None:
        spec = session.plan(pipeline).spec
        return Test(spec.data.model_dump(mode="json"), spec.base), ""
    known = [_made_on(side, store) for side in (a, b)]
    for side, test in zip((a, b), known, strict=True):
        if test is None:
            name = side.product.path.name
            return None, f"{name} is no file of this store; --data PIPELINE names test images"
    left, right = known
    assert left is not None and right is not None
    if left.images() != right.images():
        unlike = sorted(name for name, value in left.images().items() if right.images().get(name) != value)
        raise InputError(
            f"A and B were tested on other images: they differ in data.{', data.'.join(unlike)}",
            hint="--data PIPELINE names the images to compare them on",
        )
    return left, ""


def _made_on(side: Side, store: Store) -> Test | None:
    """The data block that a file's artifact was made with."""
    from sievit.pipeline import records

    artifact = side.product.artifact
    if artifact is None:
        return None
    runs = [run for run in records.all_runs(store) if artifact.key in {node.key for node in run.nodes}]
    base = Path(runs[-1].path).parent if runs else store.root.absolute().parent
    return Test(artifact.manifest["data"], base)


def accuracies(a: Side, b: Side, images: Images, provider: str, progress: Display) -> dict[str, Any]:
    """Both on the same images: top-1 of each with Wilson's interval, the drop, McNemar's p, the agreement."""
    import numpy as np

    from .deploy.statistics import wilson
    from .methods.paired_tests import LEVEL, greater

    answers = [_answers(side, images, provider, progress) for side in (a, b)]
    right = [found == images.labels for found in answers]
    difference = greater(right[0][None], right[1][None])
    correct = [int(each.sum()) for each in right]
    ends = [wilson(number, len(images)) for number in correct]
    # From counts, not from two rounded fractions: 0.93 - 0.92 would be more than 0.01.
    drop = (correct[0] - correct[1]) / len(images)
    verdict = "no difference" if difference.p >= LEVEL or not drop else "worse" if drop > 0 else "better"
    return {
        "images": len(images),
        "top1": [number / len(images) for number in correct],
        "top1_low": [low for low, _ in ends],
        "top1_high": [high for _, high in ends],
        "drop": drop,
        "drop_low": difference.low,
        "drop_high": difference.high,
        "only_a": int((right[0] & ~right[1]).sum()),
        "only_b": int((right[1] & ~right[0]).sum()),
        "p": difference.p,
        "agreement": float(np.mean(answers[0] == answers[1])),
        "verdict": verdict,
    }


def load(test: Test, sides: Sequence[Side]) -> Images:
    """The test split; its pixels are decoded later, for each file as its own sidecar says.

    Raises InvalidInput when a file answers other classes than the images have.
    """
    from .vision.dataset import load_split

    images = load_split({**test.data, "in_memory": False}, test.base, "test")
    for side in sides:
        assert side.bundle.sidecar is not None
        ours = side.bundle.sidecar.classes
        if ours != images.classes:
            raise InvalidInput(
                f"{side.product.path} answers other classes than the test images have ({len(ours)} and "
                f"{len(images.classes)}, the first other one is {_first_other(ours, images.classes)!r})",
                "--data PIPELINE names images of its own classes",
            )
    return images


def _answers(side: Side, images: Images, provider: str, progress: Display) -> NDArray[np.int64]:
    """The class that a file gives each image, int64 [n]; -1 where a score is no number, which is never right."""
    import numpy as np

    from .deploy.child import ChildFailed
    from .deploy.predict import answers as classes_of
    from .deploy.scorer import scorer

    path = side.product.path
    found: list[NDArray[np.int64]] = []
    try:
        with (
            progress.task(f"accuracy of {side.product.name}", len(images)) as task,
            scorer(path, provider=provider) as score,
        ):
            for start in range(0, len(images), AT_ONCE):
                several = range(start, min(len(images), start + AT_ONCE))
                scores = score(np.stack([_pixels(images, index, side) for index in several]))
                if scores.shape != (len(several), len(images.classes)):
                    shape = list(scores.shape[1:])
                    raise InvalidInput(
                        f"{path} gives scores of shape {shape} for an image, there are {len(images.classes)} classes",
                        "take model and sidecar from the same artifact",
                    )
                found.append(classes_of(scores))
                task.advance(len(several))
    except ChildFailed as error:
        raise SievitError(str(error), where=str(path), hint="export the model again, or try another") from error
    return np.concatenate(found)


def _first_other(ours: Sequence[str], theirs: Sequence[str]) -> str:
    unlike = (one for one, other in zip(ours, theirs, strict=False) if one != other)
    return next(unlike, [*ours, *theirs][min(len(ours), len(theirs))])


def _pixels(images: Images, index: int, side: Side) -> NDArray[np.uint8]:
    """One test image in the network's size, uint8 [size, size, 3], from its file and by the file's own sidecar."""
    import numpy as np

    from .deploy.preprocess import fit
    from .vision.dataset import REMEDY
    from .vision.decode import BadImage, picture

    assert side.bundle.sidecar is not None
    try:
        with images.listing.open(int(images.members[index])) as file:
            pixels = np.asarray(picture(file, images.max_megapixels))
    except BadImage as error:
        raise InvalidInput(f"{images.name(index)}: {error}", REMEDY) from error
    return fit(pixels, side.bundle.sidecar.preprocessing)
