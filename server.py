"""The server: rounds of a Flower strategy, guards, checkpoints, the kNN per round."""

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter

from errors import UserError
from model import build_model, extract_features, knn_accuracy, load_state, model_arrays
from rundir import RunDirectory
from utils import ImageSet, choose_device, choose_dtype, derive_seed

ARRAYS, METRICS = "arrays", "metrics"
OnRound = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Update:
    """A client's usable reply to a training or an evaluation message."""

    partition: int
    num_examples: int
    metrics: Mapping[str, float]
    message: Message


class OrderedGrid:
    """A grid whose node ids come in the order of their partitions.

    Node ids are random in every run; strategies sample from this order
    instead, so that the seed alone decides which partitions take part.
    """

    def __init__(self, grid: Grid, partition_of: Mapping[int, int]) -> None:
        self._grid, self._partition_of = grid, partition_of

    def get_node_ids(self) -> list[int]:
        """List the connected nodes by partition."""
        return sorted(self._grid.get_node_ids(), key=lambda node: self._partition_of[node])


def make_strategy(spec: Mapping[str, Any], num_clients: int) -> FedAvg:
    """Instantiate the strategy of the `strategy` section.

    Raises:
        UserError: arguments that the strategy refuses.
    """
    try:
        return instantiate(
            spec, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=num_clients
        )
    except Exception as error:  # Hydra wraps whatever the constructor raised
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"strategy: {spec['_target_']} refuses its arguments ({reason})") from error


class Federation:
    """The state of a run on the server: the global model, the strategy, the clients."""

    def __init__(
        self,
        grid: Grid,
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
        self.grid, self.config, self.run, self.on_round = grid, config, run, on_round
        self.image_set = image_set
        self.device = choose_device()
        self.model = build_model(config.model, config.dataset, config.seed, self.device)
        self.strategy = make_strategy(config.strategy, config.num_clients)
        self.events = SummaryWriter(str(run.path))
        self.partition_of: dict[int, int] = {}

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
        began = time.perf_counter()
        sent = model_arrays(self.model)
        moved = record_bytes(sent)
        updates, failures = self._ask(round_number, MessageType.TRAIN, sent)
        self._aggregate(round_number, sent, updates)
        trained = time.perf_counter()
        asked = model_arrays(self.model)
        evaluations, eval_failures = self._ask(round_number, MessageType.EVALUATE, asked)
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
            "bytes_moved": moved * (2 * len(updates) + len(evaluations)),
            "clients": client_rows(updates, evaluations),
            "failures": failures + eval_failures,
        }

    def _ask(
        self, round_number: int, kind: str, arrays: ArrayRecord
    ) -> tuple[list[Update], list[dict[str, Any]]]:
        """Send the model to the sampled clients; sort the replies by partition."""
        settings = ConfigRecord({"num-rounds": self.config.num_rounds})
        grid = self._ordered_grid()
        random.seed(derive_seed(self.config.seed, "sample", kind, round_number))
        if kind == MessageType.TRAIN:
            trainable = self._for_strategy(arrays)
            messages = self.strategy.configure_train(round_number, trainable, settings, grid)
        else:
            messages = self.strategy.configure_evaluate(round_number, arrays, settings, grid)
        messages = list(messages)
        for message in messages:
            message.content[ARRAYS] = arrays  # the whole model, whatever the strategy handles
        replies = self.grid.send_and_receive(messages)
        updates, failures = sort_replies(replies, arrays if kind == MessageType.TRAIN else None)
        if not updates:
            reasons = "; ".join(f"client {f['partition']}: {f['reason']}" for f in failures)
            raise RuntimeError(f"round {round_number}: no client could {kind} ({reasons})")
        return updates, failures

    def _ordered_grid(self) -> Grid | OrderedGrid:
        """Learn who holds which partition, where only some of the clients are sampled."""
        strategy = self.strategy
        if strategy.fraction_train == strategy.fraction_evaluate == 1:
            return self.grid
        while len(nodes := list(self.grid.get_node_ids())) < strategy.min_available_nodes:
            time.sleep(0.1)
        unknown = [node for node in nodes if node not in self.partition_of]
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
        for reply in self.grid.send_and_receive(messages) if messages else ():
            if reply.has_error():
                raise RuntimeError(f"a client can't start: {reply.error.reason}")
            partition = int(reply.content[METRICS]["partition-id"])
            self.partition_of[reply.metadata.src_node_id] = partition
        return OrderedGrid(self.grid, self.partition_of)

    def _for_strategy(self, arrays: ArrayRecord) -> ArrayRecord:
        """Keep what the strategy may combine: floats, and for server optimizers parameters.

        An optimizer's step would push BatchNorm's running variance below zero;
        counters would swamp the distances of Krum.
        """
        if isinstance(self.strategy, FedOpt | FedAvgM):
            names = {name for name, _ in self.model.named_parameters()}
        else:
            names = {
                n for n, tensor in self.model.state_dict().items() if tensor.is_floating_point()
            }
        return ArrayRecord({name: array for name, array in arrays.items() if name in names})

    def _aggregate(self, round_number: int, sent: ArrayRecord, updates: list[Update]) -> None:
        """Load the strategy's result, and the average of what it does not handle."""
        weights = np.array([update.num_examples for update in updates], dtype=np.float64)
        weights /= weights.sum()
        combined = self._for_strategy(sent)
        rest = [name for name in sent if name not in combined]
        result = {}
        for name in rest:
            stack = [update.message.content[ARRAYS][name].numpy() for update in updates]
            result[name] = np.tensordot(weights, np.stack(stack), axes=1)
        for update in updates:
            content = update.message.content
            kept = ArrayRecord({name: content[ARRAYS][name] for name in combined})
            metrics = MetricRecord({"num-examples": update.num_examples})
            update.message.content = RecordDict({ARRAYS: kept, METRICS: metrics})
        arrays, _ = self.strategy.aggregate_train(round_number, [u.message for u in updates])
        result |= {name: array.numpy() for name, array in (arrays or {}).items()}
        load_state(self.model, restore_dtypes(result, self.model.state_dict()))

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


