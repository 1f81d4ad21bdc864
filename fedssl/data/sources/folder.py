"""Folders of image files."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import (
    FOLDERS,
    NO_LABEL,
    Encoded,
    Kept,
    Note,
    Source,
    Split,
    Splits,
    describe_twins,
    is_hidden,
    split_rows,
    tell_kept_for_test,
    walk_files,
)
from fedssl.errors import SettingError, UserError, name_some

ENDINGS = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
TRAIN, TEST = ("train", "training"), ("test", "testing")
VALIDATION = ("val", "valid", "validation")
WHOLE_NAME = "*"  # of a folder that is called like a split and nothing else
TEST_FRACTION = 0.2  # where the labelled images have to give the test, too


@dataclass(frozen=True)
class FoundImages:
    """The images below a folder.

    Attributes:
        files: sorted.
        left_out: other files by their ending, and what can't be read.
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
        layout = find_layout(root) if self.labels else Layout(root, root)
        train = find_images(layout.train)
        if not train.files:
            raise self._nothing_found(train, root)
        names = train.names if self.labels else None
        tests = [find_images(folder) for folder in layout.tests]
        if names is None:
            notes = [*layout.describe(*layout.tests[:1]), *_describe(train, names)]
            return self._without_labels(train, tests, notes)
        classes, labels = number_classes(names)
        notes = _describe(train, names)
        for test in tests:
            if test.files and _test_names(test, classes) is not None:
                notes = [*layout.describe(test.root), *notes]
                return self._given_split(train, labels, test, classes, notes)
            why = f"{len(test.files)} images without labels" if test.files else "no images"
            notes.append(f"{test.root.name}/ holds {why} and is left out")
        notes = [*layout.describe(), *notes]
        return self._own_split(train.files, labels, classes, seed, notes, bool(tests))

    def _nothing_found(self, train: FoundImages, root: Path) -> UserError:
        looked = f"(looked for {', '.join(ENDINGS)})"
        found = f"; there are {_count(train.left_out)}" if train.left_out else ""
        where = "" if train.root == root else f" in {train.root.relative_to(root)}/"
        return UserError(
            f"{self.place}: no image found{where} {looked}{found}",
            public=f"no image found in its folder {looked}",
        )

    def _without_labels(
        self, train: FoundImages, tests: Sequence[FoundImages], notes: list[Note]
    ) -> Splits:
        splits = {"train": _files_split(train.files, None)}
        if tests and tests[0].files:
            splits["test"] = _files_split(tests[0].files, None)
        return Splits(splits, [], notes)

    def _given_split(
        self,
        train: FoundImages,
        labels: np.ndarray,
        test: FoundImages,
        classes: list[str],
        notes: list[Note],
    ) -> Splits:
        names = _test_names(test, classes) or []
        if unknown := sorted(set(filter(None, names)) - set(classes)):
            raise UserError(
                f"{self.place}: {train.root.name}/ and {test.root.name}/ hold different classes "
                f"({unknown[0]} is in the latter only); give both the same class folders",
                public="the folders for training and test hold different classes",
            )
        numbers = {name: number for number, name in enumerate(classes)}
        test_labels = np.array([numbers.get(name, NO_LABEL) for name in names], dtype=np.int64)
        notes += [_tell_test, *_describe_left_out(test)]
        splits = {"train": _files_split(train.files, labels)}
        return Splits(splits | {"test": _files_split(test.files, test_labels)}, classes, notes)

    def _own_split(
        self,
        files: list[Path],
        labels: np.ndarray,
        classes: list[str],
        seed: int,
        notes: list[Note],
        needs_test: bool,
    ) -> Splits:
        """Draw the test images from the labelled ones."""
        fraction = self.test_fraction or (TEST_FRACTION if needs_test else None)
        if fraction is None:
            return Splits({"train": _files_split(files, labels)}, classes, notes)
        digests = [_digest(file) for file in files]
        rows = split_rows(len(files), labels, fraction, seed, digests)
        notes.append(tell_kept_for_test)
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


def labelled_folder(path: str, name: str) -> FolderSource:
    """Make a client's class folders a source; without test images a share becomes them.

    Args:
        name: of the run's data set.
    """
    return FolderSource(name=name, path=path, labels=True, test_fraction=TEST_FRACTION)


@dataclass(frozen=True)
class Layout:
    """Which folders stand for splits.

    Attributes:
        place: where they stand.
        train: the same where everything is in one place.
        tests: of test and validation, the one to take first.
    """

    place: Path
    train: Path
    tests: tuple[Path, ...] = ()

    def describe(self, test: Path | None = None) -> list[Note]:
        """Say which folders were taken for what and what beside them was left out.

        Args:
            test: the one that is the test, if any.
        """
        if self.train == self.place:
            return []
        # Of those before the one that is taken others tell why they are not.
        used = [self.train, *self.tests[: self.tests.index(test) + 1 if test else None]]
        beside = [
            f"{entry.name}/" if entry.is_dir() else entry.name
            for entry in _entries(self.place)
            if not any(folder.is_relative_to(entry) for folder in used)
        ]
        notes: list[Note] = [f"{self.train.name}/ is for training"]
        if test is not None:
            notes.append(f"{test.name}/ for the test")
        return [*notes, f"{name_some(beside)} left out"] if beside else notes


