"""The arguments of test.py: which protocol, which images, and what the run decides."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from fedssl.config.compose import evaluation_overrides, load_config, quote
from fedssl.config.evaluation import choose_images, follow_run, refuse_preparation
from fedssl.errors import UserError

HUB = "fedssl.data.sources.hub.HubSource"


@pytest.mark.parametrize("argument", ["eval=finetune", "mode=finetune"])
def test_the_protocol_is_chosen_by_name(argument):
    settings = load_config("test", [argument, "encoder_learning_rate=0.5"])
    assert settings._target_.endswith("FineTuning")
    assert settings.encoder_learning_rate == 0.5


def test_the_keys_of_the_protocol_stand_at_the_top():
    settings = load_config("test", ["label_fraction=0.02", "seeds=5"])
    assert (settings.label_fraction, settings.seeds) == (0.02, 5)
    assert "dataset" not in settings


def test_other_images_are_prepared_as_those_of_the_run():
    config = load_config("config", [])
    chosen = load_config("test", ["dataset=cifar10", "dataset.path=elsewhere"])
    choose_images(config, chosen)
    dataset = config.dataset
    assert (dataset.name, dataset.path, dataset._target_) == ("cifar10", "elsewhere", HUB)
    assert (dataset.image_size, list(dataset.mean)) == (8, [0.31, 0.31, 0.31])


@pytest.mark.parametrize("wrong", ["dataset=foo", "dataset=digits,hub", "dataset.path=x"])
def test_wrong_images_get_one_line(wrong):
    with pytest.raises(UserError) as error:
        load_config("test", [wrong])
    assert "dataset" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["dataset.image_size=16", "dataset.mean=[0,0,0]"])
def test_another_preparation_is_refused(override):
    with pytest.raises(UserError, match="leave it out"):
        refuse_preparation(["dataset=cifar10", override])
    assert refuse_preparation(["dataset=cifar10"]) == ["dataset=cifar10"]


def test_two_places_for_the_images_are_refused():
    given_twice = load_config("test", ["dataset=imagefolder", "path=here"])
    with pytest.raises(UserError, match=r"give dataset\.path instead"):
        choose_images(load_config("config", []), given_twice)


@pytest.mark.parametrize(
    ("of_run", "asked", "rates"),
    [
        ([], [], (0.01, 0.01)),
        (["eval.learning_rate=0.5"], [], (0.5, 0.01)),
        (["eval.learning_rate=0.5"], ["eval=finetune"], (0.5, 0.01)),
        ([], ["eval=supervised"], (0.02, 5e-4)),
        (["eval=supervised", "eval.learning_rate=0.5"], ["eval=supervised"], (0.5, 5e-4)),
        (["eval=supervised", "eval.learning_rate=0.5"], [], (0.01, 0.01)),
        ([], ["weight_decay=0.7"], (0.01, 0.7)),
    ],
)
def test_the_rates_are_those_of_the_run_with_its_protocol_unless_told(of_run, asked, rates):
    config = load_config("config", ["dataset=cifar10", *of_run])
    chosen = load_config("test", asked)
    follow_run(chosen, config)
    assert (chosen.learning_rate, chosen.weight_decay) == rates


@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(st.text(alphabet=st.sampled_from("ab '\"\\,=[]{}:$()#~\u00e9"), max_size=9))
def test_any_text_comes_through_an_override(text):
    (parsed,) = OverridesParser.create().parse_overrides([f"key={quote(text)}"])
    assert parsed.value() == text


def test_the_translation_is_done_once():
    once = evaluation_overrides(["eval=linear", "dataset=hub", "dataset.name=a/b"])
    assert evaluation_overrides(once) == once
    assert "+dataset._target_='fedssl.data.sources.hub.HubSource'" in once
    with pytest.raises(UserError, match="choose one with eval=NAME"):
        load_config("test", once)  # what the program adds is closed to users
