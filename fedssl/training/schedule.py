"""What changes over the rounds: the size of the views, how long clients train, the learning rate.

Values "for equal parts of the run" are lists of any length: with [16, 32] and seven rounds
the first four have 16. Rounds count from 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def value_of_round(values: Sequence[Any], round_number: int, num_rounds: int) -> Any:
    """Choose a round's value out of some for equal parts of the run, at least one.

    A round past the last, as of a checkpoint from a longer run, is taken for the last.
    """
    return values[(min(round_number, num_rounds) - 1) * len(values) // num_rounds]


def view_size(sizes: Sequence[int], image_size: int, round_number: int, num_rounds: int) -> int:
    """Choose the side of a round's views in pixels.

    Args:
        sizes: for equal parts of the run; empty for the size of the images.
    """
    return value_of_round(sizes or [image_size], round_number, num_rounds)


def encode_size(
    train: Mapping[str, Any], image_size: int, round_number: int, num_rounds: int
) -> int:
    """Choose the side in pixels of the whole images that the encoder of a round sees.

    Crops magnify what they show, so that an encoder trained on views of 16 pixels
    may know whole images of 24 better (https://arxiv.org/abs/1906.06423).

    Args:
        train: the section; without `encode_size` it is the size of the round's views.
            Images are never enlarged.
    """
    views = view_size(train["view_sizes"], image_size, round_number, num_rounds)
    return min(train.get("encode_size") or views, image_size)


def plan_round(
    train: Mapping[str, Any], round_number: int, num_rounds: int
) -> tuple[float, tuple[float, float]]:
    """Give the length of a round, and where it begins and ends within the run, from 0 to 1.

    Args:
        train: the section, with `round_lengths` for equal parts of the run, as shares of a
            whole round; without them, as in older runs, all rounds are whole.
    """
    shares = train.get("round_lengths") or [1.0]
    lengths = [value_of_round(shares, number, num_rounds) for number in range(1, num_rounds + 1)]
    length, before, total = (
        lengths[round_number - 1],
        sum(lengths[: round_number - 1]),
        sum(lengths),
    )
    return length, (before / total, (before + length) / total)


def cosine(progress: float) -> float:
    """Fall from 1 at the start of the run (0) to 0 at its end (1)."""
    return 0.5 * (1 + math.cos(math.pi * progress))
