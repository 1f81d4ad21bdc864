"""Composing conf/ with overrides; the only reader of conf/.

Settings are data: an override chooses a file below conf/ or sets a known key. The class
that a section builds comes from a file alone, never from an override.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from fedssl.config.checks import (
    check_federation,
    check_settings,
    check_simulation,
    flatten_mapping,
    unknown_key,
)
from fedssl.config.fields import nearest
from fedssl.config.moved import modernize_overrides
from fedssl.config.schema import GROUPS, PROGRAMS
from fedssl.config.together import check_together
from fedssl.env import ROOT
from fedssl.errors import SettingError, UserError

CONF = ROOT / "conf"
PATHS = ("dataset.path", "path", "folder", "run", "out", "output_dir", "run_dir", "cache_dir")
TEXTS = {
    f"{prefix}{name}"
    for prefix, models in {
        "": [program.settings for program in PROGRAMS.values()],
        "dataset.": GROUPS["dataset"].models.values(),
    }.items()
    for model in models
    for name, field in model.model_fields.items()
    if field.annotation in (str, str | None)
}
# What Hydra's `instantiate` reads, https://hydra.cc/docs/advanced/instantiate_objects/overview
SPECIAL = re.compile(r"(?<!\w)_(?:target|partial|args|recursive|convert)_(?!\w)")
OPTION = re.compile(r"(?:[\w-][\w.-]*(?:/[\w-][\w.-]*)*)?")  # a file below a group's folder
REFERENCE = re.compile(r"\$\{[\w.]+\}")  # to another setting
RESOLVED = re.compile(r"\$\{(?:now|hydra|oc\.env):[^{}]*\}")  # which gives a text


def load_config(name: str, overrides: Sequence[str], federated: bool = False) -> DictConfig:
    """Compose conf/NAME.yaml with overrides and check every value.

    Old names of settings are understood, too.

    Args:
        federated: the overrides are somebody else's, who started the run.

    Raises:
        UserError: an unknown group, option or key (with the nearest known one), a
            value of the wrong type or out of range, or as `check_overrides`.
    """
    given, _ = modernize_overrides(overrides)
    given = quote_texts(given)
    check_overrides(given, federated)
    if name == "test":
        given = evaluation_overrides(given)
    with initialize_config_dir(str(CONF), version_base=None):
        config = take_paths_as_text(_compose(name, given))
    check_settings(name, to_mapping(config))
    if name == "config":
        check_together(to_mapping(config))
        (check_federation if federated else check_simulation)(to_mapping(config))
    return config


def quote_texts(overrides: Sequence[str]) -> list[str]:
    """Quote what YAML takes for a number or a truth value where a setting is text.

    So that `dataset.path=1e5`, `=007` and `=1_000` are folders of just these names.
    """

    def write(override: str) -> str:
        key, _, value = override.partition("=")
        if key.lstrip("+") not in TEXTS:
            return override
        with suppress(HydraException):
            parsed = OverridesParser.create().parse_override(override)
            if not parsed.is_sweep_override() and type(parsed.value()) in (int, float, bool):
                return f"{key}={quote(value)}"
        return override

    return [write(override) for override in overrides]


def take_paths_as_text(config: DictConfig) -> DictConfig:
    """Make the name of a folder text that YAML takes for a number, as of `2021`."""
    for key in PATHS:
        value = OmegaConf.select(config, key)
        if type(value) is int:
            OmegaConf.update(config, key, str(value))
    return config


def check_overrides(overrides: Sequence[str], federated: bool = False) -> None:
    """Make sure that overrides choose files below conf/ and set keys, and nothing else.

    Args:
        federated: refuse Hydra's own settings and whatever is looked up where the
            override is read, such as environment variables.

    Raises:
        UserError: the first that does something else.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if not federated and key in ("hydra.run.dir", "hydra.sweep.dir"):
            raise SettingError(f"{override}: choose the place with run_dir=DIR or output_dir=DIR")
        if not key.strip():
            raise SettingError(f"{override}: no key; write key=value")
        group = re.split(r"[.@]", key)[0]
        if special := SPECIAL.search(override):
            choice = f"{group if group in GROUPS else 'GROUP'}=NAME"
            raise SettingError(
                f"{override}: {special[0]} comes from a file below conf/; choose one with {choice}"
            )
        if "@" in key:
            raise SettingError(
                f"{override}: a group's place is in conf/; choose one with {group}=NAME"
            )
        options = [option.strip(" '\"") for option in value.strip(" []").split(",")]
        if ("/" in key or _is_group_choice(override)) and not all(map(OPTION.fullmatch, options)):
            raise SettingError(f"{override}: must be the name of a file below conf/{group}")
        looked_up = REFERENCE.sub("", override)
        looked_up = looked_up if federated else RESOLVED.sub("", looked_up)
        if "${" in looked_up:
            raise SettingError(f"{override}: ${{...}} may name a setting, nothing else")
        if federated and (re.split(r"[./]", key)[0] == "hydra" or key.startswith("-")):
            raise SettingError(f"{override}: is Hydra's own, and none of the run's settings")


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
    group = override.partition("=")[0].partition("@")[0].lstrip("+~")
    return bool(group) and "\0" not in group and (CONF / group).is_dir()


def _compose(name: str, given: Sequence[str]) -> DictConfig:
    try:
        config = compose(name, list(given))
        to_mapping(config)  # resolves every interpolation
        return config
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        hint = nearest(option, error.options or [])
        raise SettingError(f"{group}={option}: unknown {group}; {hint}") from error
    except Exception as error:  # Hydra, its parser and OmegaConf raise a dozen unrelated types
        raise _explain(name, str(error), given) from error


def _fails_so(name: str, override: str, message: str) -> bool:
    """Tell whether an override alone brings about an error."""
    try:
        to_mapping(compose(name, [override]))
    except Exception as error:
        return str(error) == message
    return False


def _known(name: str, given: Sequence[str]) -> Mapping[str, Any]:
    """List what is known under the options that were chosen, as far as these are sound."""
    for chosen in ([o for o in given if _is_group_choice(o)], []):
        try:
            return flatten(compose(name, chosen))
        except Exception:
            continue
    return {}


def parse_overrides(given: Sequence[str]) -> list[Override]:
    """Parse overrides as Hydra does.

    Raises:
        UserError: the first that is none.
    """
    parser, parsed = OverridesParser.create(), []
    for override in given:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            raise SettingError(
                f"{override}: not of the form key=value; quote odd characters, as in "
                "'dataset.path=\"a=b\"'"
            ) from error
    return parsed


def _explain(name: str, message: str, given: Sequence[str]) -> UserError:
    """Say in one line why Hydra refused an override; its own words may hold paths."""
    unknown = re.search(r"Could not (?:override|find) '([^']+)'", message)
    if unknown:
        return SettingError(unknown_key(unknown[1], _known(name, given)))
    try:
        for override, parsed in zip(given, parse_overrides(given), strict=True):
            if parsed.is_sweep_override():
                return SettingError(
                    f"{override}: several values; several runs need --multirun, a list is written "
                    "key=[a,b], a text with a comma \"key='a,b'\""
                )
    except UserError as error:
        return error
    culprit = next((o for o in given if o in message or _fails_so(name, o, message)), "")
    reason = message.strip().splitlines()[0] if message.strip() else "not understood"
    line = reason if culprit in reason else f"{culprit}: {reason}"
    return UserError(line, public=f"{culprit or 'the settings'}: not understood")
