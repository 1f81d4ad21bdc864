"""Where images come from: scikit-learn's digits, the Hugging Face hub, folders.

A source names its splits and yields their images undecoded; `utils.py` has them
decoded once into the cache.
"""

import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from errors import UserError

HUB_TIMEOUT_S = 5


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


def digits(test_fraction: float, seed: int) -> Source:
    """Read scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, split by the seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)

    def split(rows: np.ndarray) -> Split:
        def read() -> Iterator[Encoded]:
            return (Encoded(f"digit {row}", pixels[row]) for row in rows)

        return Split(len(rows), read, data.target[rows].astype(np.int64))

    train, test = stratified_split(data.target, test_fraction, seed)
    return Source({"train": split(train), "test": split(test)}, list("0123456789"))


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


def hub_dataset(
    name: str,
    path: Path | None,
    revision: str | None,
    columns: tuple[str, str | None],
    splits: tuple[str, str | None],
    test_fraction: float,
    seed: int,
    scratch: Path,
) -> Source:
    """Read an image data set by its hub name, or from a local copy of its files.

    Args:
        name: such as "uoft-cs/cifar10"; for messages only when `path` is given.
        path: a folder with the hub's files (parquet), or None for the hub.
        columns: of the images and of the labels (None: no labels).
        splits: names of the training and the test split (None: split by the seed).
        scratch: a folder for temporary files, needed while the source is read.

    Raises:
        UserError: the hub can't be reached, or a split or column is missing.
    """
    where = f"dataset.path={path}" if path else f"dataset.name={name}"
    if path is None:
        _check_hub(name)
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if path:
            loaded = datasets.load_dataset(str(path), cache_dir=str(scratch))
        else:
            loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: can't be loaded ({reason})") from error
    train = _named_split(loaded, splits[0], where)
    _check_columns(train, columns, where)
    if splits[1] is not None:
        parts = {"train": train, "test": _named_split(loaded, splits[1], where)}
    elif columns[1] is not None:
        labels = np.asarray(train[columns[1]])
        rows = stratified_split(labels, test_fraction, seed)
        parts = {"train": train.select(rows[0]), "test": train.select(rows[1])}
    else:
        parts = {"train": train}
    read = {key: _table_split(part, key, columns) for key, part in parts.items()}
    feature = train.features[columns[1]] if columns[1] else None
    return Source(read, list(getattr(feature, "names", None) or []))


def _check_hub(name: str) -> None:
    """Ask the hub once, instead of waiting through the library's retries.

    Without an answer the library is told to use what it has downloaded before.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return
    try:
        urllib.request.urlopen(f"{endpoint}/api/datasets/{name}", timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 404):
            raise UserError(
                f"dataset.name={name}: the hub has no such public data set; check the name"
            ) from error
    except OSError as error:
        if not _in_hub_cache(name):
            raise UserError(
                f"dataset.name={name}: the hub can't be reached and no earlier download was "
                "found; connect to the network, or give a local copy with dataset.path=DIR"
            ) from error
        os.environ["HF_HUB_OFFLINE"] = "1"


def _in_hub_cache(name: str) -> bool:
    """Tell whether the hub's client has downloaded this data set before."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return (hub / f"datasets--{name.replace('/', '--')}" / "snapshots").is_dir()


def _named_split(loaded: dict, name: str, where: str):
    if name not in loaded:
        raise UserError(f"{where}: no split {name!r}, it has {', '.join(map(repr, loaded))}")
    return loaded[name]


def _check_columns(table, columns: tuple[str, str | None], where: str) -> None:
    for column in columns:
        if column is not None and column not in table.column_names:
            known = ", ".join(map(repr, table.column_names))
            raise UserError(
                f"{where}: no column {column!r}, it has {known}; set dataset.image_column "
                "and dataset.label_column"
            )


def _table_split(table, split: str, columns: tuple[str, str | None]) -> Split:
    import datasets

    images, label_column = columns
    labels = np.asarray(table[label_column], dtype=np.int64) if label_column else None
    undecoded = table.select_columns([images]).cast_column(images, datasets.Image(decode=False))

    def read() -> Iterator[Encoded]:
        for row, record in enumerate(undecoded):
            image = record[images] or {}
            data = image.get("bytes") or Path(image.get("path") or "missing")
            yield Encoded(f"{split} row {row}", data)

    return Split(len(table), read, labels)


def decode_batches(
    images: Iterator[Encoded], image_size: int, batch_size: int
) -> Iterator[list[tuple[Encoded, np.ndarray | None]]]:
    """Decode images on all cores, a batch after the other; each with `decode`'s result."""
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(images, batch_size)):
            pixels = pool.map(lambda image: decode(image.data, image_size), batch)
            yield list(zip(batch, pixels, strict=True))


def decode(data: bytes | Path | np.ndarray, image_size: int) -> np.ndarray | None:
    """Decode an image of any size and mode to uint8 (3, image_size, image_size).

    The shorter side is resized, the longer one cropped to the middle.
    Transparent pixels become white, 16-bit images keep their upper 8 bits, and
    the camera's rotation is applied.

    Returns:
        None where the image can't be read.
    """
    try:
        opened = Image.fromarray(data) if isinstance(data, np.ndarray) else None
        if opened is None:
            opened = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        with opened as image:
            rgb = ImageOps.exif_transpose(to_rgb(image))
            if rgb.size != (image_size, image_size):
                rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # PIL raises any of these on broken files


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * 255 / max(high - low, 1e-9)).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
