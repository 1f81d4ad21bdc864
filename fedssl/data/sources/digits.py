"""The handwritten digits inside scikit-learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, Splits, split_rows
from fedssl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DigitsSource(Source):
    """scikit-learn's 1,797 handwritten digits, gray, 8 x 8 pixels.

    Attributes:
        test_fraction: share of the test images, drawn by the seed; None: no test images.
    """

    test_fraction: float | None

    @property
    def splits_by_seed(self) -> bool:
        """Whether a test split is drawn."""
        return self.test_fraction is not None

    def check(self) -> None:
        """Refuse a folder, which would be left unread.

        Raises:
            UserError: one is given.
        """
        super().check()
        if self.path:
            raise UserError(
                f"dataset.path={self.path}: the digits come with scikit-learn, not from a "
                "folder; add dataset=imagefolder for your own images",
                public="the digits come with scikit-learn, not from a folder",
            )

    def read(self, seed: int, scratch: Path) -> Splits:
        """Load the digits, the sixteen grays stretched to 0 to 255."""
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = (data.images * (255 / 16)).round().astype(np.uint8)
        labels = data.target.astype(np.int64)

        def split(rows: np.ndarray) -> Split:
            def read() -> Iterator[Encoded]:
                return (Encoded(f"digit {row}", pixels[row]) for row in rows)

            return Split(len(rows), read, labels[rows])

        parts = split_rows(len(pixels), labels, self.test_fraction, seed)
        return Splits({name: split(rows) for name, rows in parts.items()}, list("0123456789"))
