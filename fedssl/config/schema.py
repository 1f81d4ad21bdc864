"""What values the settings may have."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

from fedssl.errors import UserError

# Lowest and highest value; a third element True: the lowest itself is excluded.
POSITIVE = (0, inf, True)
PROBABILITY = (0, 1)
RANGES: dict[str, tuple] = {
    "num_clients": (1, inf),
    "num_rounds": (1, inf),
    "min_nodes": (1, inf),
    "node_wait_s": (0, inf),
    "round_timeout_s": POSITIVE,
    "min_results": (1, inf),
    "max_step_ratio": (1, inf),
    "num_cpus": (1, inf),
    "num_gpus": (0, inf),
    "seed": (0, 2**31 - 1),
    "held_out": (0, 0.5, True),
    "keep_checkpoints": (1, inf),
    "monitor.bank": (1, inf),
    "monitor.queries": (1, inf),
    "monitor.neighbors": (1, inf),
    "dataset.image_size": (4, 4096),
    "train.encode_size": (4, 4096),
    "dataset.test_fraction": (0, 0.9, True),
    "model.projection_hidden": (1, inf),
    "model.projection_size": (1, inf),
    "train.local_epochs": (1, inf),
    "train.batch_size": (2, inf),
    "train.max_steps": (0, inf),
    "train.learning_rate": POSITIVE,
    "train.momentum": (0, 0.9999),
    "train.muon_learning_rate": POSITIVE,
    "train.muon_momentum": (0, 0.9999),
    "train.weight_decay": (0, inf),
    "train.temperature": POSITIVE,
    "augment.flip": PROBABILITY,
    "augment.jitter": PROBABILITY,
    "augment.grayscale": PROBABILITY,
    "augment.blur": PROBABILITY,
    "augment.rotation": (0, 180),
    "augment.shear": (0, 2),
    "augment.brightness": (0, inf),
    "augment.contrast": (0, inf),
    "augment.saturation": (0, inf),
    "augment.hue": (0, 0.5),
    "partition.alpha": POSITIVE,
    "strategy.fraction_train": (0, 1, True),
    "strategy.fraction_evaluate": (0, 1, True),
    "label_fraction": (0, 1, True),
    "seeds": (1, inf),
    "epochs": (1, inf),
    "batch_size": (1, inf),
    "feature_batch_size": (1, inf),
    "learning_rate": POSITIVE,
    "encoder_learning_rate": POSITIVE,
    "weight_decay": (0, inf),
    "knn_neighbors": (1, inf),
    "supervised.epochs": (1, inf),
    "supervised.batch_size": (2, inf),
    "supervised.learning_rate": POSITIVE,
    "supervised.weight_decay": (0, inf),
    "map_images": (2, inf),
    "perplexity": (1, inf),
    "queries": (1, inf),
}
# Lists of any length: lowest and highest item.
WHOLE_NUMBERS: dict[str, tuple[int, float]] = {
    "participants": (0, inf),
    "train.view_sizes": (4, 4096),
}
# Lists of any length: shares of a whole, above 0.
SHARES = ("train.round_lengths",)
# Lists of any length: the items there are.
NAMES: dict[str, tuple[str, ...]] = {"model.deep_supervision": ("layer1", "layer2", "layer3")}
# Types of the values whose default is null.
NULLABLE: dict[str, tuple[type, ...]] = {
    "min_nodes": (int,),
    "max_step_ratio": (int, float),
    "resume": (str,),
    "ray_address": (str,),
    "num_cpus": (int,),
    "num_gpus": (int, float),
    "checkpoint": (str,),
    "path": (str,),
    "folder": (str,),
    "encoder": (str,),
    "neighbours": (str,),
    "learning_rate": (int, float),
    "weight_decay": (int, float),
    "dataset.name": (str,),
    "dataset.hub_name": (str,),
    "dataset.path": (str,),
    "dataset.test_fraction": (float,),
    "train.encode_size": (int,),
    "dataset.label_column": (str,),
    "dataset.test_split": (str,),
    "dataset.revision": (str,),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("auto", "float32", "bfloat16"),
    "dataset.source": ("digits", "hub", "imagefolder"),
    "partition.partition_by": ("label", "class_group"),
    "partition.class_assignment_mode": ("deterministic", "first-deterministic", "random"),
    "model.encoder": ("resnet18", "resnet50"),
    "model.stem": ("auto", "conv3x3_stride1", "conv3x3_stride2", "imagenet"),
    "train.optimizer": ("sgd", "muon"),
    "mode": ("linear", "finetune", "supervised"),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known words for the end of a message, and the nearest if one is near."""
    known = list(known)
    every = f"known: {', '.join(known)}"
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? ({every})" if close else every


def _check_value(key: str, value: Any, default: Any) -> None:
    # test.yaml and report.yaml have the keys of these groups at their top.
    short = key.removeprefix("eval.").removeprefix("figures.")
    if short in CHOICES:
        if value not in CHOICES[short]:
            raise UserError(f"{key}={value}: {nearest(str(value), CHOICES[short])}")
        return
    allowed = NULLABLE.get(key)
    if value is None and (allowed or default is None):
        return
    _check_type(key, value, allowed or _types_like(default))
    if isinstance(value, float) and not isfinite(value):
        raise UserError(f"{key}={value}: must be a finite number")
    if isinstance(value, list):
        if key in WHOLE_NUMBERS:
            _check_whole_numbers(key, value, *WHOLE_NUMBERS[key])
        elif key in SHARES:
            _check_shares(key, value)
        elif key in NAMES:
            _check_names(key, value, NAMES[key])
        else:
            _check_list(key, value, len(default))
    if short in RANGES:
        _check_range(key, value, *RANGES[short])


def _check_list(key: str, value: list[Any], length: int) -> None:
    """Check channel statistics and ranges: numbers, as many as shipped."""
    if len(value) != length or not all(
        type(item) in (int, float) and isfinite(item) for item in value
    ):
        raise UserError(f"{key}={value}: must be a list of {length} numbers")
    if length == 2 and not 0 < value[0] <= value[1]:
        raise UserError(f"{key}={value}: must rise from a number above 0")


def _check_whole_numbers(key: str, value: list[Any], low: int, high: float) -> None:
    if not all(type(item) is int and low <= item <= high for item in value):
        bound = f"{low} to {high}" if high < inf else f"from {low} on"
        raise UserError(f"{key}={value}: must be a list of whole numbers, {bound}")


def _check_shares(key: str, value: list[Any]) -> None:
    if not all(type(item) in (int, float) and 0 < item <= 1 for item in value):
        raise UserError(f"{key}={value}: must be a list of numbers above 0 and at most 1")


def _check_names(key: str, value: list[Any], known: tuple[str, ...]) -> None:
    for item in value:
        if item not in known:
            raise UserError(f"{key}={value}: no {item}; {nearest(str(item), known)}")


def _types_like(default: Any) -> tuple[type, ...]:
    if isinstance(default, float):
        return (int, float)
    return () if default is None else (type(default),)


def _check_type(key: str, value: Any, allowed: tuple[type, ...]) -> None:
    if not allowed or (
        isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)
    ):
        return
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    wanted = names.get(allowed[-1], "a list")
    raise UserError(f"{key}={value}: must be {wanted}")


def _check_range(
    key: str, value: float, low: float, high: float, low_excluded: bool = False
) -> None:
    if low <= value <= high and not (low_excluded and value == low):
        return
    bound = f"above {low}" if low_excluded else f"at least {low}"
    if high < inf:
        bound += f" and at most {high}"
    raise UserError(f"{key}={value}: must be {bound}")
