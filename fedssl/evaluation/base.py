"""What an evaluation is to the rest of the project: the contract, its data and its scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from sklearn.model_selection import train_test_split

from fedssl.compute import Backend
from fedssl.data.image_set import Images, ImageSet
from fedssl.data.sources.base import NO_LABEL
from fedssl.data.views import Augmentation
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.networks.encoder import Encoder
from fedssl.runs.results import UNRECORDED, Score
from fedssl.seeding import draw_seed


@dataclass(frozen=True)
class LabelledImages(Images):
    """Images with labels, the test images each with one: uint8 (N, 3, S, S) and int64 (N,)."""

    labels: np.ndarray


@dataclass(frozen=True)
class EvaluationData:
    """What every encoder of a run is evaluated on, alike.

    Attributes:
        num_classes: of training and test images together.
        seeds: one for each draw of labels, below 2**32.
        labelled: ascending rows of the training images whose labels each draw
            gives, int64.
        resolution: side in pixels of the whole images that an encoder sees.
        views: of that side, for whole networks that train.
        feature_batch_size: images encoded at once.
        partitions: rows of the training images of each client, for evaluations that need them.
    """

    train: LabelledImages
    test: LabelledImages
    num_classes: int
    seeds: list[int]
    labelled: list[np.ndarray]
    resolution: int
    views: Augmentation
    backend: Backend
    feature_batch_size: int
    partitions: Sequence[np.ndarray] = ()

    @classmethod
    def of(
        cls,
        image_set: ImageSet,
        *,
        label_fraction: float,
        num_seeds: int,
        seed: int,
        resolution: int,
        views: Augmentation,
        backend: Backend,
        feature_batch_size: int,
        partitions: Sequence[np.ndarray] = (),
    ) -> "EvaluationData":
        """Draw the labelled rows of every seed.

        Args:
            label_fraction: share of the training labels, above 0 and at most 1.
            num_seeds: draws.
            seed: of the run.

        Raises:
            UserError: no labels, or too few for every class to appear.
        """
        train = _require_labels(image_set.train)
        test = _only_labelled(_require_labels(image_set.test))
        seeds = [draw_seed(seed, draw) for draw in range(num_seeds)]
        return cls(
            train=train,
            test=test,
            num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
            seeds=seeds,
            labelled=[draw_labelled(train.labels, label_fraction, drawn) for drawn in seeds],
            resolution=resolution,
            views=views,
            backend=backend,
            feature_batch_size=feature_batch_size,
            partitions=partitions,
        )

    def draws(self) -> Iterator[tuple[int, np.ndarray]]:
        """Give the seed and the labelled rows of every draw."""
        return zip(self.seeds, self.labelled, strict=True)

    def features(self, encoder: Encoder, pixels: np.ndarray) -> np.ndarray:
        """Encode images, uint8 (N, 3, S, S), to float32 (N, D), see `extract_features`."""
        batch_size = self.feature_batch_size
        return extract_features(encoder, pixels, self.backend, batch_size, self.resolution)

    def top1(self, predicted: np.ndarray) -> float:
        """Score the classes (N,) predicted for the test images, from 0 to 1."""
        return float((predicted == self.test.labels).mean())


@dataclass(frozen=True)
class Evaluation(ABC):
    """A protocol; the fields of an implementation are the keys of its yaml below conf/eval/.

    Attributes:
        mode: its name in results.json.
        starts_from_scratch: whether it trains the network of the run from random
            weights, so that neither the run's encoder nor a random one beside it
            has a place.
        needs_partitions: whether it asks which client holds which images.
        label_fraction: share of the training labels, above 0 and at most 1.
        seeds: draws of labels.
        baselines: whether a random encoder and the raw pixels are scored beside it.
        feature_batch_size: images encoded at once.
    """

    mode: ClassVar[str]
    starts_from_scratch: ClassVar[bool] = False
    needs_partitions: ClassVar[bool] = False

    label_fraction: float
    seeds: int
    baselines: bool
    feature_batch_size: int

    @abstractmethod
    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score an encoder, which is the same afterwards.

        Args:
            name: of the encoder, for the scores.

        Returns:
            At least one score, the most telling first.
        """

    def count_labelled(self, data: EvaluationData) -> int:
        """Count the labelled images of a draw."""
        return len(data.labelled[0])

    def protocol(self) -> dict[str, Any]:
        """Give what is recorded beside the scores, to repeat them."""
        names = [field.name for field in fields(self) if field.name not in UNRECORDED]
        return {name: getattr(self, name) for name in names}


def check_evaluable(image_set: ImageSet, label_fraction: float, seed: int, num_seeds: int) -> None:
    """Make sure that there are labels, and enough of them in each draw, before any work starts.

    Raises:
        UserError: no labelled test images, too few training labels, or those of one class.
    """
    _require_labels(image_set.test)
    _require_labels(image_set.train)
    if not image_set.labelled:
        raise UserError("these labels are all of one class, so there is nothing to tell apart")
    labels = _require_labels(image_set.train).labels
    for draw in range(num_seeds):
        draw_labelled(labels, label_fraction, draw_seed(seed, draw))


def draw_labelled(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the rows whose labels may be seen: stratified, ascending, int64.

    Raises:
        UserError: too few for every class to appear.
    """
    rows = np.flatnonzero(labels != NO_LABEL)
    if fraction == 1:
        return rows
    classes = np.unique(labels[rows])
    remedy = f"too few labels for each of the {len(classes)} classes to appear; raise it"
    try:
        drawn, _ = train_test_split(
            rows, train_size=fraction, stratify=labels[rows], random_state=seed
        )
    except ValueError as error:
        raise UserError(f"label_fraction={fraction}: {remedy}") from error
    if len(np.unique(labels[drawn])) < len(classes):
        raise UserError(f"label_fraction={fraction}: {len(drawn)} labels, {remedy}")
    return np.sort(drawn)


def _only_labelled(images: LabelledImages) -> LabelledImages:
    """Leave out the images that nothing can be scored by."""
    rows = np.flatnonzero(images.labels != NO_LABEL)
    if len(rows) == len(images.labels):
        return images
    return LabelledImages(images.pixels[rows], images.labels[rows])


def _require_labels(images: Images | None) -> LabelledImages:
    if images is None or images.labels is None:
        raise UserError("these images have no labels, so there is nothing to evaluate against")
    return LabelledImages(images.pixels, images.labels)
