"""What a source of images gives: splits of undecoded images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """One image before decoding: a name for messages and its bytes, file or pixels."""

    name: str
    data: bytes | Path | np.ndarray


@dataclass(frozen=True)
class Split:
    """Undecoded images, read one after another, and their labels if there are any."""

    count: int
    read: Callable[[], Iterator[Encoded]]
    labels: np.ndarray | None


@dataclass(frozen=True)
class Source:
    """All splits of a source ("train" and perhaps "test") and the class names."""

    splits: dict[str, Split]
    class_names: list[str]


def stratified_split(
    labels: np.ndarray, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers into train and test with the class shares kept.

    Raises:
        UserError: a class has too few images to appear on both sides.
    """
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    try:
        train, test = train_test_split(
            rows, test_size=test_fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise UserError(
            f"dataset.test_fraction={test_fraction}: the {len(labels)} labelled images can't "
            f"be split so that every class appears on both sides ({error}); add images or "
            "give a test/ folder"
        ) from error
    return np.sort(train), np.sort(test)
