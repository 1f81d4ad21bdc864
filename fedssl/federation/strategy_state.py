"""What a strategy remembers from round to round."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg


def remember(strategy: FedAvg) -> dict[str, np.ndarray]:
    """Collect the arrays that a strategy keeps from round to round, such as moments.

    Returns:
        Arrays by "attribute|kind|position|name"; strategies rely on the order.
    """
    kept = {}
    for attribute, value in vars(strategy).items():
        if isinstance(value, ArrayRecord):
            kind, items = "record", [(name, array.numpy()) for name, array in value.items()]
        elif isinstance(value, dict):
            kind, items = "dict", list(value.items())
        elif isinstance(value, list):
            kind, items = "list", [("", item) for item in value]
        else:
            continue
        if all(isinstance(array, np.ndarray | np.generic) for _, array in items):
            for place, (name, array) in enumerate(items):
                kept[f"{attribute}|{kind}|{place:05d}|{name}"] = np.asarray(array)
    return kept


def restore(strategy: FedAvg, kept: Mapping[str, np.ndarray]) -> None:
    """Give a strategy back what `remember` collected from another of its kind."""
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key in sorted(kept):
        attribute, kind, place, name = key.split("|", 3)
        found.setdefault((attribute, kind), {})[name or place] = kept[key]
    for (attribute, kind), arrays in found.items():
        value: Any = arrays
        if kind == "record":
            value = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        elif kind == "list":
            value = list(arrays.values())
        setattr(strategy, attribute, value)
