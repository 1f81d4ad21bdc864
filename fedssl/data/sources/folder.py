"""Folders of image files."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import (
    NO_LABEL,
    Encoded,
    Source,
    Split,
    Splits,
    describe_twins,
    split_rows,
    walk_files,
)
from fedssl.errors import SettingError, UserError

ENDINGS = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
TRAIN, TEST = ("train", "training"), ("test", "testing")
VALIDATION = ("val", "valid", "validation")
TEST_FRACTION = 0.2  # where the labelled images have to give the test, too


@dataclass(frozen=True)
class FoundImages:
    """The images below a folder.

    Attributes:
        files: sorted.
        left_out: other files by their ending, and links to nothing.
    """

    root: Path
    files: list[Path]
    left_out: Counter[str]

    @property
    def names(self) -> list[str] | None:
        """The class of each image, see `class_names`."""
        return class_names([file.relative_to(self.root) for file in self.files])


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """A folder of images of any size and mode.

    Layouts: `train/` beside `test/` or `val/`, in any case, below `path`, or everything in
    one place; each either class folders (then there are labels) or images at any depth.

    Attributes:
        path: None: each client has a folder of its own, and here there is none.
        labels: False: class folders are mere folders.
        test_fraction: share of labelled images without a test folder that become test
            images, drawn by the seed; None: none.
    """

    labels: bool
    test_fraction: float | None

    @property
    def is_here(self) -> bool:
        """Whether a folder is given."""
        return bool(self.path)

    @property
    def splits_by_seed(self) -> bool:
        """Whether a test split may be drawn."""
        return self.labels and self.test_fraction is not None

    def check(self) -> None:
        """Find out whether there is a folder with something in it.

        Raises:
            UserError: none is given, or it is missing, empty or no folder.
        """
        self._folder()
        super().check()

    def read(self, seed: int, scratch: Path) -> Splits:
        """List the images and their classes; say what was taken for what.

        Raises:
            UserError: no image there, or a test folder with other classes.
        """
        root = self._folder()
        layout = find_layout(root) if self.labels else {}
        train = find_images(layout.get("train", root))
        if not train.files:
            looked = f"(looked for {', '.join(ENDINGS)})"
            found = f"; there are {_count(train.left_out)}" if train.left_out else ""
            raise UserError(
                f"{self.place}: no image found {looked}{found}",
                public=f"no image found in its folder {looked}",
            )
        names = train.names if self.labels else None
        test = find_images(layout["test"]) if "test" in layout else None
        notes = [*_describe_layout(layout, root), *_describe(train, names)]
        if names is None:
            return self._without_labels(train, test, notes)
        classes, labels = number_classes(names)
        if test is not None and test.files and test.names is not None:
            return self._given_split(train, labels, test, classes, notes)
        if test is not None:
            why = f"{len(test.files)} images without labels" if test.files else "no images"
            notes.append(f"{test.root.name}/ holds {why} and is left out")
        return self._own_split(train.files, labels, classes, seed, notes, test is not None)

    def _without_labels(
        self, train: FoundImages, test: FoundImages | None, notes: list[str]
    ) -> Splits:
        splits = {"train": _files_split(train.files, None)}
        if test is not None and test.files:
            splits["test"] = _files_split(test.files, None)
        return Splits(splits, [], notes)

    def _given_split(
        self,
        train: FoundImages,
        labels: np.ndarray,
        test: FoundImages,
        classes: list[str],
        notes: list[str],
    ) -> Splits:
        names = test.names or []
        if unknown := sorted(set(filter(None, names)) - set(classes)):
            raise UserError(
                f"{self.place}: {train.root.name}/ and {test.root.name}/ hold different classes "
                f"({unknown[0]} is in the latter only); give both the same class folders",
                public="the folders for training and test hold different classes",
            )
        numbers = {name: number for number, name in enumerate(classes)}
        test_labels = np.array([numbers.get(name, NO_LABEL) for name in names], dtype=np.int64)
        notes += [f"test: {len(test.files)} images", *_describe_left_out(test)]
        splits = {"train": _files_split(train.files, labels)}
        return Splits(splits | {"test": _files_split(test.files, test_labels)}, classes, notes)

    def _own_split(
        self,
        files: list[Path],
        labels: np.ndarray,
        classes: list[str],
        seed: int,
        notes: list[str],
        needs_test: bool,
    ) -> Splits:
        """Draw the test images from the labelled ones."""
        fraction = self.test_fraction or (TEST_FRACTION if needs_test else None)
        if fraction is None:
            return Splits({"train": _files_split(files, labels)}, classes, notes)
        digests = [_digest(file) for file in files]
        rows = split_rows(len(files), labels, fraction, seed, digests)
        notes.append(f"{len(rows['test'])} labelled images are kept for the test")
        notes += describe_twins(digests, rows)
        splits = {
            name: _files_split([files[i] for i in part], labels[part])
            for name, part in rows.items()
        }
        return Splits(splits, classes, notes)

    def _folder(self) -> Path:
        if self.root is None:
            raise SettingError("dataset=imagefolder needs a folder: add dataset.path=DIR")
        return self.root


def own_folder(path: str, name: str) -> FolderSource:
    """Make a client's own folder its source: all images are for training, without labels.

    Args:
        name: of the run's data set.
    """
    return FolderSource(name=name, path=path, labels=False, test_fraction=None)


def find_layout(root: Path) -> dict[str, Path]:
    """Find the folders of the splits, whatever the case of their names.

    Returns:
        "train", and "test" and "val" where they are; nothing where everything is in one
        place: without a folder for training, or where such a name stands among classes.
    """
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}

    def pick(names: Sequence[str]) -> Path | None:
        return next((folders[name] for name in names if name in folders), None)

    train, test, validation = pick(TRAIN), pick(TEST), pick(VALIDATION)
    has_classes = train is not None and any(entry.is_dir() for entry in train.iterdir())
    if train is None or not (test or validation or has_classes):
        return {}
    layout = {"train": train}
    if test or validation:
        layout["test"] = test or validation or root
    if test and validation:
        layout["val"] = validation
    return layout


def find_images(root: Path) -> FoundImages:
    """Find the images below a folder at any depth, and count what else is there."""
    files, left_out = [], Counter[str]()
    for found in walk_files(root):
        if found.path.name.lower().endswith(ENDINGS):
            files.append(found.path)  # a link to nothing is found to be unreadable
        elif found.status is None:
            left_out["links to nothing"] += 1
        else:
            left_out[found.path.suffix.lower() or "files without an ending"] += 1
    return FoundImages(root, sorted(files), left_out)


def list_images(root: Path) -> list[Path]:
    """List the images below a folder at any depth, sorted."""
    return find_images(root).files


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """Name each image's class, the first folder of its path; "" for one in no folder.

    Returns:
        None unless there are several folders and most images lie in one.
    """
    names = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    loose = names.count("")
    return names if len(set(names) - {""}) > 1 and loose < len(names) - loose else None


def number_classes(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Number classes in the order of their names: these, and int64 labels; "" has none."""
    classes = sorted(set(names) - {""})
    numbers = {name: number for number, name in enumerate(classes)} | {"": NO_LABEL}
    return classes, np.array([numbers[name] for name in names], dtype=np.int64)


