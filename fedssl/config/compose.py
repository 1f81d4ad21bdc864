"""Composing conf/ with overrides; the only reader of conf/."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from fedssl.config.checks import check_settings, flatten_mapping, unknown_key
from fedssl.config.fields import nearest
from fedssl.config.moved import modernize_overrides
from fedssl.env import ROOT
from fedssl.errors import UserError

CONF = ROOT / "conf"


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose conf/NAME.yaml with overrides and check every value.

    Old names of settings are understood, too.

    Raises:
        UserError: an unknown group, option or key (with the nearest known
            one), or a value of the wrong type or out of range.
    """
    given, _ = modernize_overrides(overrides)
    if name == "test":
        given = evaluation_overrides(given)
    with initialize_config_dir(str(CONF), version_base=None):
        config = _compose(name, given)
    check_settings(name, to_mapping(config))
    return config


def flatten(config: DictConfig) -> dict[str, Any]:
    """List the leaves of a configuration by their dotted keys; lists are leaves."""
    return flatten_mapping(to_mapping(config))


def to_mapping(config: DictConfig) -> dict[str, Any]:
    """Turn a configuration into dictionaries and lists, every interpolation resolved."""
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in values.items()}


def evaluation_overrides(overrides: Sequence[str]) -> list[str]:
    """Say in the words of conf/test.yaml which protocol and which images are meant.

    There the keys of the protocol stand at the top, and `dataset=` brings
    nothing but the images: the groups that it chooses are those of a training.

    Raises:
        UserError: a data set that can't be composed, or several at once.
    """
    images = [o for o in overrides if o.partition("=")[0].partition(".")[0] == "dataset"]
    kept = [
        f"eval@_global_{override.removeprefix('eval')}"
        if override.startswith("eval=")
        else override
        for override in overrides
        if override not in images
    ]
    if not any(override.startswith("dataset=") for override in images):
        return [*kept, *images]
    dataset = flatten_mapping(to_mapping(load_config("config", images))["dataset"])
    return [*kept, *(f"+dataset.{key}={quote(value)}" for key, value in dataset.items())]


def quote(value: Any) -> str:
    """Write a value as Hydra reads it in an override."""
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _is_group_choice(override: str) -> bool:
    return (CONF / override.partition("=")[0].partition("@")[0]).is_dir()


def _compose(name: str, given: Sequence[str]) -> DictConfig:
    try:
        config = compose(name, list(given))
        to_mapping(config)  # resolves every interpolation
        return config
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        hint = nearest(option, error.options or [])
        raise UserError(f"{group}={option}: unknown {group}; {hint}") from error
    except Exception as error:  # Hydra, its parser and OmegaConf raise a dozen unrelated types
        raise UserError(_explain(name, str(error), given)) from error


def _known(name: str, given: Sequence[str]) -> Mapping[str, Any]:
    """List what is known under the options that were chosen, as far as these are sound."""
    for chosen in ([o for o in given if _is_group_choice(o)], []):
        try:
            return flatten(compose(name, chosen))
        except Exception:
            continue
    return {}


def _explain(name: str, message: str, given: Sequence[str]) -> str:
    """Say in one line why Hydra refused an override."""
    unknown = re.search(r"Could not (?:override|find) '([^']+)'", message)
    if unknown:
        return unknown_key(unknown[1], _known(name, given))
    culprit = next((override for override in given if override in message), "")
    reason = message.strip().splitlines()[0] if message.strip() else "not understood"
    if any(word in message for word in ("pars", "mismatched input", "Lexer")):
        return (
            f"{culprit or ' '.join(given)}: not of the form key=value; quote odd characters, "
            "as in 'dataset.path=\"a=b\"'"
        )
    return reason if culprit in reason else f"{culprit}: {reason}"
