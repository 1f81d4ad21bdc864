"""What the schema is made of: sections, and the kinds of lists that they hold."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import inf, isfinite
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

OWN_WORDS = "own_words"  # the type of errors that bring their text along


class Section(BaseModel):
    """Some settings: of each the type, the range, the default and the help text.

    A field without a default has one in the files of conf/ alone.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        protected_namespaces=(),
    )


class Instance(Section):
    """Settings of an object: the arguments of the class that `_target_` names."""

    target: str = Field(alias="_target_", description="the class, one that conf/ names")


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known words for the end of a message, and the nearest if one is near."""
    known = list(known)
    every = f"known: {', '.join(known)}"
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? ({every})" if close else every


def _refusal(reason: str) -> PydanticCustomError:
    return PydanticCustomError(OWN_WORDS, "{reason}", {"reason": reason})


def _is_number(item: Any) -> bool:
    return type(item) in (int, float) and isfinite(item)


def _numbers(count: int, low: float = -inf, high: float = inf) -> AfterValidator:
    bounds = f", {low:g} to {high:g}" if high < inf else ""

    def check(items: list[Any]) -> list[Any]:
        right = len(items) == count and all(_is_number(i) and low <= i <= high for i in items)
        if not right:
            raise _refusal(f"must be a list of {count} numbers{bounds}")
        return items

    return AfterValidator(check)


def _rising(items: list[Any]) -> list[Any]:
    if not 0 < items[0] <= items[1]:
        raise _refusal("must rise from a number above 0")
    return items


def _shares(items: list[Any]) -> list[Any]:
    if not all(_is_number(item) and 0 < item <= 1 for item in items):
        raise _refusal("must be a list of numbers above 0 and at most 1")
    return items


def _whole_numbers(low: int, high: float = inf) -> AfterValidator:
    def check(items: list[Any]) -> list[Any]:
        if not all(type(item) is int and low <= item <= high for item in items):
            bound = f"{low} to {high}" if high < inf else f"from {low} on"
            raise _refusal(f"must be a list of whole numbers, {bound}")
        return items

    return AfterValidator(check)


def _names(*known: str) -> Callable[[list[Any]], list[Any]]:
    def check(items: list[Any]) -> list[Any]:
        for item in items:
            if item not in known:
                raise _refusal(f"no {item}; {nearest(str(item), known)}")
        return items

    return check


# A number for red, green and blue, of values in [0, 1].
Means = Annotated[list[Any], _numbers(3, 0, 1)]
Deviations = Annotated[list[Any], _numbers(3, 0.001, 1)]
Span = Annotated[list[Any], _numbers(2), AfterValidator(_rising)]  # lowest and highest
ShareSpan = Annotated[list[Any], _numbers(2, 0, 1), AfterValidator(_rising)]  # of a whole
Shares = Annotated[list[Any], AfterValidator(_shares)]  # of a whole
Partitions = Annotated[list[Any], _whole_numbers(0)]
Sides = Annotated[list[Any], _whole_numbers(4, 4096)]  # of images, in pixels
Stages = Annotated[list[Any], AfterValidator(_names("layer1", "layer2", "layer3"))]  # of a ResNet


def key_of(section: type[Section], field: str) -> str:
    """Give the key of a field, which is its alias where it has one."""
    return section.model_fields[field].alias or field


def layout_of(section: type[Section]) -> dict[str, Any]:
    """List the keys of a section in their order, with their defaults or OmegaConf's `???`."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found[key_of(section, name)] = layout_of(inner)
        else:
            found[key_of(section, name)] = MISSING if field.is_required() else field.default
    return found


def defaults_of(section: type[Section]) -> dict[str, Any]:
    """List the defaults of a section, those of sections inside it too."""
    return {key: value for key, value in layout_of(section).items() if value != MISSING}
