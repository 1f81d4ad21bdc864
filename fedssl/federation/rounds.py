"""The rounds of a federation: ask clients, check their replies, combine them, keep the result."""

import copy
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, cast

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedssl.errors import UserError, name_some
from fedssl.federation.aggregation import ActsOn, aggregate, arrays_for_strategy
from fedssl.federation.guards import (
    Update,
    client_metrics,
    count_images,
    reject_odd_metrics,
    reject_outliers,
    validate_replies,
    weighted_mean,
)
from fedssl.federation.messages import BUFFERS, CONFIG, RUN, pack_tensors, split_state
from fedssl.federation.monitoring import find_warnings
from fedssl.federation.negatives import (
    NEGATIVES,
    draw_negatives,
    flatten,
    newest,
    read_projections,
    unflatten,
)
from fedssl.federation.nodes import Nodes, OnReplies, no_op
from fedssl.federation.privacy import PrivateMean
from fedssl.federation.secure.server import SecureRound, SecureSettings, as_update
from fedssl.federation.statistics import (
    pool_statistics,
    statistics_request,
    whole_statistics,
)
from fedssl.federation.strategy_state import load_strategy_state_dict, strategy_state_dict
from fedssl.federation.weights import Weighting
from fedssl.files import writing_to
from fedssl.methods.base import Method
from fedssl.networks.encoder import Encoder
from fedssl.networks.state import load_state
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import ClientMetrics, Failure, Progress, RoundMetrics
from fedssl.seeding import derive_seed
from fedssl.training.optimizers import split_momentum
from fedssl.training.statistics import WHOLE

OnRound = Callable[[RoundMetrics], None]
OfClient = TypeVar("OfClient", ClientMetrics, Failure)
ProgressCallback = Callable[[Progress], None]


class Monitor(Protocol):
    """What measures the encoder at every evaluation, on the server."""

    def accuracy(self, encoder: Encoder, round_number: int) -> float:
        """Give the top-1 accuracy, 0 to 1."""


@dataclass(frozen=True)
class RoundSettings:
    """How rounds are run.

    Attributes:
        min_results: clients that must come back from a round.
        max_update_ratio: see `reject_outliers`.
        weighting: of the clients in averages.
        secure: how updates are masked; None leaves them open to the server.
        keep_checkpoints: so many of the newest stay.
        evaluate_every: rounds from one evaluation to the next; the last round has one, too.
        last_round: that a limit of privacy allows, or `num_rounds`.
        projection_size: numbers of a projection.
        recompute_statistics: whether clients measure BatchNorm's statistics anew after
            averaging, see fedssl/training/statistics.py.
        images: names the content of the images that are trained on, if the server
            has them.
    """

    seed: int
    num_rounds: int
    last_round: int
    min_results: int
    max_update_ratio: float
    keep_checkpoints: int
    evaluate_every: int = 1
    projection_size: int = 128
    recompute_statistics: bool = False
    weighting: Weighting = field(default_factory=Weighting)
    images: str | None = None
    secure: SecureSettings | None = None

    def evaluates(self, round_number: int) -> bool:
        """Tell whether a round ends with an evaluation."""
        return round_number % self.evaluate_every == 0 or round_number == self.last_round


