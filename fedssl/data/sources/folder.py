"""Folders of image files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, stratified_split
from fedssl.errors import UserError


def image_folder(root: Path, use_labels: bool, test_fraction: float, seed: int) -> Source:
    """Read a folder of images of any size and mode.

    Layouts: `train/` and `test/` below the root, or everything in one place;
    each either class folders (then there are labels) or images at any depth.
    Labelled images without `test/` are split by the seed.

    Raises:
        UserError: no image there, or a test folder with other classes.
    """
    has_splits = (root / "train").is_dir()
    train_root = root / "train" if has_splits else root
    files, labels, classes = _label_images(train_root, use_labels)
    if not files:
        raise UserError(
            f"dataset.path={root}: no image found (looked for {', '.join(extensions())})"
        )
    if has_splits and (root / "test").is_dir():
        test_files, test_labels, test_classes = _label_images(root / "test", use_labels)
        if labels is not None and test_labels is not None and test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(
                f"dataset.path={root}: train/ and test/ hold different classes ({odd[0]} is "
                "in one only); give both the same class folders"
            )
        splits = {
            "train": _files_split(files, labels),
            "test": _files_split(test_files, test_labels),
        }
    elif labels is None:
        splits = {"train": _files_split(files, None)}
    else:
        rows = stratified_split(labels, test_fraction, seed)
        splits = {
            name: _files_split([files[i] for i in part], labels[part])
            for name, part in zip(("train", "test"), rows, strict=True)
        }
    return Source(splits, classes)


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
