"""Flower's strategies: made from the configuration, given what they may combine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from hydra.utils import instantiate
from torch import Tensor

from fedssl.errors import UserError
from fedssl.federation.guards import ARRAYS, METRICS, Update, restore_dtypes
from model import SimCLR


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


def combinable(strategy: FedAvg, model: SimCLR, state: Mapping[str, Tensor]) -> ArrayRecord:
    """Keep of a state what the strategy may combine, in the model's order.

    These are floats, and for server optimizers only parameters: an optimizer's
    step would push BatchNorm's running variance below zero; counters would
    swamp the distances of Krum.
    """
    if isinstance(strategy, FedOpt | FedAvgM):
        names = [name for name, _ in model.named_parameters()]
    else:
        own = model.state_dict()
        names = [name for name, tensor in own.items() if tensor.is_floating_point()]
    return ArrayRecord({name: state[name] for name in names})  # strategies pair by position


def aggregate(
    strategy: FedAvg, round_number: int, updates: Sequence[Update], model: SimCLR
) -> dict[str, Tensor]:
    """Let the strategy combine the updates; average, by samples, what it does not handle.

    Returns:
        The new state of the global model, with its dtypes.

    Raises:
        RuntimeError: the strategy gives no result.
    """
    weights = np.array([update.num_examples for update in updates], dtype=np.float64)
    weights /= weights.sum()
    own = model.state_dict()
    result = {}
    for name in own.keys() - combinable(strategy, model, own).keys():
        stack = np.stack([update.state[name].numpy() for update in updates])
        result[name] = np.tensordot(weights, stack, axes=1)
    for update in updates:
        metrics = MetricRecord({"num-examples": update.num_examples})
        kept = combinable(strategy, model, update.state)
        update.message.content = RecordDict({ARRAYS: kept, METRICS: metrics})
    arrays, _ = strategy.aggregate_train(round_number, [update.message for update in updates])
    if arrays is None:
        raise RuntimeError(
            f"round {round_number}: {type(strategy).__name__} makes nothing of {len(updates)} "
            "updates; choose another strategy or more clients"
        )
    result |= {name: array.numpy() for name, array in arrays.items()}
    return restore_dtypes(result, own)
