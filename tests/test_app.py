"""app.py: how a client learns its configuration and its partition."""

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from omegaconf import OmegaConf

import app
from errors import UserError


def context(overrides="", **node_config):
    return Context(
        run_id=1,
        node_id=1,
        node_config=node_config,
        state=RecordDict(),
        run_config={"hydra-overrides": overrides},
    )


def test_the_documented_apps_exist():
    assert isinstance(app.server, ServerApp)
    assert all(isinstance(a, ClientApp) for a in (app.client, app.client1, app.client2))


def test_the_overrides_of_the_run_reach_every_client():
    text = app.config_text(context("num_rounds=3 'train.batch_size=32' dataset=cifar10"))
    config = OmegaConf.create(text)
    assert (config.num_rounds, config.train.batch_size) == (3, 32)
    assert config.dataset.name == "cifar10"
    assert config.num_clients == 2


def test_a_wrong_override_of_the_run_gets_one_line():
    with pytest.raises(UserError, match=r"did you mean num_rounds\?"):
        app.config_text(context("num_round=3"))


def test_a_node_says_which_partition_it_holds():
    node = {"partition-id": 3, "num-partitions": 7}
    identity = app.identify(context(**node))
    assert (identity.partition, identity.num_partitions) == (3, 7)


@pytest.mark.parametrize("number", [0, 1])
def test_client1_and_client2_are_the_two_halves(number):
    identity = app.half(number)(context())
    assert (identity.partition, identity.num_partitions) == (number, 2)
    assert OmegaConf.create(identity.config_text).num_clients == 2
