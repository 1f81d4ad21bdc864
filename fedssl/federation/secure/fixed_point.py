"""Updates as whole numbers of 32 bits, whose sum is exact: what masks can hide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedssl.training.optimizers import MOMENTUM

LARGEST = 2**31 - 1
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class FixedPoint:
    """How updates become whole numbers.

    Attributes:
        clients: whose sum must fit.
        largest: what a number of an update is cut to, in both directions.
        longest: Euclidean length that the weights' part of an update is clipped to.
    """

    clients: int
    largest: float
    longest: float

    @property
    def step(self) -> float:
        """The difference between two neighbouring numbers: each is off by half of it at most."""
        return self.largest * self.clients / (LARGEST - self.clients)  # which rounding may add

    def encode(
        self, state: Mapping[str, Tensor], start: Mapping[str, Tensor], weight: float
    ) -> tuple[np.ndarray, int]:
        """Turn a weighted update into whole numbers.

        Args:
            state, start: of the model after and before training; only floats count.
            weight: from 0 to 1.

        Returns:
            uint32 (N,), in the order of `float_names`, and how many numbers were cut.

        Raises:
            FloatingPointError: a number is not finite.
        """
        names = float_names(start)
        if odd := [name for name in names if not torch.isfinite(state[name]).all()]:
            raise FloatingPointError(f"array {odd[0]!r} is not finite")
        ways = {name: (state[name].double() - start[name].double()) for name in names}
        length = math.hypot(*(float(ways[name].norm()) for name in names if is_weight(name)))
        short = min(1.0, self.longest / length) if length else 1.0
        cut, numbers = 0, []
        for name in names:
            way = (ways[name] * (short if is_weight(name) else 1.0)).flatten()
            cut += int((way.abs() > self.largest).sum())
            scaled = way.clamp(-self.largest, self.largest) * (weight / self.step)
            numbers.append(scaled.round().to(torch.int64).numpy())
        return np.concatenate(numbers).astype(np.uint32), cut  # modulo 2**32

    def decode(
        self, total: np.ndarray, start: Mapping[str, Tensor], weight: float
    ) -> dict[str, Tensor]:
        """Turn the sum of encoded updates into the mean of the states, the floats alone.

        Args:
            total: uint32 (N,), modulo 2**32.
            start: as of `encode`.
            weight: the sum of the weights.
        """
        ways = total.view(np.int32).astype(np.float64) * (self.step / weight)
        found, place = {}, 0
        for name in float_names(start):
            old = start[name]
            way = torch.from_numpy(ways[place : place + old.numel()]).view(old.shape)
            found[name] = (old.double() + way).to(old.dtype)
            place += old.numel()
        return found

    def check_sum(self, mean: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        """Make sure that the mean is one of clipped updates.

        Raises:
            ValueError: it is further away than any of them may be.
        """
        names = [name for name in float_names(start) if is_weight(name)]
        length = math.hypot(*(float((mean[name] - start[name]).norm()) for name in names))
        rounding = self.step * math.sqrt(count_floats(start)) * self.clients
        if not length <= self.longest * (1 + 1e-3) + rounding:
            raise ValueError(
                f"the mean of the masked updates moved by {length:.3g}, over the "
                f"{self.longest:.3g} that each is clipped to: one of them was not"
            )


def float_names(state: Mapping[str, Tensor]) -> Sequence[str]:
    """List the arrays that are masked, in the order of their numbers."""
    return sorted(name for name, value in state.items() if value.is_floating_point())


def count_floats(state: Mapping[str, Tensor]) -> int:
    """Count the numbers that are masked."""
    return sum(state[name].numel() for name in float_names(state))


def is_weight(name: str) -> bool:
    """Tell an array of weights from one of statistics or momentum."""
    return not name.startswith(MOMENTUM) and not name.endswith(STATISTICS)
