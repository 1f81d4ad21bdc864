"""Image data sets of the Hugging Face hub, or local copies of their files."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, stratified_split
from fedssl.errors import UserError

HUB_TIMEOUT_S = 5


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
