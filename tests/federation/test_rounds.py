"""The server against real ClientApps, called in this process instead of through Ray."""

import errno
import random

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import make_client_app, simulated
from fedssl.config.compose import CONF, load_config
from fedssl.federation.aggregation import make_strategy
from fedssl.federation.messages import pack_state, unpack_state
from fedssl.federation.nodes import Nodes, ignore
from fedssl.federation.rounds import Federation
from fedssl.runs.checkpoints import list_checkpoints, load_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import Failure, Progress

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
FAST = "model.stem=imagenet"  # digits shrink to a point at once: little to compute
STRATEGIES = sorted(file.stem for file in (CONF / "strategy").glob("*.yaml"))


class LocalGrid:
    """Nodes with random ids, one per partition, that answer in random order."""

    def __init__(self, config, tamper=lambda partition, reply: reply):
        self.app, self.tamper, self.asked = make_client_app(simulated(config)), tamper, []
        ids = random.SystemRandom().sample(range(10**6), config.num_clients)
        self.nodes = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": number, "num-partitions": config.num_clients},
                state=RecordDict(),
                run_config={},
            )
            for number, node in enumerate(ids)
        }

    def get_node_ids(self):
        return random.SystemRandom().sample(list(self.nodes), len(self.nodes))

    def push_messages(self, messages):
        self.replies = []
        for number, message in enumerate(messages):
            context = self.nodes[message.metadata.dst_node_id]
            partition = context.node_config["partition-id"]
            if message.metadata.message_type != "query":
                self.asked.append((message.metadata.message_type, partition))
            message.metadata.__dict__["_message_id"] = str(number)
            reply = self.app(message, context)
            reply = self.tamper(partition, reply) if reply.content.array_records else reply
            self.replies.append(reply)
        return [str(number) for number in range(len(messages))]

    def pull_messages(self, message_ids):
        replies, self.replies = self.replies, []
        return random.SystemRandom().sample(replies, len(replies))


@pytest.fixture
def federate(config, digits, tmp_path):
    """Train with some overrides; return the federation after its rounds."""

    def run(*overrides, tamper=lambda partition, reply: reply, checkpoint=None, on_answer=ignore):
        given = [f"cache_dir={config.cache_dir}", "num_clients=3", "num_rounds=2", "num_cpus=2"]
        given += ["train.max_steps=1", "train.local_epochs=1", "precision=float32", FAST]
        changed = load_config("config", [*given, f"output_dir={tmp_path}", *overrides])
        directory = RunDirectory.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", changed)
        rounds = []
        grid = LocalGrid(changed, tamper)
        nodes = Nodes.of(grid, changed)
        federation = Federation(
            nodes, changed, directory, digits, rounds.append, checkpoint, on_answer
        )
        federation.train()
        assert directory.read_metrics() == rounds
        return federation, rounds, grid

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_soundly_and_resumes_with_the_same_bytes(federate, strategy):
    overrides = [f"strategy={strategy}", f"num_clients={5 if strategy == 'krum' else 3}"]
    federation, rounds, _ = federate(*overrides)
    checkpoints = list_checkpoints(federation.run.checkpoints)
    after_one = load_checkpoint(checkpoints[0])
    assert after_one.metrics == rounds[0]
    rest, later, _ = federate(*overrides, checkpoint=after_one)
    assert [metrics.round for metrics in later] == [2]
    assert rest.run.last_checkpoint().read_bytes() == checkpoints[1].read_bytes()
    for name in ("train_loss", "eval_loss", "knn", "effective_rank"):
        assert getattr(later[0], name) == getattr(rounds[1], name)
    state = federation.model.state_dict()
    assert len(rounds) == 2
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
            assert int(tensor) == 2  # one step in each of two rounds, on every client
        else:
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
        if name.endswith("running_var"):
            assert (tensor > 0).all()  # no server optimizer may step on these


