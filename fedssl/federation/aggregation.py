"""Flower's strategies: made from the configuration, given what they act on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import Strategy
from hydra.utils import instantiate
from torch import Tensor

from fedssl.errors import UserError
from fedssl.federation.guards import Update
from fedssl.federation.strategy_state import check_savable, inner_strategies
from fedssl.methods.base import Method

ActsOn = Literal["parameters", "floats"]


def build_strategy(spec: Mapping[str, Any]) -> Strategy:
    """Instantiate the strategy of the `strategy` section, and one that it wraps.

    It starts with whatever nodes there are; waiting for them is our own.

    Raises:
        UserError: arguments that the strategy refuses, or state that can't be saved.
    """
    arguments = {name: value for name, value in spec.items() if name != "acts_on"}
    try:
        strategy = instantiate(arguments, _convert_="all")  # lists, not OmegaConf's
    except Exception as error:  # Hydra wraps whatever the constructor raised
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"strategy: {spec['_target_']} refuses its arguments ({reason})") from error
    check_savable(strategy)
    for each in inner_strategies(strategy):
        for least in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if getattr(each, least, 0) > 0:  # 0 where the strategy asks nobody
                setattr(each, least, 1)
    return strategy


def fraction_train(strategy: Strategy) -> float:
    """Tell the share of the clients that a strategy asks to train, or the one that it wraps."""
    fractions = [getattr(each, "fraction_train", None) for each in inner_strategies(strategy)]
    return next((float(fraction) for fraction in fractions if fraction is not None), 1.0)


def arrays_for_strategy(method: Method, acts_on: ActsOn, momentum: Sequence[str] = ()) -> list[str]:
    """Name the arrays that a strategy acts on, in the order in which they travel.

    These are floats, or for server optimizers only parameters: an optimizer's
    step would push BatchNorm's running variance below zero; counters would
    swamp the distances of Krum and the norms of clipping.

    Args:
        momentum: names of the arrays of momentum, which are floats.
    """
    shared = method.shared_state()
    if acts_on == "parameters":
        return [name for name, _ in method.named_parameters() if name in shared]
    return [*(name for name, tensor in shared.items() if tensor.is_floating_point()), *momentum]


def aggregate(
    strategy: Strategy,
    round_number: int,
    updates: Sequence[Update],
    state: Mapping[str, Tensor],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Let the strategy combine the replies; average, by weight, what it does not act on.

    Args:
        state: of the global model.
        names: the arrays that the strategy acts on.

    Returns:
        The new state of the global model, with its dtypes.

    Raises:
        RuntimeError: the strategy gives no result.
    """
    weights = np.array([update.weight for update in updates], dtype=np.float64)
    weights /= weights.sum()
    result: dict[str, np.ndarray] = {}
    for name in state.keys() - set(names):
        stack = np.stack([update.state[name].numpy() for update in updates])
        result[name] = np.tensordot(weights, stack, axes=1)
    messages = [update.message for update in updates]
    try:
        arrays, _ = strategy.aggregate_train(round_number, messages)
    except AppExitException as error:  # such as a client without the mod that a wrapper needs
        name = type(strategy).__name__
        raise RuntimeError(f"round {round_number}: {name} gave up ({error})") from error
    if arrays is None:
        raise RuntimeError(
            f"round {round_number}: {type(strategy).__name__} makes nothing of {len(updates)} "
            "updates; choose another strategy or more clients"
        )
    result |= {name: array.numpy() for name, array in arrays.items()}
    return restore_dtypes(result, state)


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
