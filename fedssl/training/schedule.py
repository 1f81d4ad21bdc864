"""What changes over the rounds: resolutions, how long clients train, the learning rate.

Values "for equal parts of the run" are sequences of any length: with [16, 32] and seven
rounds the first four have 16. Rounds count from 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RoundPlan:
    """How much of the training happens in a round.

    Attributes:
        fraction: of the steps that the settings allow.
        begin, end: where the round lies within the run, from 0 to 1.
    """

    fraction: float
    begin: float
    end: float

    def progress(self, part: float) -> float:
        """Tell where a part of the round, from 0 to 1, lies within the run."""
        return self.begin + (self.end - self.begin) * part


@dataclass(frozen=True)
class Schedule:
    """The plan of a run.

    Attributes:
        image_size: side of the images in pixels.
        train_resolutions: sides of the views in pixels, for equal parts of the run;
            empty for the images' size.
        whole_resolution: side in pixels of the whole images that the encoder is
            used on; None for that of the round's views.
        round_fractions: shares of a whole round's steps, for equal parts of the
            run; empty for whole rounds.
    """

    num_rounds: int
    image_size: int
    train_resolutions: Sequence[int] = ()
    whole_resolution: int | None = None
    round_fractions: Sequence[float] = ()

    def train_resolution(self, round_number: int) -> int:
        """Choose the side of a round's views in pixels."""
        return self._choose(self.train_resolutions or [self.image_size], round_number)

    def eval_resolution(self, round_number: int) -> int:
        """Choose the side in pixels of the whole images that the encoder of a round sees.

        Crops magnify what they show, so that an encoder trained on views of 16 pixels
        may know whole images of 24 better (https://arxiv.org/abs/1906.06423). Images are
        never enlarged.
        """
        side = self.whole_resolution or self.train_resolution(round_number)
        return min(side, self.image_size)

    def plan(self, round_number: int) -> RoundPlan:
        """Give the length of a round and its place within the run."""
        shares = self.round_fractions or [1.0]
        fractions = [self._choose(shares, n) for n in range(1, self.num_rounds + 1)]
        fraction, before = fractions[round_number - 1], sum(fractions[: round_number - 1])
        total = sum(fractions)
        return RoundPlan(fraction, before / total, (before + fraction) / total)

    def _choose(self, values: Sequence[T], round_number: int) -> T:
        """Choose a round's value; one past the last, of a longer run, is taken for the last."""
        place = min(round_number, self.num_rounds) - 1
        return values[place * len(values) // self.num_rounds]


def cosine(progress: float) -> float:
    """Fall from 1 at the start of the run (0) to 0 at its end (1)."""
    return 0.5 * (1 + math.cos(math.pi * progress))
