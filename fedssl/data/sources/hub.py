"""Image data sets of the Hugging Face hub, or local copies of their files."""

import hashlib
import logging
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedssl.data.sources.base import (
    NO_LABEL,
    Encoded,
    Note,
    Source,
    Split,
    Splits,
    describe_twins,
    split_rows,
    tell_kept_for_test,
)
from fedssl.errors import SettingError, UserError

if TYPE_CHECKING:
    import datasets  # takes seconds to import, and only `read` needs it

HUB_TIMEOUT_S = 5
MISSING = Path("missing")  # where a row has no image
MOST_LETTERS = 200  # of a library's reason, in messages
MOST_CLASSES = 10_000  # different texts in a column of labels
TEST_FRACTION = 0.2  # where the test split has no labels


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """An image data set of the Hugging Face hub, or a local copy of its parquet files.

    Attributes:
        path: a folder with the hub's files; None: they are downloaded.
        hub_name: such as "uoft-cs/cifar10"; None: the same as `name`.
        revision: of the hub's files; None: the newest.
        config_name: which of several configurations; None: the only one.
        image_column, label_column: of the table; label_column None: no labels.
        train_split, test_split: names of the splits; test_split None: test
            images are drawn from the training images by the seed.
        test_fraction: their share; None: no test images.
    """

    hub_name: str | None
    revision: str | None = None
    config_name: str | None = None
    image_column: str
    label_column: str | None
    train_split: str
    test_split: str | None
    test_fraction: float | None

    @property
    def place(self) -> str:
        """The folder, or the name at the hub."""
        return super().place if self.path else f"dataset.name={self.hub_name or self.name}"

    @property
    def splits_by_seed(self) -> bool:
        """Whether a test split is drawn."""
        return self.test_split is None and None not in (self.label_column, self.test_fraction)

    def check(self) -> None:
        """Find out whether there is a name, or a folder with something in it.

        Raises:
            UserError: neither is given, or the folder is missing, empty or none.
        """
        if not self.path and not (self.hub_name or self.name):
            raise SettingError("dataset=hub needs a name: add dataset.name=OWNER/NAME")
        super().check()

    def read(self, seed: int, scratch: Path) -> Splits:
        """Load the tables, from the network if need be.

        Raises:
            UserError: the hub can't be reached, or a split or column is missing.
        """
        loaded = self._load(scratch)
        train = self._table(loaded, self.train_split)
        test = None if self.test_split is None else self._table(loaded, self.test_split)
        classes, labels = self._labels(train)
        notes: list[Note] = [*_describe_unlabelled("train", labels)]
        if test is not None:
            _, test_labels = self._labels(test, classes)
            if labels is None or _is_labelled(test_labels):
                notes += _describe_unlabelled("test", test_labels)
                splits = {"train": self._split("train", train, labels)}
                return Splits(
                    splits | {"test": self._split("test", test, test_labels)}, classes, notes
                )
            notes.append(f"split {self.test_split!r} has no labels and is left out")
        fraction = self.test_fraction or (TEST_FRACTION if test is not None else None)
        drawn = labels is not None and fraction is not None
        images = self._split("train", train, None).read() if drawn else iter(())
        digests = [_digest(image) for image in images]
        parts = split_rows(len(train), labels, fraction, seed, digests or None)
        if drawn:
            notes.append(tell_kept_for_test)
            notes += describe_twins(digests, parts)
        splits = {
            name: self._split(name, train.select(rows), None if labels is None else labels[rows])
            for name, rows in parts.items()
        }
        return Splits(splits, classes, notes)

    def _load(self, scratch: Path) -> "datasets.DatasetDict":
        name = self.hub_name or self.name
        if self.root is None:
            _check_hub(str(name))
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # `_reason` tells it in the line
        try:
            if self.root:
                place: dict[str, Any] = {"path": str(self.root), "cache_dir": str(scratch)}
            else:
                place = {"path": str(name), "revision": self.revision}
            return datasets.load_dataset(name=self.config_name, **place)
        except Exception as error:  # the library raises a dozen unrelated types here
            reason = _reason(error)
            raise UserError(
                f"{self.place}: can't be loaded ({reason})", public="its data set can't be loaded"
            ) from error

    def _table(self, loaded: "datasets.DatasetDict", split: str) -> "datasets.Dataset":
        """Pick a split that has the columns."""
        if split not in loaded:
            known = ", ".join(map(repr, loaded))
            raise UserError(
                f"{self.place}: no split {split!r}, it has {known}; set dataset.train_split and "
                "dataset.test_split, which may be null",
                public=f"its data set has no split {split!r}",
            )
        table = loaded[split]
        for column in (self.image_column, self.label_column):
            if column is not None and column not in table.column_names:
                known = ", ".join(map(repr, table.column_names))
                raise UserError(
                    f"{self.place}: no column {column!r}, it has {known}; set "
                    "dataset.image_column and dataset.label_column",
                    public=f"its data set has no column {column!r}",
                )
        return table

    def _labels(
        self, table: "datasets.Dataset", classes: Sequence[str] | None = None
    ) -> tuple[list[str], np.ndarray | None]:
        """Read the labels, int64 (rows,) or None where no row has one, and name the classes.

        Whole numbers are classes; below 0 and without a value they stand for no label.
        Texts are classes, too; an empty one is none.

        Args:
            classes: of the other split, where they are texts without numbers of their own.

        Raises:
            UserError: they are neither, or of a class that the other split lacks.
        """
        if self.label_column is None:
            return [], None
        feature = table.features[self.label_column]
        kind = str(getattr(feature, "dtype", ""))
        values: list[Any] = list(table[self.label_column])
        if kind.startswith(("int", "uint", "bool", "float", "double")):
            names = list(getattr(feature, "names", None) or [])
            return self._numbers(values, names, classes)
        if kind == "null":
            return [], None
        if kind not in ("string", "large_string"):
            raise self._wrong_labels(f"{kind or 'no single values'}")
        texts = [(value or "").strip() for value in values]
        known = list(classes) if classes else sorted(set(texts) - {""})
        if not any(texts):
            return known, None
        if unknown := sorted(set(texts) - {"", *known}):
            raise self._wrong_labels(f"{unknown[0]!r}, which the other split does not have")
        if len(known) > MOST_CLASSES:
            raise self._wrong_labels(f"{len(known)} different texts")
        numbers = {name: number for number, name in enumerate(known)} | {"": NO_LABEL}
        return known, np.array([numbers[text] for text in texts], dtype=np.int64)

    def _numbers(
        self, values: Sequence[Any], names: Sequence[str], others: Sequence[str] | None
    ) -> tuple[list[str], np.ndarray | None]:
        """Take whole numbers for classes, see `_labels`; without names they name themselves."""
        known = [NO_LABEL if v is None or v != v or v < 0 else v for v in values]
        if any(not math.isfinite(v) or v != int(v) for v in known):
            raise self._wrong_labels("fractions")
        if max(known, default=0) > np.iinfo(np.int64).max:
            raise self._wrong_labels(f"{max(known)}")
        labels = np.array(known, dtype=np.int64)
        classes = np.unique(labels[labels != NO_LABEL])
        if not len(classes):
            return list(names or others or []), None
        if names and classes[-1] >= len(names):
            raise self._wrong_labels(f"{classes[-1]}, and names for 0 to {len(names) - 1}")
        if names:
            return list(names), labels
        own = [str(number) for number in classes.tolist()]
        if others is None and classes[-1] < MOST_CLASSES:
            return [str(number) for number in range(classes[-1] + 1)], labels
        if others and (unknown := [name for name in own if name not in others]):
            raise self._wrong_labels(f"{unknown[0]}, which the other split does not have")
        if len(own) > MOST_CLASSES:
            raise self._wrong_labels(f"{len(own)} different numbers")
        numbers = {name: number for number, name in enumerate(others or own)}
        found = np.array([numbers[name] for name in own])[np.searchsorted(classes, labels)]
        return list(others or own), np.where(labels == NO_LABEL, NO_LABEL, found)

    def _wrong_labels(self, what: str) -> UserError:
        column = self.label_column
        return UserError(
            f"{self.place}: column {column!r} holds no class numbers but {what}; "
            "set dataset.label_column to one that does, or to null",
            public=f"its column {column!r} holds no classes",
        )

    def _split(self, name: str, table: "datasets.Dataset", labels: np.ndarray | None) -> Split:
        """Read a column of images in any form: files, bytes, or nested lists of numbers.

        Raises:
            UserError: it holds something else.
        """
        import datasets

        column = self.image_column
        undecoded = table.select_columns([column])
        first = table.with_format("numpy")[0][column] if _holds_lists(table, column) else None
        if first is None:
            try:
                undecoded = undecoded.cast_column(column, datasets.Image(decode=False))
            except (TypeError, ValueError, NotImplementedError) as error:
                raise self._wrong_images("neither images nor numbers") from error
        elif np.ndim(first) not in (2, 3):
            raise self._wrong_images(f"lists of {np.size(first)} numbers without height and width")

        def read() -> Iterator[Encoded]:
            for row, record in enumerate(undecoded):
                image = record[column] if record[column] is not None else {}
                if first is not None:
                    data: bytes | Path | np.ndarray = _pixels(image)
                else:
                    data = image.get("bytes") or Path(image.get("path") or MISSING)
                yield Encoded(f"{name} row {row}", data)

        return Split(len(table), read, labels)

    def _wrong_images(self, what: str) -> UserError:
        return UserError(
            f"{self.place}: column {self.image_column!r} holds {what}; set dataset.image_column "
            "to one with images",
            public=f"its column {self.image_column!r} holds no images",
        )