def test_fedavg_is_the_mean_weighted_by_samples(federate):
    seen = []

    def keep(partition, reply):
        state = unpack_state(reply.content["arrays"])
        seen.append((reply.content["metrics"]["num-examples"], state))
        return reply

    federation, rounds, _ = federate(
        "num_rounds=1", "partition=dirichlet", "num_clients=3", tamper=keep
    )
    weights = np.array([count for count, _ in seen], dtype=float)
    assert len(set(weights)) > 1
    for name, tensor in federation.model.state_dict().items():
        stack = [state[name].numpy() for _, state in seen]
        expected = np.average(stack, axis=0, weights=weights)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-6)
    losses = [client.train_loss for client in rounds[0].clients]
    sizes = [client.num_examples for client in rounds[0].clients]
    assert rounds[0].train_loss == pytest.approx(np.average(losses, weights=sizes))


def test_the_progress_of_a_round_is_told_as_clients_answer(federate):
    told = []

    def lose(partition, reply):
        if partition != 2:
            return reply
        error = Message(Error(2, "lost"), reply_to=reply)
        error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return error

    _, (metrics,), _ = federate("num_rounds=1", tamper=lose, on_answer=told.append)
    train, evaluate = told[:4], told[4:]
    assert [(p.phase, p.answered, p.asked) for p in train] == [
        ("train", answered, 3) for answered in range(4)
    ]
    assert evaluate == [Progress("evaluate", answered, 3) for answered in range(4)]
    assert train[0].images_per_second is None
    # Two clients' images, over no more than the time until the average is made.
    assert train[-1].images_per_second >= metrics.images_per_second > 0


