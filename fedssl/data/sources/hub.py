"""Image data sets of the Hugging Face hub, or local copies of their files."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, Splits, split_rows
from fedssl.errors import SettingError, UserError

if TYPE_CHECKING:
    import datasets  # takes seconds to import, and only `read` needs it

HUB_TIMEOUT_S = 5


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """An image data set of the Hugging Face hub, or a local copy of its parquet files.

    Attributes:
        path: a folder with the hub's files; None: they are downloaded.
        hub_name: such as "uoft-cs/cifar10"; None: the same as `name`.
        revision: of the hub's files; None: the newest.
        image_column, label_column: of the table; label_column None: no labels.
        train_split, test_split: names of the splits; test_split None: test
            images are drawn from the training images by the seed.
        test_fraction: their share; None: no test images.
    """

    hub_name: str | None
    revision: str | None = None
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
        if not self.path and not self.name:
            raise SettingError("dataset=hub needs a name: add dataset.name=OWNER/NAME")
        super().check()

    def read(self, seed: int, scratch: Path) -> Splits:
        """Load the tables, from the network if need be.

        Raises:
            UserError: the hub can't be reached, or a split or column is missing.
        """
        loaded = self._load(scratch)
        train = self._table(loaded, self.train_split)
        labels = self._labels(train)
        if self.test_split is not None:
            test = self._table(loaded, self.test_split)
            splits = {"train": self._split("train", train, labels)}
            splits["test"] = self._split("test", test, self._labels(test))
        else:
            parts = split_rows(len(train), labels, self.test_fraction, seed)
            splits = {
                name: self._split(
                    name, train.select(rows), None if labels is None else labels[rows]
                )
                for name, rows in parts.items()
            }
        feature = train.features[self.label_column] if self.label_column else None
        return Splits(splits, list(getattr(feature, "names", None) or []))

    def _load(self, scratch: Path) -> "datasets.DatasetDict":
        name = self.hub_name or self.name
        if self.root is None:
            _check_hub(str(name))
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            if self.root:
                return datasets.load_dataset(str(self.root), cache_dir=str(scratch))
            return datasets.load_dataset(name, revision=self.revision)
        except Exception as error:  # the library raises a dozen unrelated types here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.place}: can't be loaded ({reason})", public="its data set can't be loaded"
            ) from error

    def _table(self, loaded: "datasets.DatasetDict", split: str) -> "datasets.Dataset":
        """Pick a split that has the columns."""
        if split not in loaded:
            known = ", ".join(map(repr, loaded))
            raise UserError(
                f"{self.place}: no split {split!r}, it has {known}",
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

    def _labels(self, table: "datasets.Dataset") -> np.ndarray | None:
        """Read the labels, int64 (rows,).

        Raises:
            UserError: they are no whole numbers.
        """
        if self.label_column is None:
            return None
        kind = str(getattr(table.features[self.label_column], "dtype", ""))
        try:
            if not kind.startswith(("int", "uint", "bool")):
                raise TypeError(kind)
            return np.asarray(table[self.label_column], dtype=np.int64)
        except TypeError as error:  # or a row without a label
            raise UserError(
                f"{self.place}: column {self.label_column!r} holds no class numbers; set "
                "dataset.label_column to one that does, or to null",
                public=f"column {self.label_column!r} of its data set holds no class numbers",
            ) from error

    def _split(self, name: str, table: "datasets.Dataset", labels: np.ndarray | None) -> Split:
        import datasets

        column = self.image_column
        undecoded = table.select_columns([column])
        undecoded = undecoded.cast_column(column, datasets.Image(decode=False))

        def read() -> Iterator[Encoded]:
            for row, record in enumerate(undecoded):
                image = record[column] or {}
                data = image.get("bytes") or Path(image.get("path") or "missing")
                yield Encoded(f"{name} row {row}", data)

        return Split(len(table), read, labels)


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
