"""Client-level differential privacy: Flower's clipped, noised mean, its accountant, its limits.

A round's mean is of clipped updates over as many clients as the round plans with, and gets
Gaussian noise; epsilon is what the accountant adds up over the rounds, without any gain from
sampling. DP-FedAvg: McMahan et al., https://arxiv.org/abs/1710.06963. Adaptive clipping:
Andrew et al., https://arxiv.org/abs/1905.03871.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import (
    GaussianPrivacyEvent,
    Grid,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase
from flwr.supercore.differential_privacy import compute_adaptive_noise_params, get_norm

from fedssl.errors import SettingError
from fedssl.federation.guards import Update
from fedssl.federation.messages import ARRAYS
from fedssl.runs.metrics import NOT_COVERED, Failure

ROUNDING = 1e-4  # by which a clipped update may be longer, in single precision


@dataclass(frozen=True)
class PrivacySettings:
    """What decides the noise, and what it is to be worth.

    Attributes:
        mechanism: "central", or "adaptive" where the clipping follows the updates.
        noise_multiplier: standard deviation of the noise on the sum of the clipped updates,
            in units of the clipping norm.
        clipping_norm: Euclidean length of an update, at most; in the first round if adaptive.
        delta: probability at which epsilon need not hold.
        population: clients that there are.
        clients_per_round: that a round plans with.
        max_epsilon: no round begins that would exceed it; None for none.
        clipping: "server", or "client" where they clip before anything leaves them.
        target_quantile: share of the updates that adaptive clipping leaves as they are.
        clip_rate: how fast it gets there.
        count_noise: standard deviation of the noise on the number of these updates; None for a
            twentieth of `clients_per_round`, and at least the noise multiplier.
    """

    mechanism: str
    noise_multiplier: float
    clipping_norm: float
    delta: float
    population: int
    clients_per_round: int
    max_epsilon: float | None = None
    clipping: str = "server"
    target_quantile: float = 0.5
    clip_rate: float = 0.2
    count_noise: float | None = None

    def new_accountant(self) -> PrivacyAccountant:
        """Make an accountant that has not seen a round yet."""
        from flwr.serverapp import RdpAccountant  # whose imports no client needs

        return RdpAccountant(
            PrivacyConfig(
                self.delta,
                self.population,
                NeighboringRelation.ADD_OR_REMOVE_ONE,
                SamplingMethod.NO_AMPLIFICATION,
            )
        )

    def event(self) -> GaussianPrivacyEvent:
        """Say what a round releases."""
        return GaussianPrivacyEvent(self.noise_multiplier, self.clients_per_round, self.population)

    def epsilon_after(self, rounds: int) -> float:
        """Tell the epsilon of so many rounds."""
        accountant = self.new_accountant()
        accountant.compose(self.event(), rounds)
        return float(accountant.get_epsilon(self.delta))

    def rounds_within(self, rounds: int) -> int:
        """Tell how many of so many rounds `max_epsilon` allows."""
        limit = math.inf if self.max_epsilon is None else self.max_epsilon
        low, high = 0, rounds
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon_after(middle) <= limit else (low, middle - 1)
        return low

    def describe(self, rounds: int) -> str:
        """Say in some lines what so many rounds are worth, and what is not covered."""
        allowed = self.rounds_within(rounds)
        noise = f"noise {self.noise_multiplier:g} times a clipping norm of {self.clipping_norm:g}"
        noise += " at first" if self.mechanism == "adaptive" else ""
        uncovered = ",\n".join(NOT_COVERED)
        ends = f", where max_epsilon={self.max_epsilon:g} ends it" if allowed < rounds else ""
        return (
            f"{self.mechanism}, {noise}, {self.clients_per_round} clients a round;\n"
            f"epsilon {self.epsilon_after(allowed):.2f} at delta {self.delta:g} after "
            f"{allowed} {'round' if allowed == 1 else 'rounds'}{ends};\n"
            f"not covered: {uncovered}"
        )

    def check(self) -> None:
        """Make sure that a first round is allowed, and adaptive clipping possible.

        Raises:
            UserError: it is not.
        """
        if not self.rounds_within(1):
            cost = self.epsilon_after(1)
            raise SettingError(
                f"privacy.max_epsilon={self.max_epsilon:g}: one round with "
                f"privacy.noise_multiplier={self.noise_multiplier:g} takes {cost:.3g}; give more "
                "noise, or a larger max_epsilon"
            )
        if self.mechanism == "adaptive":
            self.split_noise()

    def split_noise(self) -> tuple[float, float]:
        """Share the noise between the number of short updates and the updates themselves.

        Together they are worth `noise_multiplier`, theorem 1 of the paper.

        Returns:
            The standard deviation on the number, and the noise multiplier of the updates.
        """
        count = self.count_noise
        if count is None:
            count = max(self.clients_per_round / 20, self.noise_multiplier)
        try:
            return compute_adaptive_noise_params(
                self.noise_multiplier, self.clients_per_round, count
            )
        except ValueError as error:
            raise SettingError(
                f"privacy.count_noise={count:g}: must be above half of "
                f"privacy.noise_multiplier={self.noise_multiplier:g}, else nothing of it is left "
                "to the updates"
            ) from error


class PrivateMean(DifferentialPrivacyFixedClippingBase):
    """What the private strategies have in common; Flower's classes clip, average and add noise.

    Flower's mean is over those who answered. Here who is missing counts as one who did not
    move, so that no client changes the weight of another.
    """

    def __init__(self, strategy: FedAvg, settings: PrivacySettings, noise_key: bytes) -> None:
        """Wrap a strategy.

        Args:
            noise_key: decides the noise of all rounds; whoever has it can take the noise away.
        """
        super().__init__(
            strategy,
            settings.noise_multiplier,
            settings.clipping_norm,
            settings.clients_per_round,
            accountant=settings.new_accountant(),
        )
        self.settings = settings
        self.current_arrays = ArrayRecord()  # of the global model, while a round goes on
        # A function, since all else of a strategy is written into checkpoints.
        self.words_of_noise = lambda number: _draw_words(noise_key, number)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the messages of a round.

        Raises:
            PrivacyBudgetExhausted: its mean would exceed max_epsilon.
            RuntimeError: more clients than there should be.
        """
        limit = self.settings.max_epsilon
        assert self.accountant
        if limit is not None and self.accountant.would_exceed(self.settings.event(), limit):
            raise PrivacyBudgetExhausted(
                f"privacy.max_epsilon={limit:g} allows no round {server_round}"
            )
        self.current_arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[safe-super]

    def _prepare_accounting(
        self, server_round: int, messages: Iterable[Message]
    ) -> Iterable[Message]:
        messages = list(messages)
        if len(messages) > self.settings.population:
            raise RuntimeError(
                f"round {server_round}: {len(messages)} clients, but num_clients="
                f"{self.settings.population}, on which epsilon rests; give the true number"
            )
        self.num_sampled_clients = len(messages)
        return super()._prepare_accounting(server_round, messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the noised mean of the clipped updates, over the clients that were planned with."""
        before = self.current_arrays.to_numpy_ndarrays()
        measured = [(reply, _length(reply, before)) for reply in replies]
        moved = [reply for reply, length in measured if length > 0]  # Flower divides by these
        self.num_sampled_clients = len(moved)
        earlier = np.random.get_state()  # Flower draws its noise from here
        np.random.seed(self.words_of_noise(server_round))
        try:
            arrays, metrics = super().aggregate_train(server_round, moved)  # type: ignore[safe-super]
            self.after_round([length for _, length in measured])
        finally:
            np.random.set_state(earlier)
            self.current_arrays = ArrayRecord()
        share = len(moved) / self.settings.clients_per_round
        if arrays is not None and share != 1:
            after = zip(arrays, before, arrays.to_numpy_ndarrays(), strict=True)
            arrays = ArrayRecord(
                {name: Array(old + np.float32(share) * (new - old)) for name, old, new in after}
            )
        return arrays, metrics

    def after_round(self, lengths: Sequence[float]) -> None:
        """Do what follows a round, given the lengths of its updates before they were clipped."""
        return

    def refuse(self, updates: Sequence[Update]) -> tuple[list[Update], list[Failure]]:
        """Separate the updates that can't be averaged privately."""
        return list(updates), []


class ClippedByServer(PrivateMean, DifferentialPrivacyServerSideFixedClipping):
    """The server clips."""


class ClippedByClients(PrivateMean, DifferentialPrivacyClientSideFixedClipping):
    """Clients clip, before anything leaves them; who does not is left out."""

    def refuse(self, updates: Sequence[Update]) -> tuple[list[Update], list[Failure]]:
        """Leave out updates that are too long."""
        limit = self.settings.clipping_norm
        short, failures = [], []
        for update in updates:
            if update.update_norm <= limit * (1 + ROUNDING):
                short.append(update)
                continue
            told = f"its update is {update.update_norm:.3g} long, not clipped to {limit:g}"
            failures.append(Failure(update.partition, told))
        return short, failures


class AdaptivelyClipped(ClippedByServer):
    """The server clips by a length that a chosen share of the updates has at most.

    Flower's own class moves the length away from where it should be, and measures the noise of
    a round by the next round's length; so here these steps are done as in the paper.
    """

    def __init__(self, strategy: FedAvg, settings: PrivacySettings, noise_key: bytes) -> None:
        """Wrap a strategy, see `PrivateMean`."""
        super().__init__(strategy, settings, noise_key)
        self.count_noise, self.noise_of_updates = settings.split_noise()

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        whole, self.noise_multiplier = self.noise_multiplier, self.noise_of_updates
        try:
            return super()._add_noise_to_aggregated_arrays(aggregated_arrays)
        finally:
            self.noise_multiplier = whole

    def after_round(self, lengths: Sequence[float]) -> None:
        """Move the clipping norm, by a noised count of the updates that were short enough.

        Each counts one half up or down, and one that is missing nothing, so that a client
        changes the count by one half.
        """
        settings = self.settings
        count = sum(0.5 if length <= self.clipping_norm else -0.5 for length in lengths)
        noised = count + np.random.normal(0, self.count_noise)
        share = noised / settings.clients_per_round + 0.5
        self.clipping_norm *= math.exp(-settings.clip_rate * (share - settings.target_quantile))


MECHANISMS: dict[tuple[str, str], type[PrivateMean]] = {
    ("central", "server"): ClippedByServer,
    ("central", "client"): ClippedByClients,
    ("adaptive", "server"): AdaptivelyClipped,
}


def make_private(
    strategy: Strategy, settings: PrivacySettings | None, noise_key: bytes
) -> Strategy:
    """Wrap a strategy, unless no privacy is asked for."""
    if settings is None:
        return strategy
    assert isinstance(strategy, FedAvg)  # as the configuration's check makes sure
    return MECHANISMS[settings.mechanism, settings.clipping](strategy, settings, noise_key)


def _length(reply: Message, before: Sequence[np.ndarray]) -> float:
    """Measure how far a reply's arrays are from those of the global model."""
    after = reply.content.array_records[ARRAYS].to_numpy_ndarrays()
    return get_norm([new - old for new, old in zip(after, before, strict=True)])


def _draw_words(key: bytes, round_number: int) -> list[int]:
    """Give the seed of a round's noise: 256 bits, as NumPy takes them."""
    digest = hashlib.sha256(key + round_number.to_bytes(8, "big")).digest()
    return np.frombuffer(digest, np.uint32).tolist()