def _digest(image: Encoded) -> bytes:
    """Give the SHA-256 of an image; what is empty is like nothing else."""
    data = image.data.tobytes() if isinstance(image.data, np.ndarray) else image.data
    if isinstance(data, Path):
        data = os.fsencode(data) if data != MISSING else b""
    return hashlib.sha256(data).digest() if data else image.name.encode()


def _reason(error: Exception) -> str:
    """Say in one line why a data set can't be loaded; if one must be chosen, of which."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    if "config name" in text.lower() or "BuilderConfig" in text:
        named = re.search(r"\[('[^\]]*')\]", text)
        if named:
            return f"it has the configurations {named[1]}; choose one with dataset.config_name="
    text = " ".join(text.split())
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ..."


def _holds_lists(table: "datasets.Dataset", column: str) -> bool:
    """Tell whether a column holds arrays or lists of numbers."""
    import pyarrow as pa

    kind = table.data.schema.field(column).type
    storage = getattr(kind, "storage_type", kind)
    return (
        pa.types.is_list(storage)
        or pa.types.is_large_list(storage)
        or (pa.types.is_fixed_size_list(storage))
    )


def _pixels(numbers: Any) -> np.ndarray | bytes:
    """Turn nested lists into numbers (H, W) or (H, W, channels); b"" where that fails."""
    try:
        values = np.asarray(numbers)
        if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
            values = values.transpose(1, 2, 0)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[:, :, 0]
        return values if np.issubdtype(values.dtype, np.number) else b""
    except (TypeError, ValueError):
        return b""


def _is_labelled(labels: np.ndarray | None) -> bool:
    return labels is not None and bool((labels != NO_LABEL).any())


def _describe_unlabelled(split: str, labels: np.ndarray | None) -> list[str]:
    count = 0 if labels is None else int((labels == NO_LABEL).sum())
    return [f"{count} {split} images have no label"] if count else []


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
            raise SettingError(
                f"dataset.name={name}: the hub has no such public data set; check the name"
            ) from error
    except OSError as error:
        if not _in_hub_cache(name):
            raise SettingError(
                f"dataset.name={name}: the hub can't be reached and no earlier download was "
                "found; connect to the network, or give a local copy with dataset.path=DIR"
            ) from error
        os.environ["HF_HUB_OFFLINE"] = "1"


def _in_hub_cache(name: str) -> bool:
    """Tell whether the hub's client has downloaded this data set before."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return (hub / f"datasets--{name.replace('/', '--')}" / "snapshots").is_dir()