def _describe_layout(layout: dict[str, Path], root: Path) -> list[str]:
    """Say which folders were taken for splits and which beside them were left out."""
    if not layout:
        return []
    taken = {folder.name for folder in layout.values() if folder != layout.get("val")}
    beside = [
        entry.name
        for entry in sorted(root.iterdir())
        if entry.is_dir() and entry.name not in taken and not entry.name.startswith(".")
    ]
    notes = [f"{layout['train'].name}/ is for training"]
    if "test" in layout:
        notes.append(f"{layout['test'].name}/ for the test")
    if beside:
        notes.append(f"{', '.join(f'{show_path(Path(name))}/' for name in beside)} left out")
    return notes


def _describe(found: FoundImages, names: Sequence[str] | None) -> list[str]:
    notes = []
    if names is not None:
        loose = sum(name == "" for name in names)
        notes.append(f"{len(set(names) - {''})} classes by folder")
        if loose:
            notes.append(f"{loose} images outside of the class folders have no label")
    return notes + _describe_left_out(found)


def _describe_left_out(found: FoundImages) -> list[str]:
    return [f"left out: {_count(found.left_out)}"] if found.left_out else []


def _count(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in left_out.most_common())


def _digest(file: Path) -> bytes:
    """Give the SHA-256 of a file; what can't be read is like nothing else."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return os.fsencode(file)


def _files_split(files: list[Path], labels: np.ndarray | None) -> Split:
    return Split(len(files), lambda: encoded(files), labels)


def encoded(files: Iterable[Path]) -> Iterator[Encoded]:
    """Name image files, to decode them one after another."""
    return (Encoded(show_path(file), file) for file in files)


def show_path(path: Path) -> str:
    """Write a path as text that can be printed and stored, whatever bytes it holds."""
    return os.fsencode(path).decode(errors="replace")