def sort_replies(
    replies: Iterable[Message], expected: ArrayRecord | None
) -> tuple[list[Update], list[dict[str, Any]]]:
    """Separate usable replies, in the order of their partitions, from failures.

    Args:
        expected: for training replies, arrays with the names and shapes that an
            update must have; its values must be finite.
    """
    updates, failures = [], []
    for reply in replies:
        if reply.has_error():
            failures.append(explain_error(reply.error.reason))
            continue
        metrics = reply.content[METRICS]
        update = Update(int(metrics["partition-id"]), int(metrics["num-examples"]), metrics, reply)
        defect = None if expected is None else find_defect(reply.content[ARRAYS], expected)
        if defect or update.num_examples < 1:
            reason = defect or f"num-examples is {update.num_examples}"
            failures.append({"partition": update.partition, "reason": reason})
        else:
            updates.append(update)
    return sorted(updates, key=lambda update: update.partition), failures


def find_defect(arrays: ArrayRecord, expected: ArrayRecord) -> str | None:
    """Say what is wrong with an update: names, shapes or values that are not finite."""
    if arrays.keys() != expected.keys():
        odd = sorted(set(arrays) ^ set(expected))
        return f"array {odd[0]!r} is missing or unknown"
    for name, array in arrays.items():
        if tuple(array.shape) != tuple(expected[name].shape):
            return f"array {name!r} has shape {tuple(array.shape)}"
        if not np.isfinite(array.numpy()).all():
            return f"array {name!r} is not finite"
    return None


def explain_error(reason: str | None) -> dict[str, Any]:
    """Read an error reply: Flower's "<class '...'>:<'message'>" around the client's own line."""
    text = (reason or "no reason given").strip()
    if ":<'" in text:
        text = text.partition(":<'")[2].removesuffix("'>")
    line = text.splitlines()[0]
    named = re.match(r"partition (\d+): (.*)", line)
    partition = int(named[1]) if named else None
    return {"partition": partition, "reason": named[2] if named else line}


def restore_dtypes(
    arrays: Mapping[str, np.ndarray], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give averages the dtypes of the model's state; counters are rounded."""
    result = {}
    for name, value in arrays.items():
        dtype = state[name].dtype
        value = value if dtype.is_floating_point else np.rint(value)
        result[name] = torch.as_tensor(value).to(dtype)
    return result


def record_bytes(arrays: ArrayRecord) -> int:
    """Count the bytes of all arrays."""
    return sum(len(array.data) for array in arrays.values())


def weighted_mean(updates: list[Update], key: str) -> float:
    """Average a metric over clients, weighted by their samples."""
    weights = [update.num_examples for update in updates]
    return float(np.average([update.metrics[key] for update in updates], weights=weights))


def client_rows(updates: list[Update], evaluations: list[Update]) -> list[dict[str, Any]]:
    """List each client's losses and pace for the metrics line."""
    rows: dict[int, dict[str, Any]] = {}
    for update in updates:
        rows[update.partition] = {
            "partition": update.partition,
            "num_examples": update.num_examples,
            "train_loss": update.metrics["train-loss"],
            "images_per_second": update.metrics["images-per-second"],
        }
    for update in evaluations:
        row = rows.setdefault(update.partition, {"partition": update.partition})
        row["eval_loss"] = update.metrics["eval-loss"]
    return [rows[partition] for partition in sorted(rows)]
