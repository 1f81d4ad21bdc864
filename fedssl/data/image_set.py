"""Images that are ready for training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedssl.data.sources.base import NO_LABEL


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 (N, 3, S, S), memory-mapped, and int64 labels (N,) or None.

    A label below 0 is none, see `fedssl.data.sources.base.NO_LABEL`.
    """

    pixels: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class ImageSet:
    """A data set ready for training.

    Attributes:
        train, test: test is None where the source has no test images.
        class_names: empty without labels.
        unreadable: names of files that could not be decoded and were left out.
        key: names the cache entry; equal keys mean equal contents.
        content: SHA-256 of the training images' pixels.
        name: of the data set, for messages.
        notes: what was found, decided and left out, for people.
        fresh: whether it has just been decoded, rather than found in the cache.
    """

    train: Images
    test: Images | None
    class_names: list[str]
    unreadable: list[str]
    key: str
    content: str
    name: str
    notes: Sequence[str] = ()
    fresh: bool = False

    @property
    def has_labels(self) -> bool:
        """Whether there are labels, for training and test."""
        test_labels = self.test.labels if self.test else None
        return self.train.labels is not None and test_labels is not None

    @property
    def labelled(self) -> bool:
        """Whether an evaluation has classes to tell apart and labelled images to score."""
        labels = self.train.labels
        return self.has_labels and labels is not None and len(set(labels.tolist()) - {NO_LABEL}) > 1
