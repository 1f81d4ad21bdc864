"""The schema and conf/ fit together, and whatever is given gets one line or is sound."""

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedssl.config.checks import check_settings, describe, literal_choices
from fedssl.config.compose import CONF, flatten, load_config, to_mapping
from fedssl.config.schema import GROUPS, PROGRAMS
from fedssl.errors import UserError

CHOSEN = [
    [f"{group}={file.stem}"]
    for group in (*GROUPS, "experiment")
    for file in sorted((CONF / group).glob("*.yaml"))
]
MAIN = to_mapping(load_config("config", ["partition=pathological", "strategy=fedadam"]))
FLAT = flatten(OmegaConf.create(MAIN))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_key_has_a_help_text(name):
    for chosen in CHOSEN if name == "config" else [[]]:
        config = load_config(name, chosen)
        texts = describe(name, to_mapping(config))
        assert texts.keys() == flatten(config).keys()
        assert all(texts.values())


@pytest.mark.parametrize("group", [g for g, plan in GROUPS.items() if "" not in plan.models])
def test_conf_ships_every_class_that_the_schema_lets_pass(group):
    told_by = GROUPS[group].told_by
    told = {
        OmegaConf.select(load_config("config", c), f"{group}.{told_by}")
        for c in CHOSEN
        if c[0].startswith(f"{group}=")
    }
    assert told >= set(GROUPS[group].models)  # a class may do without


def test_every_default_that_is_stored_is_used():
    used = " ".join(file.read_text() for file in CONF.rglob("*.yaml"))
    for node in ConfigStore.instance().list("schema"):
        assert f"schema/{node.removesuffix('.yaml')}@" in used or node == "IidPartition.yaml"


@pytest.mark.parametrize("wrong", ["foo", "16", "null", "[1]"])
@pytest.mark.parametrize(
    ("key", "bring"),
    [
        ("precision", []),
        ("model.encoder", []),
        ("model.stem", []),
        ("strategy.acts_on", []),
        ("partition.partition_by", ["partition=dirichlet"]),
        ("partition.class_assignment_mode", ["partition=pathological"]),
    ],
)
def test_a_wrong_choice_names_the_valid_ones(key, bring, wrong):
    group, _, inner = f".{key}".rpartition(".")
    group = group.lstrip(".")
    section = load_config("config", bring)
    model = GROUPS[group].model_of(section[group]) if group else PROGRAMS["config"].settings
    choices = literal_choices(model.model_fields[inner])
    assert len(choices) > 1
    with pytest.raises(UserError) as error:
        load_config("config", [*bring, f"{key}={wrong}"])
    assert all(choice in str(error.value) for choice in choices)


def kind(value):
    return float if type(value) is int else type(value)


@pytest.mark.parametrize("key", FLAT)
@pytest.mark.parametrize("wrong", [True, 0.123456, "a word", [object], {"_target_": "os.system"}])
def test_a_value_of_another_type_gets_one_line(key, wrong):
    right = FLAT[key]
    if kind(right) is kind(wrong) or (right is None and isinstance(wrong, str | float)):
        return
    changed = OmegaConf.to_container(OmegaConf.create(MAIN))
    section = changed
    for part in key.split(".")[:-1]:
        section = section[part]
    section[key.rpartition(".")[2]] = wrong
    with pytest.raises(UserError) as error:
        check_settings("config", changed)
    assert str(error.value).startswith(f"{key}=")
    assert "\n" not in str(error.value)


@seed(0)
@settings(max_examples=500, deadline=None, database=None)
@given(
    st.sampled_from(list(FLAT)),
    st.one_of(
        st.none(),
        st.integers(),
        st.floats(),
        st.text(max_size=9),
        st.booleans(),
        st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3),
    ),
)
def test_any_value_is_refused_in_a_line_or_kept_as_it_is(key, value):
    changed = OmegaConf.to_container(OmegaConf.create(MAIN))
    section = changed
    for part in key.split(".")[:-1]:
        section = section[part]
    section[key.rpartition(".")[2]] = value
    before = repr(changed)
    refusal = ""
    try:
        check_settings("config", changed)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert repr(changed) == before
    assert refusal or value == value  # never nan


def test_values_stay_what_was_given():
    config = load_config("config", ["optimizer.learning_rate=1", "max_update_ratio=7"])
    assert type(config.optimizer.learning_rate) is int
    assert type(config.max_update_ratio) is int


def test_the_files_of_conf_name_only_options_that_are_there():
    for file in CONF.rglob("*.yaml"):
        assert file.parent == CONF or file.parent.name in (*GROUPS, "experiment"), Path(file)
