"""What clients send back: checked before it may touch the global model."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedssl.errors import printable
from fedssl.federation.messages import ARRAYS, MAX_REASON, METRICS, read_state
from fedssl.federation.nodes import Answer
from fedssl.runs.metrics import ClientMetrics, Failure
from fedssl.training.optimizers import MOMENTUM

REPRESENTATION = ("alignment", "uniformity", "effective-rank")
TRAINED = ("num-examples", "train-loss", "images", "images-per-second")
EXTRA = ("unreadable-images", "cores", "numbers-cut")  # whole numbers that clients may tell
EVALUATED = ("num-examples", "eval-loss", *REPRESENTATION)
Read = TypeVar("Read")
MAX_EXAMPLES = 2**40  # more images than any client holds
MAX_COUNT = 2**40  # of batches, and whatever else a model counts


@dataclass(frozen=True)
class Update:
    """A client's usable reply.

    Attributes:
        num_examples: images that it says it trained or evaluated on.
        weight: of it in averages, see `Weighting`.
        state: of its model; empty where an evaluation was asked for.
        update_norm: Euclidean length of the way from the global parameters to its own.
        cosine: between its update and the sum of the others' updates.
    """

    partition: int
    num_examples: int
    metrics: Mapping[str, float]
    state: Mapping[str, Tensor]
    message: Message
    weight: int
    update_norm: float = 0.0
    cosine: float | None = None


def validate_replies(
    answers: Iterable[Answer],
    partition_of: Mapping[int, int],
    expected: Mapping[str, Tensor] | None,
    names: Sequence[str] | None = None,
) -> tuple[list[Update], list[Failure]]:
    """Separate usable replies from failures, both in the order of the answers.

    Args:
        expected: for training replies, the global model's state: an update must
            have its names, shapes and dtypes, and finite values.
        names: the arrays that the strategy acts on; an update must have them in this
            order, by which some strategies go. None leaves that out.

    Returns:
        The updates and the failures.
    """

    def read(partition: int, reply: Message) -> Update:
        return read_update(partition, reply, expected, names)

    return read_replies(answers, partition_of, read)


def read_replies(
    answers: Iterable[Answer],
    partition_of: Mapping[int, int],
    read: Callable[[int, Message], Read],
) -> tuple[list[Read], list[Failure]]:
    """Read what came back; whoever gave nothing, or what can't be read, is a failure.

    Args:
        read: takes a partition and its reply; raises ValueError for an odd one.
    """
    found: list[Read] = []
    failures: list[Failure] = []
    for answer in answers:
        partition = partition_of[answer.node]
        try:
            if answer.reply is None:
                raise ValueError(answer.failure)
            found.append(read(partition, answer.reply))
        except ValueError as error:
            reason = str(error).removeprefix(f"partition {partition}: ")
            failures.append(Failure(partition, printable(reason)[:MAX_REASON]))
    return found, failures


def read_update(
    partition: int,
    reply: Message,
    expected: Mapping[str, Tensor] | None,
    names: Sequence[str] | None = None,
) -> Update:
    """Read a reply and check it.

    Args: as of `validate_replies`.

    Raises:
        ValueError: what is wrong with it.
    """
    wanted = EVALUATED if expected is None else TRAINED
    metrics = read_metrics(reply.content, wanted)
    num_examples = check_num_examples(metrics["num-examples"])
    state: Mapping[str, Tensor] = {}
    if expected is not None:
        state = read_state(reply.content)
        check_state(state, expected)
        if names is not None and list(reply.content[ARRAYS]) != list(names):
            raise ValueError("its arrays are not those of the request, in their order")
    metrics |= take_extra(reply.content)
    _check_records(reply.content, training=expected is not None)
    return Update(partition, num_examples, metrics, state, reply, weight=num_examples)


def check_num_examples(count: float) -> int:
    """Take a client's number of images for what it is.

    Raises:
        ValueError: no number of images.
    """
    if count != int(count) or not 1 <= count <= MAX_EXAMPLES:
        raise ValueError(f"num-examples is {count:g}")
    return int(count)


def take_extra(content: RecordDict) -> dict[str, float]:
    """Take out of the metrics what only some clients tell, which strategies can't average.

    Raises:
        ValueError: no whole numbers.
    """
    record = content.metric_records[METRICS]
    told = read_metrics(content, [name for name in EXTRA if name in record])
    for name, value in told.items():
        if value != int(value) or not 0 <= value <= MAX_EXAMPLES:
            raise ValueError(f"{name} is {value:g}")
        del record[name]
    return told


def _check_records(content: RecordDict, training: bool) -> None:
    """Make sure that a strategy finds one record of each kind, and only numbers to average."""
    count = len(content.metric_records)
    if count != 1:
        raise ValueError(f"the reply holds {count} records of metrics instead of one")
    count = len(content.array_records)
    if training and count != 1:
        raise ValueError(f"the reply holds {count} records of arrays instead of one")
    read_metrics(content, sorted(content.metric_records[METRICS]))


def reject_odd_metrics(updates: Sequence[Update]) -> tuple[list[Update], list[Failure]]:
    """Leave out updates whose metrics have other names than those of most.

    Strategies average all metrics, and end the run where one lacks a name. Of equally
    many, those of the first client count.

    Returns:
        The updates and the failures.
    """
    given = [frozenset(update.message.content.metric_records[METRICS]) for update in updates]
    kept: list[Update] = []
    failures: list[Failure] = []
    usual = Counter(given).most_common(1)[0][0] if given else frozenset()
    for update, names in zip(updates, given, strict=True):
        if names == usual:
            kept.append(update)
            continue
        odd = min(names ^ usual)
        lack = "have" if odd in names else "lack"
        failures.append(
            Failure(
                update.partition,
                f"its metrics {lack} {printable(odd)[:MAX_REASON]}, unlike those of most clients",
            )
        )
    return kept, failures


def read_metrics(content: RecordDict, wanted: Sequence[str]) -> dict[str, float]:
    """Read metrics that must be there and be finite numbers."""
    metrics = content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        raise ValueError("the reply holds no metrics")
    found = {}
    for name in wanted:
        value = metrics.get(name)
        if not isinstance(value, int | float):
            raise ValueError(f"{name} is {'missing' if value is None else 'no number'}")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        found[name] = float(value)
    return found


def count_images(reply: Message) -> float:
    """Count the images that a client says it trained on; 0 where the reply does not tell."""
    try:
        return read_metrics(reply.content, ("images",))["images"]
    except ValueError:
        return 0.0


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
        if not tensor.is_floating_point() and ((tensor < 0) | (tensor > MAX_COUNT)).any():
            raise ValueError(f"array {name!r} holds counts that can't be")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"array {name!r} holds negative variances")


def reject_outliers(
    updates: Sequence[Update], state: Mapping[str, Tensor], names: Sequence[str], max_ratio: float
) -> tuple[list[Update], list[Failure]]:
    """Leave out updates that lie absurdly far from the global model.

    The norm of an update is the Euclidean length of its way from the global
    parameters. It may be at most `max_ratio` times the norm of the parameters
    themselves and, among three updates or more, `max_ratio` times the median;
    the latter holds for BatchNorm's statistics and for momentum, too.

    Args:
        state: of the global model.
        names: of its parameters.
        max_ratio: 0 accepts any norm.

    Returns:
        The updates, each with its norm and the cosine of the angle between it
        and the sum of the others, and the failures.
    """
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "statistics": {}, "momentum": {}}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            other = "momentum" if name.startswith(MOMENTUM) else "statistics"
            groups["weights" if name in names else other][name] = tensor.cpu()
    moved = {what: _measure_norms(updates, arrays) for what, arrays in groups.items()}
    norms, limit = moved["weights"]
    own = math.hypot(*(float(tensor.norm()) for tensor in groups["weights"].values()))
    moved["weights"] = norms, min(limit, own)
    kept: list[Update] = []
    failures: list[Failure] = []
    for place, update in enumerate(updates):
        for what, (lengths, usual) in moved.items():
            if max_ratio and lengths[place] > max_ratio * usual:
                told = f"{lengths[place]:.3g}, over {max_ratio:g} times {usual:.3g}"
                failures.append(Failure(update.partition, f"its {what} moved by {told}"))
                break
        else:
            kept.append(replace(update, update_norm=norms[place]))
    cosines = _compare_directions(kept, groups["weights"])
    measured = zip(kept, cosines, strict=True)
    return [replace(update, cosine=cosine) for update, cosine in measured], failures


def _measure_norms(
    updates: Sequence[Update], start: Mapping[str, Tensor]
) -> tuple[list[float], float]:
    """Give the norms of all updates, and their median, infinite of fewer than three."""
    lengths = [
        math.hypot(*(float((update.state[name] - start[name]).norm()) for name in start))
        for update in updates
    ]
    return lengths, float(np.median(lengths)) if len(lengths) > 2 else math.inf


def _compare_directions(
    updates: Sequence[Update], start: Mapping[str, Tensor]
) -> list[float | None]:
    """Give the cosine between each update and the sum of the others; None where one is nothing."""
    onto_sum = np.zeros(len(updates))  # products of each update with the sum of all
    sum_squared = 0.0
    for name, tensor in start.items():
        ways = [(update.state[name] - tensor).flatten() for update in updates]
        total = sum(ways, torch.zeros(tensor.numel()))
        onto_sum += [float(way @ total) for way in ways]
        sum_squared += float(total @ total)
    cosines: list[float | None] = []
    for update, product in zip(updates, onto_sum, strict=True):
        squared = update.update_norm**2
        others = math.sqrt(max(0.0, sum_squared - 2 * product + squared))
        scale = update.update_norm * others
        cosines.append((product - squared) / scale if scale > 0 else None)
    return cosines


def weighted_mean(updates: Sequence[Update], key: str) -> float | None:
    """Average a metric over clients, by their weights; None without clients."""
    if not updates:
        return None
    weights = [update.weight for update in updates]
    return float(np.average([update.metrics[key] for update in updates], weights=weights))


def client_metrics(
    updates: Sequence[Update], evaluations: Sequence[Update], bounded: Callable[[Update], bool]
) -> tuple[ClientMetrics, ...]:
    """List each client's losses and pace, by partition.

    Args:
        bounded: tells whether an update counts for less than its images.
    """
    found = {
        update.partition: ClientMetrics(
            partition=update.partition,
            num_examples=update.num_examples,
            train_loss=update.metrics["train-loss"],
            update_norm=update.update_norm if update.state else None,
            cosine=update.cosine,
            images=int(update.metrics["images"]),
            images_per_second=update.metrics["images-per-second"],
            unreadable_images=_whole(update.metrics.get("unreadable-images")),
            cores=_whole(update.metrics.get("cores")),
            weight=update.weight if bounded(update) else None,
            numbers_cut=_whole(update.metrics.get("numbers-cut")),
        )
        for update in updates
    }
    for update in evaluations:
        client = found.get(update.partition, ClientMetrics(update.partition))
        found[update.partition] = replace(
            client, eval_loss=update.metrics["eval-loss"], num_held_out=update.num_examples
        )
    return tuple(found[partition] for partition in sorted(found))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