class Federation:
    """The state of a run on the server: the global model, the strategy, the clients."""

    def __init__(
        self,
        nodes: Nodes,
        method: Method,
        strategy: Strategy,
        acts_on: ActsOn,
        settings: RoundSettings,
        run: RunDirectory,
        monitor: Monitor | None = None,
        checkpoint: Checkpoint | None = None,
        momentum: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start with a model and a strategy, or put both back to a checkpoint.

        Args:
            acts_on: see `arrays_for_strategy`.
            monitor: None leaves the kNN accuracy out.
            checkpoint: of the last round that was done.
            momentum: that clients begin the first round with, see `zero_momentum`.
        """
        self.nodes, self.method, self.strategy = nodes, method, strategy
        self.private = strategy if isinstance(strategy, PrivateMean) else None
        self.settings, self.run, self.monitor = settings, run, monitor
        self.momentum = dict(momentum or {})
        self.whole: dict[str, Tensor] = {}  # the encoder's statistics for whole images
        self.told: dict[int, Mapping[str, Tensor]] = {}  # moments of projections, the newest last
        self.parameters = arrays_for_strategy(method, "parameters")
        self.names = arrays_for_strategy(method, acts_on, list(self.momentum))
        self.done = 0
        self.sizes: dict[int, int] = {}  # images of each partition when it last trained
        for metrics in run.read_metrics():
            self._note_sizes(metrics)
        if checkpoint:
            load_state(self.method, checkpoint.state)
            try:
                load_strategy_state_dict(self.strategy, checkpoint.strategy)
            except ValueError as error:
                raise UserError(f"resume={run.path}: {error}; start a new run") from error
            self.momentum |= split_momentum(checkpoint.beside)[1]
            self.whole = whole_statistics(checkpoint.beside)
            self.told = unflatten(checkpoint.beside)
            self.done = checkpoint.round

    def train(self, on_round: OnRound, on_progress: ProgressCallback = no_op) -> str | None:
        """Run the rounds that are left; leave checkpoints and metrics.

        Args:
            on_round: called with the metrics of every finished round.
            on_progress: called as clients answer.

        Returns:
            Why it ended before the last round, if it did.

        Raises:
            RuntimeError: too few clients, or files can't be written.
        """
        try:
            with writing_to(self.run.path):
                for round_number in range(self.done + 1, self.settings.num_rounds + 1):
                    metrics = self._round(round_number, on_progress)
                    self._keep(metrics)
                    on_round(metrics)
        except PrivacyBudgetExhausted as ended:
            return str(ended)
        return None

    def _keep(self, metrics: RoundMetrics) -> None:
        """Write a round's checkpoint, then its metrics line."""
        try:
            strategy = strategy_state_dict(self.strategy)
        except TypeError as error:
            raise RuntimeError(f"round {metrics.round}: {error}") from error
        state, images = self.method.state_dict(), self.settings.images
        whole = {f"{WHOLE}{name}": value for name, value in self.whole.items()}
        beside = {**self.momentum, **whole, **flatten(self.told)}
        checkpoint = Checkpoint(metrics.round, state, strategy, metrics, images, beside)
        save_checkpoint(self.run.checkpoints, checkpoint, self.settings.keep_checkpoints)
        self.run.append_metrics(metrics)
        self.done = metrics.round

    def _round(self, round_number: int, on_progress: ProgressCallback) -> RoundMetrics:
        self.nodes.wait_for_clients()
        began = time.perf_counter()
        updates, failures = self._train(round_number, on_progress)
        trained = time.perf_counter()
        evaluates = self.settings.evaluates(round_number)
        if not evaluates:
            self.whole = {}  # those that there are belong to earlier weights
        evaluations, absent = self._evaluate(round_number, on_progress) if evaluates else ([], [])
        evaluated = time.perf_counter()
        monitor = self.monitor if evaluates else None
        knn = monitor.accuracy(self.encoder(), round_number) if monitor else None
        ended, bounded = time.perf_counter(), self.settings.weighting.bounds
        down, up = self.nodes.take_bytes()
        spent = self.private.privacy_spent() if self.private else None
        metrics = RoundMetrics(
            round=round_number,
            train_loss=weighted_mean(updates, "train-loss"),
            eval_loss=weighted_mean(evaluations, "eval-loss"),
            knn=knn,
            alignment=weighted_mean(evaluations, "alignment"),
            uniformity=weighted_mean(evaluations, "uniformity"),
            effective_rank=weighted_mean(evaluations, "effective-rank"),
            seconds=round(ended - began, 3),
            seconds_train=round(trained - began, 3),
            seconds_evaluate=round(evaluated - trained, 3),
            seconds_knn=round(ended - evaluated, 3),
            images_per_second=sum(u.metrics["images"] for u in updates) / (trained - began),
            bytes_moved=down + up,
            bytes_up=up,
            clients=tuple(map(self._named, client_metrics(updates, evaluations, bounded))),
            failures=tuple(map(self._named, failures + absent)),
            nodes=self.nodes.take_events(),
            epsilon=spent.epsilon if spent else None,
            delta=spent.delta if spent else None,
        )
        metrics = replace(metrics, warnings=tuple(find_warnings(metrics, self.sizes)))
        self._note_sizes(metrics)
        return metrics

    def _named(self, part: OfClient) -> OfClient:
        return replace(part, name=self.nodes.membership.names.get(part.partition))

    def _note_sizes(self, metrics: RoundMetrics) -> None:
        counts = {client.partition: client.num_examples for client in metrics.clients}
        self.sizes |= {partition: count for partition, count in counts.items() if count}

    def _train(
        self, round_number: int, on_progress: ProgressCallback
    ) -> tuple[list[Update], list[Failure]]:
        """Train the sampled clients; the global model becomes what their updates give."""
        if self.settings.secure:
            return self._train_masked(self.settings.secure, round_number, on_progress)
        updates, failures = self._ask(round_number, MessageType.TRAIN, on_progress)
        state = self._travels(MessageType.TRAIN)
        ratio = self.settings.max_update_ratio
        updates, far = reject_outliers(updates, state, self.parameters, ratio)
        failures += far
        if self.private:
            updates, unclipped = self.private.refuse(updates)
            failures += unclipped
        self._require(round_number, updates, failures)
        combined = aggregate(self.strategy, round_number, updates, state, self.names)
        self._take(combined)
        return updates, failures

    def _train_masked(
        self, secure: SecureSettings, round_number: int, on_progress: ProgressCallback
    ) -> tuple[list[Update], list[Failure]]:
        """Train the sampled clients, of whose updates nobody learns more than the mean."""
        messages = self._requests(round_number, MessageType.TRAIN)
        start = {name: value.cpu() for name, value in self._travels(MessageType.TRAIN).items()}
        on_replies = _tell(on_progress, MessageType.TRAIN, len(messages))
        weighting, run = self.settings.weighting, self.run.identity
        given = SecureRound(self.nodes, secure, weighting, round_number, run).collect(
            messages, start, on_replies
        )
        self._require(round_number, given.updates, given.failures)
        mean = as_update(given.mean, self.names, messages[0])
        combined = aggregate(self.strategy, round_number, [mean], start, self.names)
        self._take(combined)
        return given.updates, given.failures

    def _evaluate(
        self, round_number: int, on_progress: ProgressCallback
    ) -> tuple[list[Update], list[Failure]]:
        """Ask the sampled clients for their loss, after BatchNorm's statistics are renewed."""
        silent = self._renew_statistics(round_number)
        evaluations, absent = self._ask(round_number, MessageType.EVALUATE, on_progress)
        absent += self._hear_projections(evaluations)
        self.strategy.aggregate_evaluate(round_number, [each.message for each in evaluations])
        return evaluations, silent + absent

    def _take(self, combined: Mapping[str, Tensor]) -> None:
        """Let the global model and the momentum be what the strategy made of the updates."""
        shared, self.momentum = split_momentum(combined)
        load_state(self.method, {**self.method.state_dict(), **shared})

    def _ask(
        self, round_number: int, kind: str, on_progress: ProgressCallback
    ) -> tuple[list[Update], list[Failure]]:
        """Send the model to the sampled clients; give their updates and the failures."""
        messages = self._requests(round_number, kind)
        on_replies = _tell(on_progress, kind, len(messages))
        answers = self.nodes.send_and_receive(messages, on_replies)
        expected = self._travels(kind) if kind == MessageType.TRAIN else None
        names = self.names if kind == MessageType.TRAIN else None
        updates, failures = validate_replies(answers, self.nodes.partition_of, expected, names)
        updates, odd = reject_odd_metrics(updates)
        return self.settings.weighting.apply(updates), failures + odd

    def encoder(self) -> Encoder:
        """Give the encoder as it is used: with the statistics of whole images, if it has them."""
        if not self.whole:
            return self.method.encoder
        method = copy.deepcopy(self.method)
        load_state(method, {**method.state_dict(), **self.whole})
        return method.encoder

    def _renew_statistics(self, round_number: int) -> list[Failure]:
        """Ask those who will evaluate for BatchNorm's statistics: for views, and for whole images.

        Returns:
            The failures.
        """
        if not self.settings.recompute_statistics:
            return []
        messages = map(statistics_request, self._requests(round_number, MessageType.EVALUATE))
        answers = self.nodes.send_and_receive(messages)
        given = answers, self.nodes.partition_of, self.method, self.settings.weighting.weigh
        views, whole, failures = pool_statistics(*given)
        load_state(self.method, {**self.method.state_dict(), **views})
        self.whole = whole or self.whole
        return failures

    def _hear_projections(self, evaluations: Sequence[Update]) -> list[Failure]:
        """Keep what clients tell of their projections, where the method shares them."""
        failures = []
        for update in evaluations if self.method.shares_projections else ():
            try:
                told = read_projections(update.message.content, self.settings.projection_size)
                self.told.pop(update.partition, None)
                self.told = newest({**self.told, update.partition: told})
            except ValueError as error:
                failures.append(Failure(update.partition, str(error)))
        return failures

    def _requests(self, round_number: int, kind: str) -> list[Message]:
        """Make the messages to the clients that a round samples, always the same."""
        state = self._travels(kind)
        arrays, buffers = split_state(state, [name for name in self.names if name in state])
        request = ConfigRecord()
        random.seed(derive_seed(self.settings.seed, "sample", kind, round_number))
        configure = (
            self.strategy.configure_train
            if kind == MessageType.TRAIN
            else self.strategy.configure_evaluate
        )
        grid = cast(Grid, self.nodes)  # strategies ask it for nothing but node ids
        messages = list(configure(round_number, arrays, request, grid))
        more: dict[str, bytes | str] = {BUFFERS: pack_tensors(buffers), RUN: self.run.identity}
        if kind == MessageType.TRAIN and len(self.told) > 1:
            more[NEGATIVES] = draw_negatives(self.told, self.settings.seed, round_number)
        for message in messages:
            message.content.config_records[CONFIG].update(more)
        return messages

    def _require(
        self, round_number: int, updates: Sequence[Update], failures: Sequence[Failure]
    ) -> None:
        """Make sure that enough clients came back for an average."""
        needed = self.settings.min_results
        if len(updates) < needed:
            reasons = name_some([f"{f.who}: {f.reason}" for f in map(self._named, failures)])
            raise RuntimeError(
                f"round {round_number}: {len(updates)} of {len(updates) + len(failures)} clients "
                f"came back, min_results={needed} are needed{f' ({reasons})' if reasons else ''}"
                f"{self.nodes.membership.describe_refusals()}"
            )

    def _travels(self, kind: str) -> dict[str, Tensor]:
        """Give what a message carries: the model's state, and momentum to train on with."""
        momentum = self.momentum if kind == MessageType.TRAIN else {}
        return {**self.method.shared_state(), **momentum}


def _tell(on_progress: ProgressCallback, phase: str, asked: int) -> OnReplies:
    """Tell, as replies come in, how far the round is and how fast it goes."""
    began = time.perf_counter()

    def on_replies(replies: Collection[Message]) -> None:
        images = sum(count_images(reply) for reply in replies if reply.has_content())
        pace = images / (time.perf_counter() - began) if phase == MessageType.TRAIN else 0.0
        on_progress(Progress(phase, len(replies), asked, pace or None))

    return on_replies
