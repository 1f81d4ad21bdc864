"""Folders of image files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, Splits, split_rows
from fedssl.errors import SettingError, UserError


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """A folder of images of any size and mode.

    Layouts: `train/` and `test/` below `path`, or everything in one place;
    each either class folders (then there are labels) or images at any depth.

    Attributes:
        path: None: each client has a folder of its own, and here there is none.
        labels: False: class folders are mere folders.
        test_fraction: share of labelled images without `test/` that become test
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
        """List the images and their classes.

        Raises:
            UserError: no image there, or a test folder with other classes.
        """
        root = self._folder()
        has_splits = (root / "train").is_dir()
        files, labels, classes = _label_images(root / "train" if has_splits else root, self.labels)
        if not files:
            known = ", ".join(extensions())
            raise UserError(
                f"{self.place}: no image found (looked for {known})",
                public=f"no image found in its folder (looked for {known})",
            )
        if has_splits and (root / "test").is_dir():
            tests, test_labels, test_classes = _label_images(root / "test", self.labels)
            if labels is not None and test_labels is not None and test_classes != classes:
                odd = sorted(set(classes) ^ set(test_classes))
                raise UserError(
                    f"{self.place}: train/ and test/ hold different classes ({odd[0]} is "
                    "in one only); give both the same class folders",
                    public="train/ and test/ in its folder hold different classes",
                )
            train, test = _files_split(files, labels), _files_split(tests, test_labels)
            return Splits({"train": train, "test": test}, classes)
        parts = split_rows(len(files), labels, self.test_fraction, seed)
        splits = {
            name: _files_split([files[i] for i in rows], None if labels is None else labels[rows])
            for name, rows in parts.items()
        }
        return Splits(splits, classes)

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


def extensions() -> tuple[str, ...]:
    """Tell by which endings a file is taken for an image, in lower case."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def list_images(root: Path) -> list[Path]:
    """List the images below a folder at any depth, sorted."""
    endings = extensions()
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(endings)
    )


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """Name each image's class, the first folder of its path.

    Returns:
        None unless every image lies in a folder and there are several folders.
    """
    names = [path.parts[0] for path in paths]
    return names if all(len(path.parts) > 1 for path in paths) and len(set(names)) > 1 else None


def _label_images(root: Path, use_labels: bool) -> tuple[list[Path], np.ndarray | None, list[str]]:
    """List the images below a folder, with labels if each lies in a class folder."""
    files = list_images(root)
    names = class_names([file.relative_to(root) for file in files]) if use_labels else None
    if names is None:
        return files, None, []
    classes, labels = np.unique(names, return_inverse=True)
    return files, labels.astype(np.int64), classes.tolist()


def _files_split(files: list[Path], labels: np.ndarray | None) -> Split:
    return Split(len(files), lambda: encoded(files), labels)


def encoded(files: Iterable[Path]) -> Iterator[Encoded]:
    """Name image files, to decode them one after another."""
    return (Encoded(show_path(file), file) for file in files)


def show_path(path: Path) -> str:
    """Write a path as text that can be printed and stored, whatever bytes it holds."""
    return os.fsencode(path).decode(errors="replace")
