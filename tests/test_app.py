"""app.py: how a client learns its configuration and its partition."""

import logging
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from federation.shuffled import FAST, ShuffledGrid
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from omegaconf import OmegaConf

import app
from fedssl.config.compose import load_config
from fedssl.config.roster import Member, write_roster
from fedssl.errors import UserError
from utils import open_membership, plan_simulation


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


@pytest.fixture
def open_umask():
    earlier = os.umask(0o022)
    yield
    os.umask(earlier)


def test_what_the_server_writes_is_for_its_own_user(config, tmp_path, open_umask):
    """Also below folders that others may read."""
    given = f"num_rounds=1 train.max_steps=1 train.local_epochs=1 {FAST} precision=float32"
    places = f"'output_dir={tmp_path}' 'cache_dir={config.cache_dir}'"
    asked = context(f"{given} {places}")
    app.main(ShuffledGrid(OmegaConf.create(app.config_text(asked))), asked)
    run = (tmp_path / "latest").resolve()
    written = [run, *run.rglob("*")]
    assert {file.name for file in written} >= {"metrics.jsonl", "encoder.safetensors"}
    for file in written:
        assert file.stat().st_mode & 0o777 == (0o700 if file.is_dir() else 0o600), file


def roster_of(folder, *partitions):
    members = []
    for number in partitions:
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        members.append(Member(number, f"site{number}", text))
    write_roster(folder / "nodes.yaml", members)
    return f"nodes_file={folder}/nodes.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_clients=3"], "names 2 nodes, num_clients=3: add the others"),
        (["min_nodes=3"], "names 2 nodes, min_nodes=3"),
        (["participants=[5]"], r"names 2 nodes, of partitions \[0, 1\]; participants has 5"),
        (["nodes_file=/nowhere.yaml"], "/nowhere.yaml: can't be read"),
    ],
)
def test_a_roster_that_does_not_suit_the_run_gets_one_line(tmp_path, overrides, message):
    asked = context(" ".join([roster_of(tmp_path, 0, 1), *overrides]))
    with pytest.raises(UserError, match=message):
        app.main(None, asked)


def test_a_roster_names_the_nodes(tmp_path):
    config = load_config("config", ["num_clients=2", roster_of(tmp_path, 0, 1)])
    assert open_membership(config).names == {0: "site0", 1: "site1"}
    with pytest.raises(UserError, match="a simulation has no nodes"):
        plan_simulation(config)


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
