"""BatchNorm's statistics of a round, pooled from what the clients measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedssl.federation.guards import check_num_examples, read_metrics, read_replies
from fedssl.federation.messages import read_tensors
from fedssl.federation.nodes import Answer
from fedssl.methods.base import Method, shared_norm_layers
from fedssl.runs.metrics import Failure
from fedssl.training.statistics import (
    MEAN,
    SQUARE,
    VIEWS,
    WHOLE,
    Moments,
    pool_moments,
)

ACTION = "statistics"
STATISTICS = f"query.{ACTION}"  # type of the message that asks for them
ROUNDING = 1e-3  # share of the mean square by which it may lie below the mean's square


def whole_statistics(beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder's statistics for whole images out of the arrays of a checkpoint."""
    return {n.removeprefix(WHOLE): value for n, value in beside.items() if n.startswith(WHOLE)}


def statistics_request(request: Message) -> Message:
    """Make of a message of evaluation one that asks for moments instead."""
    return Message(request.content, request.metadata.dst_node_id, STATISTICS)


def pool_statistics(
    answers: Iterable[Answer],
    partition_of: Mapping[int, int],
    method: Method,
    weigh: Callable[[Sequence[int]], Sequence[int]],
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Failure]]:
    """Check what clients answered and pool it.

    Args:
        weigh: gives the weights of clients with so many images.

    Returns:
        Arrays of the method's state for views and, of its encoder alone, for whole images,
        both empty where nobody gave any; and the failures.
    """
    told, odd = read_replies(
        answers, partition_of, lambda partition, reply: read_moments(reply.content, method)
    )
    failures = [replace(each, reason=f"statistics: {each.reason}") for each in odd]
    weights = weigh([images for _, images in told])
    pooled = pool_moments([moments for moments, _ in told], weights) if told else {}
    views, whole = (
        {name.removeprefix(kind): value for name, value in pooled.items() if name.startswith(kind)}
        for kind in (VIEWS, WHOLE)
    )
    return views, whole, failures


def read_moments(content: RecordDict, method: Method) -> tuple[Moments, int]:
    """Read a client's moments and its number of images.

    Raises:
        ValueError: what is wrong with them.
    """
    images = check_num_examples(read_metrics(content, ["num-examples"])["num-examples"])
    moments = read_tensors(content, "moments")
    check_moments(moments, expected_moments(method))
    return moments, images


def expected_moments(method: Method) -> dict[str, int]:
    """Give the channels of each array that a client tells."""
    layers = shared_norm_layers(method)
    names = [f"{VIEWS}{name}" for name in layers]
    names += [f"{WHOLE}{name}" for name in layers if name.startswith("encoder.")]
    return {
        f"{name}{kind}": layers[name.partition(".")[2]].num_features
        for name in names
        for kind in (MEAN, SQUARE)
    }


def check_moments(moments: Moments, expected: Mapping[str, int]) -> None:
    """Compare moments with the layers of the model.

    Raises:
        ValueError: names or shapes differ, values are not finite, or no numbers have these.
    """
    if odd := sorted(moments.keys() ^ expected.keys()):
        raise ValueError(f"array {odd[0]!r} is {'missing' if odd[0] in expected else 'unknown'}")
    for name, value in moments.items():
        if value.shape != (expected[name],) or value.dtype != torch.float32:
            raise ValueError(f"array {name!r} is {value.dtype} {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"array {name!r} is not finite")
    for name in [name for name in moments if name.endswith(SQUARE)]:
        mean = moments[f"{name.removesuffix(SQUARE)}{MEAN}"].double()
        square = moments[name].double()
        if (mean.square() > square + ROUNDING * square.abs() + ROUNDING**2).any():
            raise ValueError(f"array {name!r} is less than the square of the mean")
