"""Old names of settings: in overrides, and in the configuration of an older run."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from fedssl.config.fields import Instance, Section, defaults_of, layout_of
from fedssl.config.schema import GROUPS, MainSettings

RENAMED = {
    "max_step_ratio": "max_update_ratio",
    "train.view_sizes": "train.train_resolutions",
    "train.encode_size": "train.eval_resolution",
    "train.round_lengths": "train.round_fractions",
    "train.temperature": "method.temperature",
    "train.optimizer": "optimizer",
    "train.learning_rate": "optimizer.learning_rate",
    "train.momentum": "optimizer.momentum",
    "train.weight_decay": "optimizer.weight_decay",
    "train.muon_learning_rate": "optimizer.muon_learning_rate",
    "train.muon_momentum": "optimizer.muon_momentum",
    "dataset.source": "dataset",
    "mode": "eval",
    "eval.mode": "eval",
}
SOURCES = {
    "digits": "fedssl.data.sources.digits.DigitsSource",
    "hub": "fedssl.data.sources.hub.HubSource",
    "imagefolder": "fedssl.data.sources.folder.FolderSource",
}
PROTOCOLS = {
    "linear": "fedssl.evaluation.linear.LinearEvaluation",
    "finetune": "fedssl.evaluation.finetune.FineTuning",
    "supervised": "fedssl.evaluation.supervised.SupervisedTraining",
}
REPLACE = "fedssl.training.receiving.Replace"
OPTIONS = {  # of a group, where a data set had one of its own
    "augment": {"cifar10": "cifar", "cifar100": "cifar", "hub": "photos", "imagefolder": "photos"},
    "train": dict.fromkeys(("cifar10", "cifar100", "hub", "imagefolder"), "default"),
    "eval": dict.fromkeys(("default", "digits", "hub", "imagefolder"), "linear"),
}
SUPERVISED = "supervised."  # keys that counted with this protocol alone, there under other names
TUNING = "encoder_learning_rate"  # likewise
AT_SITES = "eval=federated"


def modernize_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite overrides that use old names.

    Args:
        overrides: as of the command line, Hydra's flags among them or not.

    Returns:
        The overrides under today's names, and a line for each that has moved.
    """
    overrides = _join_modes(overrides)
    chosen = _protocol(overrides)
    modern, notices = [], []
    for override in overrides:
        key, assigned, value = override.partition("=")
        sign = key[: len(key) - len(key.lstrip("+~"))]
        name = key.lstrip("+~")
        new = RENAMED.get(name, name)
        short = name.removeprefix("eval.")
        if short.startswith(SUPERVISED):
            new = name.replace(SUPERVISED, "") if chosen == "supervised" else ""
        elif short == TUNING and "finetune" not in chosen:
            new = ""
        value = OPTIONS.get(name, {}).get(value, value)
        now = f"{sign}{new}{assigned}{value}"
        if not new and name:
            notices.append(f"{name} counts with another protocol only and is left out")
            continue
        if new != name:
            notices.append(f"{name} is now {new}")
        elif now != override:
            notices.append(f"{override} is now {now}")
        modern.append(now)
        if name == "eval" and override.endswith(("=cifar10", "=cifar100")):
            modern[-1:] = ["eval=linear", "head=cifar"]
            notices.append(f"{override} is now head=cifar")
    return modern, list(dict.fromkeys(notices))


def _join_modes(overrides: Sequence[str]) -> list[str]:
    """Take `mode=finetune` beside `eval=federated` for the protocol that is both."""
    modes = {"mode=finetune", "eval.mode=finetune"} & set(overrides)
    if not modes or AT_SITES not in overrides:
        return list(overrides)
    kept = [override for override in overrides if override not in modes]
    return [f"{AT_SITES}_finetune" if override == AT_SITES else override for override in kept]


def _protocol(overrides: Sequence[str]) -> str:
    """Find out which protocol is chosen."""
    given = [override.partition("=") for override in overrides]
    names = ("mode", "eval.mode", "eval", "eval@_global_")
    return next((value for key, _, value in reversed(given) if key in names), "linear")


def modernize(config: DictConfig) -> DictConfig:
    """Turn the configuration of a run, of whatever age, into today's structure and keys.

    What a run did not know yet gets the default.

    Raises:
        ValueError: a section is missing or is none.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    old = {str(key): value for key, value in values.items()}
    for group in GROUPS:
        if not isinstance(old.setdefault(group, {}), dict):
            raise ValueError(f"{group} is no section")
    train, evaluation = old["train"], old["eval"]
    network = _complete("model", old["model"])
    sections = {
        "dataset": _dataset(old["dataset"]),
        "method": old["method"] or _method(train, network),
        "model": network,
        "train": _train(train),
        "optimizer": old["optimizer"] or _optimizer(train),
        "strategy": _strategy(old["strategy"]),
        "receive": old["receive"] or {"_target_": REPLACE},
        "privacy": old["privacy"] or {"mechanism": "none"},
        "head": old["head"] or _only(GROUPS["head"].models[""], evaluation),
    }
    sections["eval"] = _evaluation(evaluation, _complete("head", sections["head"]))
    top = defaults_of(MainSettings)
    top["run_dir"] = top["output_dir"]  # where it was is not known any more, and plays no part
    inner = {name: top[name] | old.get(name, {}) for name in ("monitor", "secagg")}
    renamed = {RENAMED.get(key, key): value for key, value in old.items()}
    whole = {group: _complete(group, sections.get(group, old[group])) for group in GROUPS}
    return OmegaConf.create(top | renamed | whole | inner)


def _complete(group: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Put the defaults below what a section has, in the order of today."""
    layout = layout_of(GROUPS[group].model_of(section) or Section)
    known = {key: section.get(key, value) for key, value in layout.items()}
    return {key: value for key, value in known.items() if value != MISSING} | dict(section)


def _only(model: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Take from some values those that a section has."""
    return {key: value for key, value in values.items() if key in model.model_fields}


def _dataset(old: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key != "source"}
    target = old.get("_target_", SOURCES.get(old.get("source", ""), ""))
    return {"_target_": target} | kept


def _train(old: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {RENAMED.get(f"train.{key}", f"train.{key}"): value for key, value in old.items()}
    inside = {key.partition(".")[2]: v for key, v in renamed.items() if key.startswith("train.")}
    return inside


def _optimizer(train: Mapping[str, Any]) -> dict[str, Any]:
    name = train.get("optimizer", "sgd")  # before there was a choice
    model = GROUPS["optimizer"].model_of({"name": name}) or Section
    return {"name": name} | _only(model, train)


def _method(train: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    shape = {key: network[key] for key in network if key not in ("encoder", "stem", "norm")}
    target = {"_target_": "model.SimCLR"}
    temperature = {key: train[key] for key in ("temperature",) if key in train}
    return target | temperature | shape


def _evaluation(old: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    if "_target_" in old:
        return dict(old)
    mode = old.get("mode", "linear")
    target = PROTOCOLS.get(mode, mode)
    model = GROUPS["eval"].model_of({"_target_": target}) or Instance
    inner = old.get("supervised", {}) if mode == "supervised" else {}
    return {"_target_": target} | dict(head) | _only(model, {**old, **inner})


def _strategy(old: Mapping[str, Any]) -> dict[str, Any]:
    target = old.get("_target_", "flwr.serverapp.strategy.FedAvg")
    optimizers = ("FedAdam", "FedAvgM")  # whose steps would spoil BatchNorm's statistics
    acts_on = "parameters" if target.endswith(optimizers) else "floats"
    return {"_target_": target, "acts_on": acts_on} | dict(old)
