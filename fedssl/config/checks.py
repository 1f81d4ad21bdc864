"""Checking settings against the schema: the first wrong one gets a line with the remedy."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeGuard, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedssl.config.fields import OWN_WORDS, Section, key_of, nearest
from fedssl.config.options import model_of_option
from fedssl.config.schema import GROUPS, PROGRAMS
from fedssl.errors import SettingError

WRONG_TYPE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "finite_number": "a finite number",
    "model_type": "a section",
    "string_too_short": "text, and not empty",
}
LARGEST_WHOLE = 2**31 - 1  # what every library and clock counts to
LARGEST, SMALLEST = 1e30, 1e-30  # sizes of a number that single precision holds
MISSING = "missing; a key may be changed, but not deleted"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def check_settings(program: str, settings: Mapping[str, Any]) -> None:
    """Check every setting of a program; none is changed.

    Args:
        program: the name of its configuration below conf/.
        settings: the configuration, resolved, without Hydra's own part.

    Raises:
        UserError: a key that the schema does not know or that is missing, or
            a value of the wrong type or out of range.
    """
    for prefix, model, section in list(_sections(program, settings)):
        _check_section(prefix, model, section, settings)


def check_federation(settings: Mapping[str, Any]) -> None:
    """Check what a server of real nodes is to do with a run that there is.

    Raises:
        UserError: nothing says how it is evaluated.
    """
    if settings["run"] is not None and "Federated" not in settings["eval"]["_target_"]:
        raise SettingError(f"run={settings['run']}: add eval=federated, which evaluates it")


def check_simulation(settings: Mapping[str, Any]) -> None:
    """Check how many clients of a simulation are waited for.

    Raises:
        UserError: more than there are.
    """
    if settings["run"] is not None:
        raise SettingError(
            f"run={settings['run']}: is for flower-server-app; python test.py eval=federated "
            "evaluates a simulation"
        )
    count, participants = settings["num_clients"], set(settings["participants"])
    strategy = settings["strategy"]
    for key in ("min_nodes", "min_results"):
        if (settings[key] or 0) > count:
            raise SettingError(f"{key}={settings[key]}: there are only num_clients={count}")
    if any(number >= count for number in participants):
        raise SettingError(
            f"participants={settings['participants']}: with num_clients={count} the partitions "
            f"are 0 to {count - 1}"
        )
    fraction = strategy.get("fraction_train") or 1
    asked = max(1, int(fraction * (len(participants) or count)))
    if settings["min_results"] > asked:
        raise SettingError(
            f"min_results={settings['min_results']}: at most {asked} can come back from a round, "
            "by num_clients, participants and strategy.fraction_train"
        )
    if (strategy.get("num_malicious_nodes") or 0) >= count:
        raise SettingError(
            f"strategy.num_malicious_nodes={strategy['num_malicious_nodes']}: must be below "
            f"num_clients={count}"
        )


def describe(program: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Give the help text of every setting of a program, by its dotted key."""
    return {
        f"{prefix}{key}": text
        for prefix, model, _ in _sections(program, settings)
        for key, text in _describe_section(model)
    }


def literal_choices(field: FieldInfo) -> tuple[str, ...]:
    """List the values that a field may have, if these are words; else nothing."""
    choices = get_args(field.annotation)
    return choices if choices and all(isinstance(choice, str) for choice in choices) else ()


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _describe_section(model: type[Section]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if _is_section(inner):
            for key, text in _describe_section(inner):
                yield f"{name}.{key}", text
        else:
            choices = literal_choices(field)
            text = field.description or ""
            told = not choices or all(choice in text for choice in choices)
            yield key_of(model, name), text if told else f"{text}: {', '.join(choices)}"


def _sections(
    program: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, type[Section], Mapping[str, Any]]]:
    """Take settings apart: the prefix of the keys, the schema and the values of each section."""
    plan = PROGRAMS[program]
    optional = [plan.optional] if plan.optional and plan.optional in settings else []
    groups = [*plan.groups, *optional]
    top = {key: value for key, value in settings.items() if key not in groups}
    if plan.at_top:
        model = _model_of(plan.at_top, top, "")
        known = {key_of(model, name) for name in model.model_fields}
        inner = {key: top.pop(key) for key in list(top) if key in known}
        left_open = [key for key in plan.open if key in inner and inner[key] is None]
        yield "", model, inner | dict.fromkeys(left_open, 1)  # any number, in place of null
    yield "", plan.settings, top
    for group in groups:
        section = settings.get(group)
        if not isinstance(section, Mapping):
            raise SettingError(f"{group}: missing; choose an option, as in {group}=OPTION")
        yield f"{group}.", _model_of(group, section, f"{group}."), section


