"""What a source of images is: where they lie, what decides them, and how they are read."""

import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fedssl.errors import UserError

NO_LABEL = -1  # among labels: of an image that has none, which nothing is scored by
NAMELESS = "local"
SEEN, CLOSED = "links to folders that are there already", "folders that can't be read"
FOLDERS = (SEEN, CLOSED)
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}


@dataclass(frozen=True)
class Encoded:
    """One image before decoding.

    Attributes:
        name: for messages.
        data: the bytes of its file, the file, or numbers: (H, W) or (H, W, channels).
    """

    name: str
    data: bytes | Path | np.ndarray


@dataclass(frozen=True)
class Split:
    """Undecoded images, read one after another, and their labels if there are any.

    Attributes:
        count: of images.
        read: begins anew at each call.
        labels: int64 (count,), from 0 on or NO_LABEL, or None.
    """

    count: int
    read: Callable[[], Iterator[Encoded]]
    labels: np.ndarray | None


Kept = Mapping[str, np.ndarray | None]  # of each split the labels of the images that can be read
Note = str | Callable[[Kept], str]


@dataclass(frozen=True)
class Splits:
    """What a source gives.

    Attributes:
        splits: "train" and perhaps "test".
        class_names: in the order of the labels; empty without labels.
        notes: what was found and what was left out, for people; numbers of readable images
            are known once these are decoded.
    """

    splits: dict[str, Split]
    class_names: list[str]
    notes: list[Note] = field(default_factory=list)


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
        return self.name or NAMELESS

    @property
    def root(self) -> Path | None:
        """The folder of `path`, absolute."""
        return absolute(self.path) if self.path else None

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


@dataclass(frozen=True)
class FoundFile:
    """A file below a folder.

    Attributes:
        path: begins with the folder.
        status: None where nothing can be found out, as of a link to nothing.
        problem: why it can't be read, if that is seen from outside.
    """

    path: Path
    status: os.stat_result | None
    problem: str | None = None


def absolute(path: str) -> Path:
    """Give the place that a path leads to; ~ is the home directory.

    A user's home that is not there and a link to itself stay as they are: no such place.
    """
    return Path(os.path.realpath(os.path.expanduser(path)))


def walk_files(root: Path) -> Iterator[FoundFile]:
    """Find the files below a folder, sorted by folder and name, for all who look into folders.

    Links to folders are followed, each folder is entered once; one that can't be, or not
    again, stands among the files with its problem. What the system or a
    program keeps for itself is left out: names that begin with a dot, as of `._x.png` and
    `.ipynb_checkpoints`, and those of `SYSTEM_NAMES`.
    """
    entered: set[tuple[int, int]] = set()
    closed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=closed.append, followlinks=True):
        status = _status(Path(folder))
        if status is None or (status.st_dev, status.st_ino) in entered:
            folders.clear()
            if not _leads_up(Path(folder)):
                yield FoundFile(Path(folder), None, SEEN)
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if not is_hidden(name):
                yield _look_at(Path(folder, name))
    for error in closed:
        yield FoundFile(Path(error.filename), None, CLOSED)


def _leads_up(link: Path) -> bool:
    """Tell a link to a folder that it lies in, which holds nothing of its own."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _look_at(file: Path) -> FoundFile:
    status = _status(file)
    if status is None:
        return FoundFile(file, None, "links to nothing")
    is_file = stat.S_ISREG(status.st_mode)
    return FoundFile(file, status, None if is_file else "pipes and devices")


def is_hidden(name: str) -> bool:
    """Tell what the system or a program keeps for itself by its name."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:  # a link to nothing, or to itself
        return None


def list_file_states(root: Path) -> list[str]:
    """List each file below a folder with its size in bytes and its age, sorted."""
    return [
        f"{found.path} {found.status.st_size} {found.status.st_mtime_ns}"
        if found.status
        else f"{found.path} missing"
        for found in walk_files(root)
    ]


def split_rows(
    count: int,
    labels: np.ndarray | None,
    test_fraction: float | None,
    seed: int,
    digests: Sequence[bytes] | None = None,
) -> dict[str, np.ndarray]:
    """Split row numbers into "train" and "test", sorted, with the class shares kept.

    Args:
        labels: (count,); rows without one are for training, unless they equal one for the test.
        test_fraction: share of the test rows among the labelled ones; None: all rows are for
            training.
        digests: of the images; equal images stay on one side.

    Raises:
        UserError: a class has too few images to appear on both sides.
    """
    if labels is None or test_fraction is None:
        return {"train": np.arange(count)}
    rows = np.flatnonzero(labels != NO_LABEL)
    twins: dict[bytes | int, list[int]] = {}
    for row in [*rows.tolist(), *np.flatnonzero(labels == NO_LABEL).tolist()]:
        twins.setdefault(digests[row] if digests else row, []).append(row)
    equal = {each[0]: each for each in twins.values() if labels[each[0]] != NO_LABEL}
    test = _draw_test(np.array(list(equal), dtype=np.int64), labels, test_fraction, seed)
    if test is None and digests:  # too few different ones
        equal = {row: [row] for row in rows.tolist()}
        test = _draw_test(rows, labels, test_fraction, seed)
    if test is None:
        told = f"dataset.test_fraction={test_fraction}"
        reason = f"{len(rows)} labelled images can't be split so that every class appears on both"
        raise UserError(
            f"{told}: the {reason} sides; add images, give a test split, or set it to null",
            public=f"{told}: its {reason} sides",
        )
    both = np.array([row for first in test.tolist() for row in equal[first]], dtype=np.int64)
    return {"train": np.setdiff1d(np.arange(count), both), "test": np.sort(both)}


def _draw_test(
    rows: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> np.ndarray | None:
    """Draw a share of rows with the class shares kept; None where a class has too few."""
    from sklearn.model_selection import train_test_split

    kept = labels[rows]
    try:
        _, test = train_test_split(rows, test_size=fraction, stratify=kept, random_state=seed)
    except ValueError:
        return None
    return test if len(np.unique(labels[test])) == len(np.unique(kept)) else None


def describe_twins(digests: Sequence[bytes], parts: Mapping[str, np.ndarray]) -> list[str]:
    """Say how many images are exact copies of others, and whether the split parts them."""
    copies = len(digests) - len(set(digests))
    if not copies:
        return []
    train, test = ({digests[row] for row in parts.get(name, ())} for name in ("train", "test"))
    if parted := len(train & test):
        return [f"{copies} exact copies, of which {parted} stand on both sides: too few others"]
    return [f"{copies} exact copies stay on the side of their originals"]


def tell_kept_for_test(kept: Kept) -> str:
    """Say how many images the project has drawn for the test."""
    labels = kept["test"]
    count = 0 if labels is None else int((labels != NO_LABEL).sum())
    return f"{count} labelled images are kept for the test"
