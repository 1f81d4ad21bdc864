"""What a client keeps for itself: the same bytes after a loss, and none of them on the wire."""

import os

import pytest
import torch
from conftest import create_run
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.federation.keeping import (
    LEFT,
    RUNS,
    Keeping,
    check_kept,
    folder_at_node,
    folder_of,
)
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.nodes import Nodes
from fedssl.runs.checkpoints import list_checkpoints, load_checkpoint
from fedssl.runs.metrics import ClientMetrics, RoundMetrics
from utils import build_federation, build_patience

pytestmark = pytest.mark.usefixtures("narrow")

KINDS = (
    ["method=moco", "method.queue_size=64"],
    ["method=byol", "receive=fedema"],
)


class Recorder(LocalGrid):
    """Remembers what travelled; partition 1 may be a new process from round 2 on."""

    def __init__(self, config, folder, loses_context):
        super().__init__(make_client_app(simulated(config, folder)), config.num_clients)
        self.loses_context, self.has_files = loses_context, folder is not None
        self.travelled = set()

    def answer(self, message, context):
        config = message.content.config_records.get("config", {})
        gone = self.loses_context and context.node_config["partition-id"] == 1
        if gone and config.get("server-round") == 2:
            context.state = RecordDict()
        self.note(message)
        reply = super().answer(message, context)
        assert not (self.has_files and context.state.array_records)  # too much to hand back
        self.note(reply)
        return reply

    def note(self, message):
        for record in message.content.array_records.values():
            self.travelled |= {bytes(each.data) for each in record.values()}
        for record in message.content.config_records.values():
            self.travelled |= {each for each in record.values() if isinstance(each, bytes)}


@pytest.fixture
def federate(config, digits, tmp_path):
    """Train, perhaps from another run's first checkpoint, with what its clients kept."""

    def run(*overrides, loses_context=False, earlier=None, files=True):
        given = [f"cache_dir={config.cache_dir}", "num_clients=2", "num_rounds=2", "num_cpus=1"]
        given += ["train.max_steps=1", "train.local_epochs=1", "precision=float32"]
        given += ["monitor.bank=50", "monitor.queries=20", "train.batch_size=32"]
        given += ["model.stem=imagenet", f"output_dir={tmp_path}", *overrides]
        changed = load_config("config", given)
        directory = create_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", changed)
        checkpoint = None
        if earlier:
            checkpoint = load_checkpoint(list_checkpoints(earlier.checkpoints)[0])
            for old in earlier.clients.rglob("*.safetensors"):  # those of later rounds, too
                new = directory.clients / old.relative_to(earlier.clients)
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(old.read_bytes())
        grid = Recorder(changed, directory.clients if files else None, loses_context)
        nodes = Nodes(grid, build_patience(changed), wire=changed.wire)
        federation = build_federation(changed, nodes, directory, digits, checkpoint)
        federation.train(lambda metrics: None)
        return federation, grid

    return run


def last_bytes(federation):
    return federation.run.last_checkpoint().read_bytes()


@pytest.mark.parametrize("overrides", KINDS, ids=lambda overrides: overrides[-1])
def test_who_finds_what_it_kept_goes_on_with_the_same_bytes(federate, overrides):
    whole, grid = federate(*overrides)
    resumed, _ = federate(*overrides, earlier=whole.run)
    assert last_bytes(resumed) == last_bytes(whole)
    in_context, _ = federate(*overrides, files=False)
    assert last_bytes(in_context) == last_bytes(whole)
    lost, _ = federate(*overrides, loses_context=True, files=False)
    assert last_bytes(lost) != last_bytes(whole)

    wire = b"".join(grid.travelled)
    kept = load_file(folder_of(whole.run.clients, 0) / "round-0002.safetensors")
    assert kept
    local = whole.method.local_names()
    assert local <= kept.keys()
    for name in local:
        assert kept[name].numel() < 9 or kept[name].numpy().tobytes() not in wire, name
    shared = whole.method.state_dict()["encoder.conv1.weight"]
    assert shared.numpy().tobytes() in wire


def test_what_rounding_has_left_stays_with_the_client(federate):
    whole, _ = federate("wire=int4")
    left = load_file(folder_of(whole.run.clients, 0) / LEFT / "round-0002.safetensors")
    assert any(value.any() for value in left.values())
    resumed, _ = federate("wire=int4", earlier=whole.run)
    assert last_bytes(resumed) == last_bytes(whole)
    in_context, _ = federate("wire=int4", files=False)
    assert last_bytes(in_context) == last_bytes(whole)
    lost, _ = federate("wire=int4", loses_context=True, files=False)
    assert last_bytes(lost) != last_bytes(whole)


def fill(folder, rounds):
    folder.mkdir(parents=True, exist_ok=True)
    for number in rounds:
        (folder / f"round-{number:04d}.safetensors").write_bytes(b"")


def make_context():
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def test_files_stay_as_long_as_a_checkpoint_may_need_them(tmp_path):
    for number in (1, 2, 5, 6, 7, 9):
        keeping = Keeping(make_context(), tmp_path, keep_rounds=3)
        keeping.write(number, {"a": torch.tensor([float(number)])})
    rounds = sorted(int(file.stem[-4:]) for file in tmp_path.iterdir())
    assert rounds == [6, 7, 9]  # checkpoints of rounds 6 to 8, and 9 itself
    assert {int(Keeping(make_context(), tmp_path, 3).read(n)["a"]) for n in (6, 8, 9)} == {6, 7, 9}
    assert Keeping(make_context(), tmp_path, 3).read(5) == {}
    assert Keeping(make_context(), None, 3).read(9) == {}


def test_a_damaged_file_is_one_line(tmp_path):
    fill(tmp_path, [2])
    with pytest.raises(UserError, match=r"round-0002\.safetensors: damaged") as error:
        Keeping(make_context(), tmp_path, 3).read(2)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in error.value.public


def test_a_node_keeps_the_newest_runs(tmp_path):
    for number in range(RUNS + 2):
        folder = folder_at_node(tmp_path, f"{number:08x}")
        os.utime(folder, (number, number))
    assert folder_at_node(tmp_path, "00000004") == tmp_path / "clients" / "00000004"
    assert len(list((tmp_path / "clients").iterdir())) == RUNS


def test_a_node_keeps_every_run_that_was_asked_lately(tmp_path):
    for number in range(RUNS + 2):
        os.utime(folder_at_node(tmp_path, f"{number:08x}"), (number, number))
        folder_at_node(tmp_path, f"{number:08x}")
    assert len(list((tmp_path / "clients").iterdir())) == RUNS + 2


def test_a_simulation_that_lacks_a_clients_file_does_not_go_on(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    clients = (ClientMetrics(0, num_examples=5), ClientMetrics(1, num_examples=5), ClientMetrics(2))
    run.append_metrics(RoundMetrics(1, clients=clients))
    fill(folder_of(run.clients, 0), [1])
    fill(folder_of(run.clients, 1), [2])  # of the round that was broken off
    with pytest.raises(UserError, match="partition-1 lacks what this client kept by round 1"):
        check_kept(run, 1)
    fill(folder_of(run.clients, 1), [1])
    check_kept(run, 1)
    with pytest.raises(UserError, match="partition-0/left lacks what this client kept"):
        check_kept(run, 1, LEFT)
    for number in range(2):
        fill(folder_of(run.clients, number) / LEFT, [1])
    check_kept(run, 1, LEFT)