def find_layout(root: Path) -> Layout:
    """Find the folders of the splits, whatever the case of their names.

    They may have more to their names if all have the same: `cars_train/` and `cars_test/`,
    `train2017/` and `val2017/`. A folder that holds nothing but one folder with splits is
    passed through. Everything is in one place without a folder for training, or where such
    a name stands among classes.

    Raises:
        UserError: there is nothing but folders for tests.
    """
    entries = _entries(root)
    folders = [entry for entry in entries if entry.is_dir()]
    splits = _pick_splits(folders)
    if not splits and len(folders) == len(entries) == 1 and _pick_splits(_entries(folders[0])):
        return find_layout(folders[0])
    names = [folder.name for folder in folders]
    if len(names) > 1 and {*TEST, *VALIDATION}.issuperset(name.lower() for name in names):
        raise UserError(
            f"dataset.path={root}: only {name_some([f'{name}/' for name in names])}; call the "
            "folder to train on train/, or add dataset.labels=false",
            public="its folder holds tests only",
        )
    if not splits:
        return Layout(root, root)
    tests = (splits[name] for name in ("test", "val") if name in splits)
    return Layout(root, _pass_through(splits["train"]), tuple(map(_pass_through, tests)))


def _pick_splits(folders: Sequence[Path]) -> dict[str, Path]:
    """Choose the folders for "train", "test" and "val" among those of a folder."""
    found: dict[str, dict[str, Path]] = {}
    for name, words in (("train", TRAIN), ("test", TEST), ("val", VALIDATION)):
        for folder in folders:
            if rest := _rest_of_name(folder.name.lower(), words):
                found.setdefault(rest, {}).setdefault(name, folder)
    whole = found.pop(WHOLE_NAME, {})
    if "train" in whole and (len(whole) > 1 or any(map(Path.is_dir, _entries(whole["train"])))):
        return whole
    others = [each for each in found.values() if "train" in each and len(each) > 1]
    return others[0] if len(others) == 1 else {}


def _rest_of_name(name: str, words: Sequence[str]) -> str | None:
    """Put a star for the word of a split in a folder's name; None without one."""
    match = re.fullmatch(rf"(.*[^a-z])?(?:{'|'.join(words)})([^a-z].*)?", name)
    return f"{match[1] or ''}{WHOLE_NAME}{match[2] or ''}" if match else None


def _pass_through(folder: Path) -> Path:
    """Go on to the only entry of a folder as long as it has the same name."""
    entries = _entries(folder)
    is_same = len(entries) == 1 and entries[0].name.lower() == folder.name.lower()
    return _pass_through(entries[0]) if is_same and entries[0].is_dir() else folder


def _entries(folder: Path) -> list[Path]:
    """List what a person sees in a folder, sorted."""
    if not folder.is_dir():
        return []
    return [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]


def find_images(root: Path) -> FoundImages:
    """Find the images below a folder at any depth, and count what else is there."""
    files, left_out = [], Counter[str]()
    for found in walk_files(root):
        is_image = found.path.name.lower().endswith(ENDINGS) and found.problem not in FOLDERS
        if is_image:
            files.append(found.path)  # one with a problem is found to be unreadable
        else:
            ending = found.path.suffix.lower() or "files without an ending"
            left_out[found.problem or ending] += 1
    return FoundImages(root, sorted(files), left_out)


def list_images(root: Path) -> list[Path]:
    """List the images below a folder at any depth, sorted."""
    return find_images(root).files


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """Name each image's class, the first folder of its path; "" for one in no folder.

    Returns:
        None unless there are several folders and most images lie in one.
    """
    names = _first_folders(paths)
    loose = names.count("")
    return names if len(set(names) - {""}) > 1 and loose < len(names) - loose else None


def _first_folders(paths: Sequence[Path]) -> list[str]:
    """Name the first folder of each path as text, "" for one in none."""
    return [
        os.fsencode(path.parts[0]).decode(errors="backslashreplace") if len(path.parts) > 1 else ""
        for path in paths
    ]


def _test_names(test: FoundImages, classes: Sequence[str]) -> list[str] | None:
    """Name the class of each test image, a single class of the training included."""
    names = _first_folders([file.relative_to(test.root) for file in test.files])
    return names if set(names) & set(classes) else test.names


def number_classes(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Number classes in the order of their names: these, and int64 labels; "" has none."""
    classes = sorted(set(names) - {""})
    numbers = {name: number for number, name in enumerate(classes)} | {"": NO_LABEL}
    return classes, np.array([numbers[name] for name in names], dtype=np.int64)


def _describe(found: FoundImages, names: Sequence[str] | None) -> list[Note]:
    notes: list[Note] = []
    if names is not None:
        notes += _tell_classes(sorted(set(names) - {""}))
        if loose := sum(name == "" for name in names):
            notes.append(f"{loose} images outside of the class folders have no label")
    return notes + _describe_left_out(found)


def _tell_classes(names: Sequence[str]) -> list[Note]:
    """Say how many classes have an image that can be read, and which they are."""

    def there(kept: Kept) -> list[str]:
        seen = [labels[labels != NO_LABEL] for labels in kept.values() if labels is not None]
        return [names[number] for number in np.unique(np.concatenate(seen))]

    return [
        lambda kept: f"{len(there(kept))} classes by folder",
        lambda kept: f"called {name_some(there(kept))}",
    ]


def _tell_test(kept: Kept) -> str:
    labels = np.array([]) if kept["test"] is None else kept["test"]
    unknown = int((labels == NO_LABEL).sum())
    return f"test: {len(labels)} images" + (f", {unknown} of them without a label" * bool(unknown))


def _describe_left_out(found: FoundImages) -> list[Note]:
    return [f"left out: {_count(found.left_out)}"] if found.left_out else []


def _count(left_out: Counter[str]) -> str:
    return name_some([f"{count} {what}" for what, count in left_out.most_common()])


def _digest(file: Path) -> bytes:
    """Give the SHA-256 of a file; what can't be read, or is empty, is like nothing else."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or not status.st_size:  # a pipe would never end
            return os.fsencode(file)
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
