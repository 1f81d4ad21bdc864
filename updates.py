"""What clients send back: checked before it may touch the global model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from nodes import Answer
from wire import unpack_state

ARRAYS, METRICS = "arrays", "metrics"


@dataclass(frozen=True)
class Update:
    """A client's usable reply; the state is empty where an evaluation was asked for."""

    partition: int
    num_examples: int
    metrics: Mapping[str, float]
    state: Mapping[str, Tensor]
    message: Message


def check_answers(
    answers: Iterable[Answer],
    partition_of: Mapping[int, int],
    expected: Mapping[str, Tensor] | None,
) -> tuple[list[Update], list[dict[str, Any]]]:
    """Separate usable replies from failures, both in the order of the answers.

    Args:
        expected: for training replies, the global model's state: an update must
            have its names, shapes and dtypes, and finite values.

    Returns:
        The updates, and for each failure its partition and the reason.
    """
    updates, failures = [], []
    for answer in answers:
        partition = partition_of[answer.node]
        try:
            if answer.reply is None:
                raise ValueError(answer.failure)
            updates.append(read_update(partition, answer.reply, expected))
        except ValueError as error:
            reason = str(error).removeprefix(f"partition {partition}: ")
            failures.append({"partition": partition, "reason": reason})
    return updates, failures


def read_update(partition: int, reply: Message, expected: Mapping[str, Tensor] | None) -> Update:
    """Read a reply and check it.

    Raises:
        ValueError: what is wrong with it.
    """
    metrics = reply.content[METRICS]
    num_examples = int(metrics["num-examples"])
    if num_examples < 1:
        raise ValueError(f"num-examples is {num_examples}")
    state: Mapping[str, Tensor] = {}
    if expected is not None:
        state = unpack_state(reply.content[ARRAYS])
        check_state(state, expected)
    return Update(partition, num_examples, metrics, state, reply)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare an update with the global model.

    Raises:
        ValueError: names, shapes or dtypes differ, or values are not finite.
    """
    odd = sorted(state.keys() ^ expected.keys())
    if odd:
        raise ValueError(f"array {odd[0]!r} is {'missing' if odd[0] in expected else 'unknown'}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"array {name!r} has shape {tuple(tensor.shape)}")
        if tensor.dtype != expected[name].dtype:
            raise ValueError(f"array {name!r} has dtype {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"array {name!r} is not finite")


def restore_dtypes(
    arrays: Mapping[str, np.ndarray], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give averages the dtypes of the model's state; counters are rounded."""
    result = {}
    for name, value in arrays.items():
        dtype = state[name].dtype
        value = value if dtype.is_floating_point else np.rint(value)
        result[name] = torch.as_tensor(value).to(dtype)
    return result


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
            "images": int(update.metrics["images"]),
            "images_per_second": update.metrics["images-per-second"],
        }
    for update in evaluations:
        row = rows.setdefault(update.partition, {"partition": update.partition})
        row["eval_loss"] = update.metrics["eval-loss"]
    return [rows[partition] for partition in sorted(rows)]
