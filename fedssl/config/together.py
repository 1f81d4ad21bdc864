"""Settings that each are right, and do not suit each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedssl.config.checks import flatten_mapping
from fedssl.config.schema import MainSettings
from fedssl.errors import SettingError

# What would travel, or decide about another client, without noise: a key, what it must be, and why.
PRIVATE_ONLY = (
    ("model.norm", "group", "BatchNorm's statistics would travel without noise"),
    ("optimizer.momentum_start", "zero", "momentum would travel without noise"),
    ("method.shared_negatives", 0, "projections' moments would travel without noise"),
    ("strategy.acts_on", "parameters", "all else would be averaged without noise"),
    ("weighting", "equal", "a client with more images would count for more"),
    ("max_update_ratio", None, "it lets one client decide about another"),
)
# What needs single updates, or lets something of them past the masks.
SECURE_ONLY = (
    ("privacy.mechanism", "none", "noise is added to updates that the server sees"),
    ("train.statistics", "averaged", "recomputed ones would travel without a mask"),
    ("method.shared_negatives", 0, "projections' moments would travel without a mask"),
    ("wire", "float32", "masks need every bit of the sum"),
)
SUMS = ("FedAvg", "FedProx", "FedAvgM", "FedAdam")  # which need no more than the mean
AVERAGES = ("FedAvg", "FedProx")  # whose mean Flower's accountant knows


def check_together(settings: Mapping[str, Any]) -> None:
    """Make sure that the settings of a run suit each other.

    Raises:
        UserError: the first pair that does not.
    """
    _check_resolution(settings)
    _check_negatives(settings)
    _check_norm(settings)
    _check_evaluations(settings)
    _check_privacy(settings)
    _check_secure(settings)


def _check_resolution(settings: Mapping[str, Any]) -> None:
    size, side = settings["train"]["eval_resolution"], settings["dataset"]["image_size"]
    if size and size > side:
        raise SettingError(
            f"train.eval_resolution={size}: the images have {side} pixels; at most these"
        )


def _check_negatives(settings: Mapping[str, Any]) -> None:
    """Make sure that negatives of other clients lie where a client's own projections do."""
    shared = settings["method"].get("shared_negatives", 0)
    train = settings["train"]
    if shared and (train["statistics"] == "averaged" or train["global_statistics_from"] == 1):
        raise SettingError(
            f"method.shared_negatives={shared:g}: needs one normalization for all clients; add "
            "train.statistics=recomputed train.global_statistics_from=0.03, or another share of "
            "the run"
        )


def _check_norm(settings: Mapping[str, Any]) -> None:
    if settings["model"]["norm"] == "group" and settings["train"]["statistics"] == "recomputed":
        raise SettingError(
            "train.statistics=recomputed: model.norm=group has no statistics; give "
            "train.statistics=averaged"
        )


def _check_evaluations(settings: Mapping[str, Any]) -> None:
    """Make sure that training by the statistics of all clients finds those of the round before."""
    every, train = settings["evaluate_every"], settings["train"]
    needed = train["statistics"] == "recomputed" and train["global_statistics_from"] < 1
    if every > 1 and needed:
        raise SettingError(
            f"evaluate_every={every}: train.global_statistics_from="
            f"{train['global_statistics_from']:g} trains with what an evaluation measures; give "
            "evaluate_every=1"
        )


def _check_privacy(settings: Mapping[str, Any]) -> None:
    """Make sure that nothing of a client goes past the noise.

    Raises:
        UserError: the first that would.
    """
    privacy = settings["privacy"]
    chosen = f"privacy={privacy['mechanism']}"
    if privacy["mechanism"] == "none":
        return
    _require(settings, PRIVATE_ONLY, chosen)
    if privacy.get("clipping") == "client" and settings["wire"] != "float32":
        raise SettingError(
            f"wire={settings['wire']}: privacy.clipping=client needs wire=float32; what rounding "
            "adds to an update would not be clipped"
        )
    strategy = settings["strategy"]["_target_"].rpartition(".")[2]
    if strategy not in AVERAGES:
        raise SettingError(
            f"strategy={strategy.lower()}: {chosen} needs {' or '.join(AVERAGES).lower()}, whose "
            "mean the accountant of epsilon knows"
        )
    if privacy["delta"] >= 1 / settings["num_clients"]:
        raise SettingError(
            f"privacy.delta={privacy['delta']:g}: must be below 1 / num_clients, "
            f"{1 / settings['num_clients']:g}; at that, giving away a client outright is allowed"
        )


def _check_secure(settings: Mapping[str, Any]) -> None:
    """Make sure that nothing needs what masks hide.

    Raises:
        UserError: the first that does.
    """
    chosen = "secure_aggregation=true"
    if not settings["secure_aggregation"]:
        return
    _require(settings, SECURE_ONLY, chosen)
    unasked = MainSettings.model_fields["max_update_ratio"].default
    if settings["max_update_ratio"] not in (None, unasked):
        raise SettingError(
            f"max_update_ratio={settings['max_update_ratio']}: {chosen} hides single updates; give "
            "secagg.max_ratio, to which clients clip their own"
        )
    strategy = settings["strategy"]["_target_"].rpartition(".")[2]
    if strategy not in SUMS:
        raise SettingError(
            f"strategy={strategy.lower()}: needs single updates, which {chosen} hides; give "
            f"{' or '.join(SUMS).lower()}"
        )


def _require(
    settings: Mapping[str, Any], rules: Sequence[tuple[str, Any, str]], chosen: str
) -> None:
    """Make sure that keys have the values that a choice needs."""
    leaves = flatten_mapping(settings)
    for key, needed, reason in rules:
        if key in leaves and leaves[key] != needed:
            needs = "null" if needed is None else needed
            raise SettingError(f"{key}={leaves[key]}: {chosen} needs {key}={needs}; {reason}")
