"""From the command line to a checked configuration: the only reader of conf/."""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import product
from math import inf, isfinite
from pathlib import Path
from threading import Timer
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from errors import UserError
from terminal import paint

INTERRUPT_GRACE_S = 15.0
CONF = Path(__file__).resolve().parent / "conf"

# Hydra's own command line, https://hydra.cc/docs/advanced/hydra-command-line-flags, but for
# --run: to run is what happens anyway, and `--run DIR` is the run to evaluate
HYDRA_SWITCHES = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}
HYDRA_OPTIONS = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
SWITCHES = {"--quiet"}  # ours that need no value
INFORMATIVE = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"} | {
    *("--shell-completion", "-sc"),
}

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


def flags_to_overrides(arguments: Sequence[str]) -> list[str]:
    """Turn `--key=value` and `--key value` into Hydra overrides; keep Hydra's own flags.

    Raises:
        UserError: a flag without a value.
    """
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if argument in HYDRA_SWITCHES:
            result.append(argument)
        elif name in HYDRA_OPTIONS:
            result += [argument] if has_value or not rest else [argument, rest.pop(0)]
        elif argument.startswith("--"):
            if not has_value:
                value = _value_of(argument, rest)
            result.append(f"{name[2:].replace('-', '_')}={value}")
        else:
            result.append(argument)
    return result


def _value_of(flag: str, rest: list[str]) -> str:
    """Take a flag's value from the arguments behind it."""
    if flag in SWITCHES and (not rest or rest[0] not in ("true", "false")):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{flag} needs a value, as in {flag}=5")
    return rest.pop(0)


def is_informative(arguments: Iterable[str]) -> bool:
    """Tell whether Hydra shall only print something, such as its help."""
    return any(argument.partition("=")[0] in INFORMATIVE for argument in arguments)


def jobs_of(arguments: Sequence[str]) -> list[list[str]]:
    """List the overrides of every job that the arguments ask for, one without --multirun."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not {"--multirun", "-m"} & set(arguments):
        return [overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(f"not an override: {str(error).splitlines()[0]}") from error
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line]
        for item in parsed
    ]
    return [list(job) for job in product(*choices)]


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose conf/NAME.yaml with overrides and check every value.

    Raises:
        UserError: an unknown group, option or key (with the nearest known
            one), or a value of the wrong type or out of range.
    """
    with initialize_config_dir(str(CONF), version_base=None):
        defaults = _compose(name, [o for o in overrides if _is_group_choice(o)], overrides)
        config = _compose(name, overrides, overrides, known=defaults)
    known = flatten(defaults)
    for key, value in flatten(config).items():
        _check_value(key, value, known.get(key))
    size, side = (OmegaConf.select(config, k) for k in ("train.encode_size", "dataset.image_size"))
    if size and side and size > side:
        raise UserError(f"train.encode_size={size}: the images have {side} pixels; at most these")
    return config


def flatten(config: DictConfig) -> dict[str, Any]:
    """List the leaves of a configuration by their dotted keys; lists are leaves."""
    leaves: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            leaves[prefix] = node

    visit("", OmegaConf.to_container(config, resolve=True))
    return leaves


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known words for the end of a message, and the nearest if one is near."""
    known = list(known)
    every = f"known: {', '.join(known)}"
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? ({every})" if close else every


def _is_group_choice(override: str) -> bool:
    return (CONF / override.partition("=")[0]).is_dir()


def _compose(
    name: str, chosen: Sequence[str], given: Sequence[str], known: DictConfig | None = None
) -> DictConfig:
    try:
        config = compose(name, list(chosen))
        flatten(config)  # resolves every interpolation
        return config
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        hint = nearest(option, error.options or [])
        raise UserError(f"{group}={option}: unknown {group}; {hint}") from error
    except Exception as error:  # Hydra, its parser and OmegaConf raise a dozen unrelated types
        raise UserError(_explain(str(error), given, known)) from error


def _explain(message: str, given: Sequence[str], known: DictConfig | None) -> str:
    """Say in one line why Hydra refused an override."""
    unknown = re.search(r"Could not (?:override|find) '([^']+)'", message)
    if unknown and known is not None:
        key = unknown[1]
        groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
        keys = [*groups, *flatten(known)]
        close = get_close_matches(key, keys, n=1) or [k for k in keys if k.endswith(f".{key}")]
        hint = f"did you mean {close[0]}?" if close else "see --help for the known ones"
        return f"{key}: unknown key; {hint}"
    culprit = next((override for override in given if override in message), "")
    reason = message.strip().splitlines()[0] if message.strip() else "not understood"
    if "pars" in message or "mismatched input" in message:
        return (
            f"{culprit or ' '.join(given)}: not of the form key=value; quote odd characters, "
            "as in 'dataset.path=\"a=b\"'"
        )
    return reason if culprit in reason else f"{culprit}: {reason}"


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


def run_entry(
    name: str,
    check: Callable[[DictConfig], object],
    job: Callable[[DictConfig], None],
    complete: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    """Run a program: flags to overrides, every check of every job, then Hydra and the job.

    Args:
        name: of the configuration below conf/.
        check: raises UserError before any work starts.
        job: does the work; a UserError or RuntimeError ends it with one line.
        complete: adds overrides that the given ones imply.

    Exits with status 2 for what the user gave, 1 for what failed while running,
    130 when interrupted.
    """

    @functools.wraps(job)
    def guarded(config: DictConfig) -> None:
        with _one_line():
            job(config)

    earlier = signal.signal(signal.SIGINT, _interrupt)
    try:
        with _one_line():
            arguments = complete(flags_to_overrides(sys.argv[1:]))
            if is_informative(arguments):
                given = [a for a in arguments if "=" in a and not a.startswith("-")]
                load_config(name, [] if {"-sc", "--shell-completion"} & set(arguments) else given)
            else:
                for overrides in jobs_of(arguments):
                    check(load_config(name, overrides))
        sys.argv[1:] = arguments
        hydra.main(version_base=None, config_path=str(CONF), config_name=name)(guarded)()
    finally:
        signal.signal(signal.SIGINT, earlier)


def _interrupt(number: int, frame: object) -> None:
    """Interrupt the work, and end it by force if it does not give way."""
    forced = Timer(INTERRUPT_GRACE_S, _leave, ["interrupted"])
    forced.daemon = True
    forced.start()
    raise KeyboardInterrupt


def _leave(line: str) -> None:
    """End at once, without waiting for threads that wait for others."""
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


@contextmanager
def _one_line() -> Iterator[None]:
    """End the program with one line instead of a traceback."""
    try:
        yield
    except UserError as error:
        print(paint(f"error: {error}", "error", sys.stderr), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(paint(f"failed: {error}", "error", sys.stderr), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        _leave(f"interrupted{f': {error}' if str(error) else ''}")
