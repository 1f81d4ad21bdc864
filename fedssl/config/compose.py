"""Composing conf/ with overrides; the only reader of conf/."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from fedssl.config.schema import _check_value, nearest
from fedssl.env import ROOT
from fedssl.errors import UserError

CONF = ROOT / "conf"


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
