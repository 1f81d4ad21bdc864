"""An option of a group is a yaml file; a schema of its own is welcome, not needed."""

import re
import shutil

import pytest
from conftest import ROOT

from fedssl.config.compose import load_config
from fedssl.config.options import model_of_option
from fedssl.errors import UserError

YAML = """
defaults:
  - /schema/Strategy@_here_

_target_: flwr.serverapp.strategy.QFedAvg
acts_on: floats
q: 0.1
train_loss_key: train-loss
"""
WRAPPER = """
_target_: flwr.serverapp.strategy.DifferentialPrivacyServerSideFixedClipping
acts_on: parameters
noise_multiplier: 0.1
clipping_norm: 1.0
num_sampled_clients: ${num_clients}
strategy:
  _target_: flwr.serverapp.strategy.FedAvg
  fraction_train: 1.0
"""


@pytest.fixture
def option(tmp_path, monkeypatch):
    """Put options into a copy of conf/."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for module in ("compose", "options"):
        monkeypatch.setattr(f"fedssl.config.{module}.CONF", conf)

    def put(name, text):
        (conf / "strategy" / f"{name}.yaml").write_text(text)
        model_of_option.cache_clear()

    yield put
    model_of_option.cache_clear()


def test_a_yaml_file_is_enough_for_an_option(option):
    option("toy_qfedavg", YAML)
    config = load_config("config", ["strategy=toy_qfedavg", "strategy.q=0.5"])
    assert (config.strategy.q, config.strategy.fraction_train) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.q=much"], "strategy.q=much: must be a number"),
        (["strategy.fraction_train=0"], "strategy.fraction_train=0: must be above 0"),
        (["+strategy.more=1"], "strategy.more: unknown key"),
        (["strategy._target_=os.system"], "strategy._target_=os.system"),
    ],
)
def test_its_keys_are_checked(option, overrides, message):
    option("toy_qfedavg", YAML)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config("config", ["strategy=toy_qfedavg", *overrides])


def test_a_class_within_an_option_stays_what_it_is(option):
    option("toy_private", WRAPPER)
    config = load_config("config", ["strategy=toy_private", "strategy.clipping_norm=2"])
    assert config.strategy.num_sampled_clients == 5
    with pytest.raises(UserError, match=r"strategy\.strategy\._target_=os\.system"):
        load_config("config", ["strategy=toy_private", "strategy.strategy._target_=os.system"])
