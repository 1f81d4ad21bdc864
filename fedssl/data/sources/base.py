"""What a source of images is: where they lie, what decides them, and how they are read."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedssl.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """One image before decoding.

    Attributes:
        name: for messages.
        data: the bytes of its file, the file, or pixels: uint8 (H, W) or (H, W, 3).
    """

    name: str
    data: bytes | Path | np.ndarray


@dataclass(frozen=True)
class Split:
    """Undecoded images, read one after another, and their labels if there are any.

    Attributes:
        count: of images.
        read: begins anew at each call.
        labels: int64 (count,), from 0 on, or None.
    """

    count: int
    read: Callable[[], Iterator[Encoded]]
    labels: np.ndarray | None


@dataclass(frozen=True)
class Splits:
    """What a source gives.

    Attributes:
        splits: "train" and perhaps "test".
        class_names: in the order of the labels; empty without labels.
    """

    splits: dict[str, Split]
    class_names: list[str]


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where images come from; the fields are the keys of a data set's file in conf/dataset.

    A new source is one file beside this one with a frozen dataclass that has
    `read`, and perhaps its own `check`; one file in conf/dataset that names the
    class as `_target_`; and one test.

    Attributes:
        name: of the data set, for messages and its entry in the cache.
        path: a folder with the images, for sources that have one; ~ is the
            home directory.
    """

    name: str | None
    path: str | None = None

    @property
    def title(self) -> str:
        """The name, or "local" for a nameless folder."""
        return self.name or "local"

    @property
    def root(self) -> Path | None:
        """The folder of `path`, absolute."""
        return Path(self.path).expanduser().resolve() if self.path else None

    @property
    def place(self) -> str:
        """The setting that tells where the images are, to begin a message with."""
        return f"dataset.path={self.root}" if self.root else f"dataset.name={self.title}"

    @property
    def is_here(self) -> bool:
        """Whether there are images to open; False where each client has a folder of its own."""
        return True

    @property
    def splits_by_seed(self) -> bool:
        """Whether `read` uses its seed; if not, all seeds share one entry of the cache."""
        return True

    def check(self) -> None:
        """Find out, before any work and without a network, whether the settings can be right.

        Raises:
            UserError: a folder is given that is missing, empty or no folder.
        """
        root = self.root
        if root is None:
            return
        if not root.exists():
            raise UserError(
                f"dataset.path={self.path}: no such folder; check the path",
                public="its folder of images is not there",
            )
        if not root.is_dir() or not any(root.iterdir()):
            kind = "an empty folder" if root.is_dir() else "not a folder"
            raise UserError(
                f"dataset.path={self.path}: {kind}; give a folder with images",
                public=f"where it looks for images is {kind}",
            )

    def fingerprint(self, seed: int) -> list[str]:
        """Tell what decides the decoded images, so that equal lists mean equal images.

        By default the settings, the seed where it counts, and the name, size
        and age of each file below `path`.
        """
        settings = asdict(self) | {"path": str(self.root)}
        parts = [type(self).__name__, json.dumps(settings, sort_keys=True, default=str)]
        if self.splits_by_seed:
            parts.append(f"seed {seed}")
        return parts + (list_file_states(self.root) if self.root else [])

    @abstractmethod
    def read(self, seed: int, scratch: Path) -> Splits:
        """Open the images; called only where the cache does not hold them yet.

        Args:
            seed: decides the test split where the source has none of its own.
            scratch: an empty folder for temporary files, there until all is read.

        Raises:
            UserError: the images can't be found or read as the settings say.
        """


def list_file_states(root: Path) -> list[str]:
    """List each file below a folder with its size in bytes and its age, sorted."""
    states = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            try:
                status = os.stat(file)
            except FileNotFoundError:  # a link to nothing
                states.append(f"{file} missing")
            else:
                states.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return states


def split_rows(
    count: int, labels: np.ndarray | None, test_fraction: float | None, seed: int
) -> dict[str, np.ndarray]:
    """Split row numbers into "train" and "test", sorted, with the class shares kept.

    Args:
        labels: (count,); without them all rows are for training.
        test_fraction: share of the test rows; None: all rows are for training.

    Raises:
        UserError: a class has too few images to appear on both sides.
    """
    rows = np.arange(count)
    if labels is None or test_fraction is None:
        return {"train": rows}
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            rows, test_size=test_fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise UserError(
            f"dataset.test_fraction={test_fraction}: the {count} labelled images can't "
            f"be split so that every class appears on both sides ({error}); add images or "
            "give a test/ folder",
            public=f"dataset.test_fraction={test_fraction}: its {count} labelled images can't be "
            "split so that every class appears on both sides",
        ) from error
    return {"train": np.sort(train), "test": np.sort(test)}
