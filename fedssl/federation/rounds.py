"""The server: rounds of a Flower strategy, checkpoints, the kNN per round."""

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType
from omegaconf import DictConfig

from fedssl.compute import choose_device, choose_dtype
from fedssl.data.cache import name_some
from fedssl.data.image_set import ImageSet
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.knn import knn_accuracy
from fedssl.federation.aggregation import aggregate, combinable, make_strategy
from fedssl.federation.guards import (
    ARRAYS,
    HEALTH,
    Update,
    check_answers,
    check_steps,
    client_metrics,
    count_images,
    weighted_mean,
)
from fedssl.federation.messages import pack_state
from fedssl.federation.monitoring import find_warnings
from fedssl.federation.nodes import Heard, Nodes, ignore
from fedssl.federation.strategy_state import remember, restore
from fedssl.networks.state import load_state
from fedssl.reporting.tensorboard import TensorboardWriter
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import Failure, Progress, RoundMetrics
from fedssl.seeding import derive_seed
from fedssl.training.schedule import encode_size
from utils import build_model

OnRound = Callable[[RoundMetrics], None]
OnAnswer = Callable[[Progress], None]


class Federation:
    """The state of a run on the server: the global model, the strategy, the clients."""

    def __init__(
        self,
        nodes: Nodes,
        config: DictConfig,
        run: RunDirectory,
        image_set: ImageSet | None,
        on_round: OnRound,
        checkpoint: Checkpoint | None = None,
        on_answer: OnAnswer = ignore,
    ) -> None:
        """Build the global model and the strategy, or put them back to a checkpoint.

        Args:
            image_set: for the kNN accuracy per round; None, or a set without
                labels, leaves it out.
            on_round: called with the metrics of every finished round.
            checkpoint: of the last round that was done.
            on_answer: called with the progress of a round as clients answer.
        """
        self.nodes, self.config, self.run = nodes, config, run
        self.on_round, self.on_answer = on_round, on_answer
        self.image_set = image_set
        self.images = image_set.content if image_set else None
        self.device = choose_device()
        self.model = build_model(config.model, config.dataset, config.seed, self.device)
        self.strategy = make_strategy(config.strategy)
        self.done = 0
        if checkpoint:
            load_state(self.model, checkpoint.state)
            restore(self.strategy, checkpoint.server)
            self.done = checkpoint.round

    def train(self) -> None:
        """Run the rounds that are left; leave checkpoints, metrics, events and the encoder.

        Raises:
            RuntimeError: too few clients, or files can't be written.
        """
        try:
            with TensorboardWriter(self.run.path, purge_step=self.done + 1) as events:
                for round_number in range(self.done + 1, self.config.num_rounds + 1):
                    metrics = self._round(round_number)
                    self._keep(metrics)
                    events.write(metrics)
                    self.on_round(metrics)
            size = self._encode_size(self.config.num_rounds)
            dataset = {**self.config.dataset, "image_size": size}
            self.run.save_encoder(self.model, dataset, self.done)
        except OSError as error:
            raise RuntimeError(f"can't write to {self.run.path}: {error.strerror}") from error

    def _keep(self, metrics: RoundMetrics) -> None:
        """Write a round's checkpoint, then its metrics line."""
        state, memory = self.model.state_dict(), remember(self.strategy)
        checkpoint = Checkpoint(metrics.round, state, memory, metrics, self.images)
        save_checkpoint(self.run.checkpoints, checkpoint, self.config.keep_checkpoints)
        self.run.append_metrics(metrics)
        self.done = metrics.round

    def _round(self, round_number: int) -> RoundMetrics:
        self.nodes.gather()
        began = time.perf_counter()
        updates, failures = self._ask(round_number, MessageType.TRAIN)
        updates, far = self._check_steps(updates)
        failures += far
        self._require(round_number, updates, failures)
        state = aggregate(self.strategy, round_number, updates, self.model)
        load_state(self.model, state)
        trained = time.perf_counter()
        evaluations, eval_failures = self._ask(round_number, MessageType.EVALUATE)
        evaluated = time.perf_counter()
        knn = self._knn(round_number)
        ended = time.perf_counter()
        metrics = RoundMetrics(
            round=round_number,
            train_loss=weighted_mean(updates, "train-loss"),
            eval_loss=weighted_mean(evaluations, "eval-loss"),
            knn=knn,
            **{name.replace("-", "_"): weighted_mean(evaluations, name) for name in HEALTH},
            seconds=round(ended - began, 3),
            seconds_train=round(trained - began, 3),
            seconds_evaluate=round(evaluated - trained, 3),
            seconds_knn=round(ended - evaluated, 3),
            images_per_second=sum(u.metrics["images"] for u in updates) / (trained - began),
            bytes_moved=self._model_bytes() * (2 * len(updates) + len(evaluations)),
            clients=client_metrics(updates, evaluations),
            failures=tuple(Failure(**failure) for failure in failures + eval_failures),
        )
        return replace(metrics, warnings=tuple(find_warnings(metrics)))

    def _ask(self, round_number: int, kind: str) -> tuple[list[Update], list[dict[str, Any]]]:
        """Send the model to the sampled clients; give their updates and the failures."""
        state = self.model.state_dict()
        settings = ConfigRecord({"num-rounds": self.config.num_rounds})
        random.seed(derive_seed(self.config.seed, "sample", kind, round_number))
        configure = (
            self.strategy.configure_train
            if kind == MessageType.TRAIN
            else self.strategy.configure_evaluate
        )
        arrays = combinable(self.strategy, self.model, state)
        messages = list(configure(round_number, arrays, settings, self.nodes))
        packed = pack_state(state)
        for message in messages:
            message.content[ARRAYS] = packed  # the whole model, whatever the strategy handles
        expected = state if kind == MessageType.TRAIN else None
        answers = self.nodes.ask(messages, self._watch(kind, len(messages)))
        return check_answers(answers, self.nodes.partition_of, expected)

    def _watch(self, phase: str, asked: int) -> Heard:
        """Tell, as replies come in, how far the round is and how fast it goes."""
        began = time.perf_counter()

        def heard(replies: Collection[Message]) -> None:
            images = sum(count_images(r) for r in replies if r.has_content())
            pace = images / (time.perf_counter() - began) if phase == MessageType.TRAIN else 0.0
            self.on_answer(Progress(phase, len(replies), asked, pace or None))

        return heard

    def _check_steps(self, updates: list[Update]) -> tuple[list[Update], list[dict[str, Any]]]:
        names = [name for name, _ in self.model.named_parameters()]
        state = self.model.state_dict()
        return check_steps(updates, state, names, self.config.max_step_ratio or 0)

    def _require(
        self, round_number: int, updates: Sequence[Update], failures: Sequence[Mapping[str, Any]]
    ) -> None:
        """Make sure that enough clients came back for an average."""
        needed = self.config.min_results
        if len(updates) < needed:
            reasons = name_some([f"client {f['partition']}: {f['reason']}" for f in failures])
            raise RuntimeError(
                f"round {round_number}: {len(updates)} of {len(updates) + len(failures)} clients "
                f"came back, min_results={needed} are needed ({reasons})"
            )

    def _model_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def _encode_size(self, round_number: int) -> int:
        config = self.config
        image_size, num_rounds = config.dataset.image_size, config.num_rounds
        return encode_size(config.train, image_size, round_number, num_rounds)

    def _knn(self, round_number: int) -> float | None:
        """Classify some training images by others with the frozen encoder."""
        if self.image_set is None or self.image_set.train.labels is None:
            return None
        limits, images = self.config.monitor, self.image_set.train
        order = np.random.default_rng(derive_seed(self.config.seed, "monitor")).permutation(
            len(images.pixels)
        )
        queries = order[: min(limits.queries, len(order) // 2)]
        bank = order[len(queries) : len(queries) + limits.bank]
        dtype = choose_dtype(self.config.precision, self.device)
        size = self._encode_size(round_number)
        features, query_features = (
            extract_features(self.model, images.pixels[rows], self.device, dtype, 256, size)
            for rows in (bank, queries)
        )
        return knn_accuracy(
            features, images.labels[bank], query_features, images.labels[queries], limits.neighbors
        )
