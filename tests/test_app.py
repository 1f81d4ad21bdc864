"""app.py: how a client learns its configuration and its partition."""

import logging

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from omegaconf import OmegaConf

import app
from fedssl.errors import UserError


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
    assert (identity.partition, identity.num_partitions, identity.data_path) == (3, 7, None)


def test_a_node_may_hold_a_folder_of_its_own():
    identity = app.identify(context(**{"partition-id": 3, "data-path": "/data"}))
    assert (identity.partition, identity.data_path) == (3, "/data")


@pytest.mark.parametrize("number", [0, 1])
def test_client1_and_client2_are_the_two_halves(number):
    name = f"client{number + 1}"
    launched = context(**{"client-app": name})  # as flower-client-app configures a node
    for identity in (app.identify(context(), name), app.identify(launched)):
        assert (identity.partition, identity.num_partitions) == (number, 2)
        assert OmegaConf.create(identity.config_text).num_clients == 2


@pytest.mark.parametrize(
    "node",
    [{}, {"partition-id": 0}, {"num-partitions": 2}, {"data-path": "/data"}],
    ids=["nothing", "no count", "no number", "only a folder"],
)
def test_a_node_that_says_too_little_gets_one_line(node):
    with pytest.raises(UserError, match="partition-id=0 num-partitions=2"):
        app.identify(context(**node))


def test_a_partition_out_of_range_gets_one_line():
    with pytest.raises(UserError, match="must be from 0 to 1"):
        app.identify(context(**{"partition-id": 2, "num-partitions": 2}))


def test_errors_that_explain_themselves_come_without_a_traceback(caplog):
    log = logging.getLogger("flwr")
    for error, shown in ((UserError("too few"), False), (ZeroDivisionError("bug"), True)):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "flwr"):
            log.error("%s raised an exception", "ServerApp", exc_info=error)
        assert (caplog.records[0].exc_info is not None) == shown
        assert ("ServerApp raised an exception: too few" in caplog.text) != shown


def test_a_federation_of_folders_has_no_images_at_the_server():
    config = OmegaConf.create(app.compose_text(("dataset=imagefolder",)))
    assert app.open_server_images(config) is None
