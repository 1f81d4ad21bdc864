"""The server: rounds of a Flower strategy, checkpoints, the kNN per round."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from errors import UserError
from features import extract_features, knn_accuracy
from model import build_model, load_state
from nodes import Nodes
from rundir import RunDirectory
from updates import Update, check_answers, client_rows, restore_dtypes, weighted_mean
from utils import ImageSet, choose_device, choose_dtype, derive_seed
from wire import pack_state

ARRAYS, METRICS = "arrays", "metrics"
OnRound = Callable[[Mapping[str, Any]], None]


def make_strategy(spec: Mapping[str, Any]) -> FedAvg:
    """Instantiate the strategy of the `strategy` section.

    It starts with whatever nodes there are; waiting for them is our own.

    Raises:
        UserError: arguments that the strategy refuses.
    """
    try:
        return instantiate(spec, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    except Exception as error:  # Hydra wraps whatever the constructor raised
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"strategy: {spec['_target_']} refuses its arguments ({reason})") from error


class Federation:
    """The state of a run on the server: the global model, the strategy, the clients."""

    def __init__(
        self,
        nodes: Nodes,
        config: DictConfig,
        run: RunDirectory,
        image_set: ImageSet | None,
        on_round: OnRound,
    ) -> None:
        """Build the global model and the strategy.

        Args:
            image_set: for the kNN accuracy per round; None, or a set without
                labels, leaves it out.
            on_round: called with the metrics line of every finished round.
        """
        self.nodes, self.config, self.run, self.on_round = nodes, config, run, on_round
        self.image_set = image_set
        self.device = choose_device()
        self.model = build_model(config.model, config.dataset, config.seed, self.device)
        self.strategy = make_strategy(config.strategy)
        self.events = SummaryWriter(str(run.path))

    def train(self) -> None:
        """Run all rounds; leave checkpoints, metrics, events and the encoder."""
        for round_number in range(1, self.config.num_rounds + 1):
            row = self._round(round_number)
            state = self.model.state_dict()
            self.run.save_checkpoint(round_number, state, self.config.keep_checkpoints)
            self.run.append_metrics(row)
            for name in ("train_loss", "eval_loss", "knn"):
                if row[name] is not None:
                    self.events.add_scalar(name, row[name], round_number)
            self.on_round(row)
        self.events.close()
        facts = {
            "architecture": self.model.architecture,
            "stem": self.model.stem,
            "image_size": str(self.config.dataset.image_size),
            "mean": str(list(self.config.dataset.mean)),
            "std": str(list(self.config.dataset.std)),
        }
        self.run.save_encoder(self.model.encoder.state_dict(), facts)

    def _round(self, round_number: int) -> dict[str, Any]:
        self.nodes.gather()
        began = time.perf_counter()
        updates, failures = self._ask(round_number, MessageType.TRAIN)
        self._aggregate(round_number, updates)
        trained = time.perf_counter()
        evaluations, eval_failures = self._ask(round_number, MessageType.EVALUATE)
        evaluated = time.perf_counter()
        knn = self._knn()
        ended = time.perf_counter()
        return {
            "round": round_number,
            "train_loss": weighted_mean(updates, "train-loss"),
            "eval_loss": weighted_mean(evaluations, "eval-loss"),
            "knn": knn,
            "seconds": round(ended - began, 3),
            "seconds_train": round(trained - began, 3),
            "seconds_evaluate": round(evaluated - trained, 3),
            "seconds_knn": round(ended - evaluated, 3),
            "images_per_second": sum(u.metrics["images"] for u in updates) / (trained - began),
            "bytes_moved": self._model_bytes() * (2 * len(updates) + len(evaluations)),
            "clients": client_rows(updates, evaluations),
            "failures": failures + eval_failures,
        }

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
        messages = list(configure(round_number, self._for_strategy(state), settings, self.nodes))
        packed = pack_state(state)
        for message in messages:
            message.content[ARRAYS] = packed  # the whole model, whatever the strategy handles
        expected = state if kind == MessageType.TRAIN else None
        updates, failures = check_answers(
            self.nodes.ask(messages), self.nodes.partition_of, expected
        )
        if not updates:
            reasons = "; ".join(f"client {f['partition']}: {f['reason']}" for f in failures)
            raise RuntimeError(f"round {round_number}: no client could {kind} ({reasons})")
        return updates, failures

    def _model_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def _for_strategy(self, state: Mapping[str, Tensor]) -> ArrayRecord:
        """Keep what the strategy may combine: floats, and for server optimizers parameters.

        An optimizer's step would push BatchNorm's running variance below zero;
        counters would swamp the distances of Krum.
        """
        if isinstance(self.strategy, FedOpt | FedAvgM):
            names = [name for name, _ in self.model.named_parameters()]
        else:
            own = self.model.state_dict()
            names = [name for name, tensor in own.items() if tensor.is_floating_point()]
        return ArrayRecord({name: state[name] for name in names})  # strategies pair by position

    def _aggregate(self, round_number: int, updates: list[Update]) -> None:
        """Load the strategy's result, and the average of what it does not handle."""
        weights = np.array([update.num_examples for update in updates], dtype=np.float64)
        weights /= weights.sum()
        own = self.model.state_dict()
        combined = self._for_strategy(own)
        result = {}
        for name in own.keys() - combined.keys():
            stack = np.stack([update.state[name].numpy() for update in updates])
            result[name] = np.tensordot(weights, stack, axes=1)
        for update in updates:
            metrics = MetricRecord({"num-examples": update.num_examples})
            kept = self._for_strategy(update.state)
            update.message.content = RecordDict({ARRAYS: kept, METRICS: metrics})
        arrays, _ = self.strategy.aggregate_train(round_number, [u.message for u in updates])
        result |= {name: array.numpy() for name, array in (arrays or {}).items()}
        load_state(self.model, restore_dtypes(result, own))

    def _knn(self) -> float | None:
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
        features, query_features = (
            extract_features(self.model, images.pixels[rows], self.device, dtype, 256)
            for rows in (bank, queries)
        )
        return knn_accuracy(
            features, images.labels[bank], query_features, images.labels[queries], limits.neighbors
        )
