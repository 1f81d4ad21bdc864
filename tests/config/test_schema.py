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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("dataset.std=[0,0,0]", "must be a list of 3 numbers, 0.001 to 1"),
        ("dataset.std=[-1,1,1]", "must be a list of 3 numbers, 0.001 to 1"),
        ("dataset.mean=[128,128,128]", "must be a list of 3 numbers, 0 to 1"),
        ("augment.crop_scale=[0.5,2]", "must be a list of 2 numbers, 0 to 1"),
        ("strategy=fedtrimmedavg strategy.beta=0.5", "must be at least 0 and below 0.5"),
        ("round_timeout_s=99999999999999999999", "must be at most 2147483647"),
        ("model.projection_size=99999999999999999999", "must be at most 2147483647"),
        ("method.temperature=1e-40", "must be 0, or of a size from 1e-30 to 1e+30"),
        ("optimizer.learning_rate=1e308", "must be 0, or of a size from 1e-30 to 1e+30"),
        ("train.round_fractions=[1e-300]", "must be 0, or of a size from 1e-30 to 1e+30"),
        ("min_nodes=6", "there are only num_clients=5"),
        ("min_results=3 strategy.fraction_train=0.4", "at most 2 can come back from a round"),
        ("min_results=3 participants=[0,0,1]", "at most 2 can come back from a round"),
        ("strategy=krum strategy.num_malicious_nodes=5", "must be below num_clients=5"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("config", overrides.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_at_a_federation_more_nodes_may_come_than_are_dealt_out_to():
    load_config("config", ["min_results=6"], federated=True)