def test_the_order_of_replies_does_not_change_a_byte(federate):
    states = [federate()[0].model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_clients_train_as_long_as_the_round_is(federate):
    images = []

    def note(partition, reply):
        images.append(reply.content["metrics"]["images"])
        return reply

    lengths = ["train.max_steps=4", "train.batch_size=32", "train.round_lengths=[0.5,1]"]
    federate(*lengths, tamper=note)
    assert images == [2 * 32] * 3 + [4 * 32] * 3


def test_the_seed_decides_which_partitions_take_part(federate):
    overrides = ["num_clients=8", "strategy.fraction_train=0.25", "strategy.fraction_evaluate=0.25"]
    asked = [sorted(federate(*overrides)[2].asked) for _ in range(2)]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2 * (2 + 2)
    assert asked[0] != sorted(federate(*overrides, "seed=1")[2].asked)


def test_a_round_leaves_its_metrics_and_files(federate, config):
    federation, rounds, _ = federate("num_rounds=4", "keep_checkpoints=2")
    directory = federation.run
    names = [file.name for file in list_checkpoints(directory.checkpoints)]
    assert names == ["round-0003.safetensors", "round-0004.safetensors"]
    assert (directory.path / "encoder.safetensors").is_file()
    assert list(directory.path.glob("events.out.tfevents.*"))
    metrics = rounds[-1]
    assert [client.partition for client in metrics.clients] == [0, 1, 2]
    assert all(client.train_loss and client.eval_loss for client in metrics.clients)
    assert 0.3 < metrics.knn <= 1  # ten classes
    assert metrics.failures == ()
    size = sum(t.nbytes for t in federation.model.state_dict().values())
    assert metrics.bytes_moved == pytest.approx(9 * size, rel=0.01)  # 3 clients: out, back, out


def poison(value):
    def tamper(partition, reply):
        if partition == 1:
            state = unpack_state(reply.content["arrays"])
            state["encoder.conv1.weight"][0, 0, 0, 0] = value
            reply.content["arrays"] = pack_state(state)
        return reply

    return tamper


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out_and_named(federate, value):
    federation, rounds, _ = federate(tamper=poison(value))
    assert all(torch.isfinite(t).all() for t in federation.model.state_dict().values())
    for metrics in rounds:
        assert metrics.failures == (Failure(1, "array 'encoder.conv1.weight' is not finite"),)


def scale(factor):
    def tamper(partition, reply):
        if partition == 1:
            state = unpack_state(reply.content["arrays"])
            for tensor in state.values():
                tensor.mul_(factor) if tensor.is_floating_point() else None
            reply.content["arrays"] = pack_state(state)
        return reply

    return tamper


def test_an_enormous_update_is_left_out_and_named(federate):
    federation, rounds, _ = federate(tamper=scale(1e30))
    assert federation.model.encoder.conv1.weight.abs().max() < 10
    for metrics in rounds:
        (failure,) = metrics.failures
        assert failure.partition == 1
        assert "moved by" in failure.reason
        trained = [c.partition for c in metrics.clients if c.update_norm is not None]
        assert trained == [0, 2]


@pytest.mark.parametrize("overrides", [["partition=dirichlet"], ["partition=pathological"]])
def test_honest_clients_of_unequal_size_are_not_taken_for_attackers(federate, overrides):
    _, rounds, _ = federate(*overrides, "num_clients=5", "train.max_steps=0", "num_rounds=2")
    assert all(metrics.failures == () for metrics in rounds)


def test_too_few_results_end_the_run_with_the_reasons(federate):
    with pytest.raises(
        RuntimeError, match=r"2 of 3 clients came back, min_results=3 .*client 1: array"
    ):
        federate("min_results=3", tamper=poison(np.nan))


def test_a_drifting_client_is_named_in_a_warning(federate):
    def turn_back(partition, reply):
        if partition == 1:
            state = unpack_state(reply.content["arrays"])
            for name, tensor in state.items():
                if tensor.is_floating_point() and "weight" in name:
                    tensor.mul_(-0.5)
            reply.content["arrays"] = pack_state(state)
        return reply

    _, rounds, _ = federate("max_step_ratio=null", tamper=turn_back)
    assert any("client 1 drifts away" in warning for warning in rounds[0].warnings)


def test_a_collapsed_representation_gives_a_warning(federate):
    def flatten_head(partition, reply):
        state = unpack_state(reply.content["arrays"])
        last = [name for name in state if name.startswith("projection_head")][-1]
        for name in state:
            if name.startswith("projection_head") and name.endswith("weight"):
                state[name].zero_()
        state[last].fill_(1.0) if state[last].is_floating_point() else None
        reply.content["arrays"] = pack_state(state)
        return reply

    _, rounds, _ = federate("max_step_ratio=null", tamper=flatten_head)
    assert any("collapsed" in warning for warning in rounds[0].warnings)
    _, sound, _ = federate()
    assert sound[0].warnings == ()
    assert sound[0].uniformity < -0.3
    assert sound[0].effective_rank > 2


def test_a_full_disk_ends_the_run_with_the_last_good_state(federate, monkeypatch):
    from fedssl import files

    whole, _, _ = federate()
    written = []

    def fill(descriptor, sync=files.os.fsync):
        written.append(descriptor)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("fedssl.files.os.fsync", fill)
    with pytest.raises(RuntimeError, match=r"can't write to .*: No space left on device"):
        federate()
    monkeypatch.undo()
    run = max(whole.run.path.parent.glob("run*"))
    (first,) = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(first).round == 1
    assert not list(run.rglob(".partial-*"))


def test_a_failed_client_is_left_out_and_named(federate):
    def fail(partition, reply):
        error = Message(Error(2, "<class 'X'>:<'partition 0: out of memory'>"), reply_to=reply)
        error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return error

    def fail_first(partition, reply):
        return fail(partition, reply) if partition == 0 else reply

    _, rounds, _ = federate(tamper=fail_first)
    assert rounds[0].failures == (Failure(0, "out of memory"),)
    with pytest.raises(
        RuntimeError, match=r"0 of 3 clients came back, min_results=1 .*client 0: out of memory"
    ):
        federate(tamper=fail)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_leave_waiting_to_us_and_start_with_one(strategy):
    built = make_strategy(load_config("config", [f"strategy={strategy}"]).strategy)
    assert built.min_available_nodes == built.min_train_nodes == built.min_evaluate_nodes == 1


def test_a_client_that_raises_is_named_with_its_reason(federate, monkeypatch):
    import client

    def diverge(*arguments, **settings):
        raise FloatingPointError("the training loss became nan")

    monkeypatch.setattr(client, "local_train", diverge)
    with pytest.raises(RuntimeError, match=r"partition \d: the training loss became nan"):
        federate()
