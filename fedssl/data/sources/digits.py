"""The handwritten digits inside scikit-learn."""

from collections.abc import Iterator

import numpy as np

from fedssl.data.sources.base import Encoded, Source, Split, stratified_split


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