def _model_of(group: str, section: Mapping[str, Any], prefix: str) -> type[Section]:
    """Choose the schema of a group's section.

    Raises:
        UserError: it belongs to no option of the group.
    """
    plan = GROUPS[group]
    model, told = plan.model_of(section), section.get(plan.told_by)
    if model is None and plan.told_by == "_target_":
        model = model_of_option(group, str(told))
    if model is None:
        hint = nearest(str(told), plan.models)
        raise SettingError(f"{prefix}{plan.told_by}={told}: {hint}")
    return model


def _check_section(
    prefix: str, model: type[Section], section: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    try:
        model.model_validate(section)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise SettingError(_explain(prefix, model, details[0], settings)) from error
    _refuse_missing(prefix, model, section)
    for key, value in flatten_mapping(section).items():
        for number in value if isinstance(value, list) else [value]:
            if reason := _refuse_size(number):
                raise SettingError(f"{prefix}{key}={value}: {reason}")


def _refuse_size(number: Any) -> str:
    """Say why a number is too large or too small to be reckoned with; empty if it is not."""
    if type(number) is int and abs(number) > LARGEST_WHOLE:
        return f"must be at most {LARGEST_WHOLE}"
    if type(number) is float and number and not SMALLEST <= abs(number) <= LARGEST:
        return f"must be 0, or of a size from {SMALLEST:g} to {LARGEST:g}"
    return ""


def _refuse_missing(prefix: str, model: type[Section], section: Mapping[str, Any]) -> None:
    """Make sure that no key was deleted, for which the schema alone has a default."""
    for name, field in model.model_fields.items():
        key, inner = key_of(model, name), field.annotation
        if key not in section:
            raise SettingError(f"{prefix}{key}: {MISSING}")
        if _is_section(inner):
            _refuse_missing(f"{prefix}{key}.", inner, section[key])


def _explain(
    prefix: str, model: type[Section], error: ErrorDetails, settings: Mapping[str, Any]
) -> str:
    """Say in one line what is wrong with a setting."""
    key = prefix + ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return unknown_key(key, flatten_mapping(settings))
    if error["type"] == "missing":
        return f"{key}: {MISSING}"
    reason = _reason(error, _find_field(model, error["loc"]))
    value = error["input"]
    shown = repr(value) if isinstance(value, str) and value.isnumeric() else value
    return f"{key}={shown}: {reason}"


def _find_field(model: type[Section], path: Sequence[int | str]) -> FieldInfo:
    """Find the field that an error is about, perhaps in a section within the section."""
    first, *rest = path
    field = next(f for name, f in model.model_fields.items() if first in (name, f.alias))
    inner = field.annotation
    return _find_field(inner, rest) if rest and _is_section(inner) else field


def _reason(error: ErrorDetails, field: FieldInfo) -> str:
    kind = error["type"]
    if kind == OWN_WORDS:
        return error["msg"]
    if kind == "literal_error":
        return nearest(str(error["input"]), literal_choices(field))
    if kind.startswith(("greater_than", "less_than")):
        bounds = [
            f"{words} {getattr(bound, name)}"
            for name, words in BOUNDS.items()
            for bound in field.metadata
            if hasattr(bound, name)
        ]
        return f"must be {' and '.join(bounds)}"
    return f"must be {WRONG_TYPE.get(kind, 'text')}"


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    """Say in one line that there is no such key, and which one may have been meant."""
    group, _, inner = key.partition(".")
    models = GROUPS[group].models if group in GROUPS else {}
    having = [
        told.rpartition(".")[2]
        for told, model in models.items()
        if told and inner in model.model_fields
    ]
    keys = [*GROUPS, *(name for name in known if name != key)]
    close = get_close_matches(key, keys, n=1) or [k for k in keys if k.endswith(f".{key}")]
    if having and inner:
        hint = f"only {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    else:
        hint = f"did you mean {close[0]}?" if close else "see --help for the known ones"
    return f"{key}: unknown key; {hint}"


def flatten_mapping(settings: Mapping[str, Any]) -> dict[str, Any]:
    """List the leaves of nested settings by their dotted keys; lists are leaves."""
    leaves: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            leaves[prefix] = node

    visit("", settings)
    return leaves
