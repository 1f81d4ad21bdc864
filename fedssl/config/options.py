"""Options of a group that have no schema of their own: their yaml file tells keys and types."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, create_model

from fedssl.config.fields import Section
from fedssl.config.schema import GROUPS
from fedssl.env import ROOT

CONF = ROOT / "conf"


@lru_cache
def model_of_option(group: str, target: str) -> type[Section] | None:
    """Make a schema from the file of conf/GROUP that names a class as its `_target_`.

    A file that starts from `/schema/X` or from another option has its keys, too.

    Returns:
        None if no file names the class.
    """
    for file in sorted((CONF / group).glob("*.yaml")):
        content = _read(file)
        section = content[group] if _is_global(file) else content
        if section.get("_target_") == target:
            return _model(group, section, _base(group, content), f"see conf/{group}/{file.name}")
    return None


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text()) or {}


def _is_global(file: Path) -> bool:
    """Tell whether a file holds other sections than its own, too."""
    return "# @package _global_" in file.read_text()


def _base(group: str, content: Mapping[str, Any]) -> type[Section]:
    """Find what a file starts from: a schema, or another option of its group."""
    for entry in content.get("defaults", ()):
        name = str(entry).partition("@")[0]
        for known in GROUPS[group].models.values():
            if name == f"/schema/{known.__name__}":
                return known
        other = CONF / group / f"{name}.yaml"
        if other.is_file():
            target = str(_read(other).get("_target_"))
            return GROUPS[group].models.get(target) or model_of_option(group, target) or Section
    return Section


def _model(name: str, section: Mapping[str, Any], base: type[Section], text: str) -> type[Section]:
    """Make a schema of the keys and values of a section; a `_target_` in it stays as it is."""
    fields: dict[str, Any] = {}
    for key, value in section.items():
        if key == "_target_":
            fields["target"] = (Literal[value], Field(alias=key, description="the class"))
        elif key not in base.model_fields and key != "defaults":
            fields[key] = (_type_of(key, value, text), Field(description=text))
    model: type[Section] = create_model(name, __base__=base, **fields)
    return model


def _type_of(key: str, value: Any, text: str) -> Any:
    if isinstance(value, Mapping):
        return _model(key, value, Section, text)
    interpolated = isinstance(value, str) and "${" in value
    return Any if value is None or interpolated else type(value)
