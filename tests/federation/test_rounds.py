"""The server against real ClientApps, called in this process instead of through Ray."""

import errno

import numpy as np
import pytest
import torch
from federation.shuffled import change
from flwr.app import Error, Message

from fedssl.config.compose import CONF, load_config
from fedssl.federation.aggregation import build_strategy
from fedssl.federation.messages import read_state
from fedssl.runs.checkpoints import list_checkpoints, load_checkpoint
from fedssl.runs.metrics import Failure
from utils import load_trained, plain

pytestmark = pytest.mark.usefixtures("narrow")

STRATEGIES = sorted(file.stem for file in (CONF / "strategy").glob("*.yaml"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_soundly_and_resumes_with_the_same_bytes(federate, strategy):
    overrides = [f"strategy={strategy}", f"num_clients={5 if strategy == 'krum' else 3}"]
    federation, rows, _ = federate(*overrides)
    checkpoints = list_checkpoints(federation.run.checkpoints)
    after_one = load_checkpoint(checkpoints[0])
    assert after_one.metrics == rows[0]
    rest, later, _ = federate(*overrides, checkpoint=after_one)
    assert [row.round for row in later] == [2]
    assert rest.run.last_checkpoint().read_bytes() == checkpoints[1].read_bytes()
    for key in ("train_loss", "eval_loss", "knn", "effective_rank"):
        assert getattr(later[0], key) == getattr(rows[1], key)
    state = federation.method.state_dict()
    assert len(rows) == 2
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
        state = read_state(reply.content)
        seen.append((reply.content["metrics"]["num-examples"], state))
        return reply

    federation, rows, _ = federate(
        "num_rounds=1", "partition=dirichlet", "num_clients=3", tamper=keep
    )
    weights = np.array([count for count, _ in seen], dtype=float)
    assert len(set(weights)) > 1
    for name, tensor in federation.method.state_dict().items():
        stack = [state[name].numpy() for _, state in seen]
        expected = np.average(stack, axis=0, weights=weights)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-6)
    losses = [client.train_loss for client in rows[0].clients]
    sizes = [client.num_examples for client in rows[0].clients]
    assert rows[0].train_loss == pytest.approx(np.average(losses, weights=sizes))


def test_the_standing_of_a_round_is_told_as_clients_answer(federate):
    told = []

    def lose(partition, reply):
        if partition != 2:
            return reply
        error = Message(Error(2, "lost"), reply_to=reply)
        error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return error

    _, (row,), _ = federate("num_rounds=1", tamper=lose, on_progress=told.append)
    train, evaluate = told[:4], told[4:]
    assert [(s.phase, s.answered, s.asked) for s in train] == [
        ("train", answered, 3) for answered in range(4)
    ]
    assert [(s.phase, s.answered, s.asked) for s in evaluate] == [
        ("evaluate", answered, 3) for answered in range(4)
    ]
    assert train[0].images_per_second is None
    # Two clients' images, over no more than the time until the average is made.
    assert train[-1].images_per_second >= row.images_per_second > 0


def test_the_order_of_replies_does_not_change_a_byte(federate):
    states = [federate()[0].method.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_recomputed_statistics_are_those_of_the_averaged_weights(federate):
    plain, (before,), _ = federate("num_rounds=1")
    fresh, (after,), grid = federate("num_rounds=1", "train.statistics=recomputed")
    assert [kind for kind, _ in grid.asked].count("query.statistics") == 3
    old, new = plain.method.state_dict(), fresh.method.state_dict()
    differ = {name for name in old if not torch.equal(old[name], new[name])}
    assert differ == {name for name in old if "running_" in name}  # no weight
    whole = fresh.encoder().state_dict()
    apart = {name for name in whole if not torch.equal(whole[name], new[f"encoder.{name}"])}
    assert apart == {name for name in whole if "running_" in name}  # of views and whole images
    kept = load_checkpoint(fresh.run.last_checkpoint())
    trained, _ = load_trained(
        fresh.run.load_config(), fresh.run.last_checkpoint(), torch.device("cpu")
    )
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(value, whole[name])
    assert kept.beside.keys() == {f"whole.encoder.{name}" for name in apart}
    assert after.train_loss == before.train_loss
    assert after.eval_loss != before.eval_loss
    assert after.bytes_moved > before.bytes_moved


def test_rounds_without_an_evaluation_lead_to_the_same_bytes(federate):
    given = ["num_rounds=3", "num_clients=2", "train.statistics=recomputed"]
    often, all_rows, _ = federate(*given)
    seldom, rows, grid = federate(*given, "evaluate_every=2")
    assert [kind for kind, _ in grid.asked].count("query.statistics") == 2 * 2
    assert seldom.run.last_checkpoint().read_bytes() == often.run.last_checkpoint().read_bytes()
    unknown = ("eval_loss", "knn", "effective_rank", "uniformity", "alignment")
    assert all(getattr(rows[0], name) is None for name in unknown)
    for name in unknown:
        told = [getattr(row, name) for row in rows[1:]]
        assert told == [getattr(row, name) for row in all_rows[1:]]
        assert None not in told
    assert [row.train_loss for row in rows] == [row.train_loss for row in all_rows]
    assert rows[0].bytes_moved < all_rows[0].bytes_moved
    assert rows[0].failures == rows[0].warnings == ()


def test_a_client_that_measures_nothing_is_named_and_the_round_goes_on(federate, monkeypatch):
    import client

    def fail(who, state, message, context, answer=client.statistics_reply):
        if who.partition == 1:
            return Message(Error(2, "<class 'X'>:<'partition 1: nothing'>"), reply_to=message)
        return answer(who, state, message, context)

    monkeypatch.setattr(client, "statistics_reply", fail)
    _, (row,), _ = federate("num_rounds=1", "train.statistics=recomputed")
    assert row.failures == (Failure(1, "statistics: nothing"),)
    assert [c.partition for c in row.clients if c.eval_loss is not None] == [0, 1, 2]


SHARED = (
    *("train.statistics=recomputed", "method.shared_negatives=1"),
    "train.global_statistics_from=0.3",
)


def test_negatives_of_other_clients_come_with_the_training(federate, monkeypatch):
    import client

    taken, train = [], client.local_train

    def note(*given, negatives, **more):
        taken.append(None if negatives is None else len(negatives))
        return train(*given, negatives=negatives, **more)

    monkeypatch.setattr(client, "local_train", note)
    given = ["num_clients=2", "num_rounds=3"]
    federation, rows, _ = federate(*SHARED, *given)
    assert taken == [None] * 2 + [1024] * 4  # those of the other
    assert sorted(federation.told) == [0, 1]
    assert all(row.failures == () for row in rows)
    first, *_, third = list_checkpoints(federation.run.checkpoints)
    rest, later, _ = federate(*SHARED, *given, checkpoint=load_checkpoint(first))
    assert rest.run.last_checkpoint().read_bytes() == third.read_bytes()
    assert [row.train_loss for row in later] == [row.train_loss for row in rows[1:]]
    _, alone, _ = federate(*SHARED[::2], *given)
    for row, other in zip(rows[:2], alone, strict=False):
        assert row.train_loss == other.train_loss  # the share of the run is not reached
    assert alone[2].train_loss < rows[2].train_loss  # fewer negatives, a smaller loss


def test_odd_moments_of_projections_are_left_out_and_named(federate, monkeypatch):
    import client

    measure = client.projection_moments

    def spoil(*given, **more):
        told = measure(*given, **more)
        return told | {"covariance": -told["covariance"]}

    monkeypatch.setattr(client, "projection_moments", spoil)
    federation, (row, _), _ = federate(*SHARED)
    assert {failure.partition for failure in row.failures} == {0, 1, 2}
    assert all("negative variances" in failure.reason for failure in row.failures)
    assert federation.told == {}


AVERAGED = ("optimizer=muon", "optimizer.momentum_start=averaged", "train.max_steps=2")


def test_momentum_is_averaged_and_handed_back(federate):
    ended = []

    def note(partition, reply):
        ended.append(read_state(reply.content))
        return reply

    federation, rows, _ = federate(*AVERAGED, "num_rounds=1", tamper=note)
    name = "momentum.encoder.layer1.0.conv1.weight"
    mean = torch.stack([state[name] for state in ended]).mean(dim=0)
    torch.testing.assert_close(federation.momentum[name], mean)
    assert float(mean.norm()) > 0
    kept = {f"momentum.{name}" for name, _ in federation.method.named_parameters()}
    assert federation.momentum.keys() == kept
    assert all("momentum" not in name for name in federation.method.state_dict())
    _, (zero,), _ = federate("optimizer=muon", "train.max_steps=2", "num_rounds=1")
    assert rows[0].train_loss == zero.train_loss  # momentum begins as zero
    assert rows[0].bytes_moved == pytest.approx(zero.bytes_moved * 15 / 9, rel=0.02)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_a_run_with_momentum_resumes_with_the_same_bytes(federate, strategy):
    overrides = [*AVERAGED, f"strategy={strategy}", "train.statistics=recomputed"]
    federation, rows, _ = federate(*overrides)
    first, second = list_checkpoints(federation.run.checkpoints)
    rest, later, _ = federate(*overrides, checkpoint=load_checkpoint(first))
    assert rest.run.last_checkpoint().read_bytes() == second.read_bytes()
    assert later[0].train_loss == rows[1].train_loss
    for name, value in federation.momentum.items():
        assert torch.equal(value, rest.momentum[name])
    _, fresh, _ = federate(*overrides, "optimizer.momentum_start=zero")
    assert fresh[1].train_loss != rows[1].train_loss


def test_hostile_momentum_is_left_out_and_named(federate):
    def tamper(partition, reply):
        if partition == 1:
            momentum = "momentum.encoder.conv1.weight"
            change(reply, lambda s: s[momentum].add_(1e6))
        return reply

    _, (row,), _ = federate(*AVERAGED, "num_rounds=1", tamper=tamper)
    assert "its momentum moved by" in row.failures[0].reason


def test_clients_train_as_long_as_the_round_is(federate):
    images = []

    def note(partition, reply):
        images.append(reply.content["metrics"]["images"])
        return reply

    lengths = ["train.max_steps=4", "train.batch_size=32", "train.round_fractions=[0.5,1]"]
    federate(*lengths, tamper=note)
    assert images == [2 * 32] * 3 + [4 * 32] * 3


def test_the_seed_decides_which_partitions_take_part(federate):
    overrides = ["num_clients=8", "strategy.fraction_train=0.25", "strategy.fraction_evaluate=0.25"]
    asked = [sorted(federate(*overrides)[2].asked) for _ in range(2)]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2 * (2 + 2)
    assert asked[0] != sorted(federate(*overrides, "seed=1")[2].asked)


@pytest.mark.slow
@pytest.mark.whole
def test_a_round_leaves_its_metrics_and_files(federate, config):
    federation, rows, _ = federate("num_rounds=4", "keep_checkpoints=2")
    directory = federation.run
    names = [file.name for file in list_checkpoints(directory.checkpoints)]
    assert names == ["round-0003.safetensors", "round-0004.safetensors"]
    row = rows[-1]
    assert [client.partition for client in row.clients] == [0, 1, 2]
    assert all(c.train_loss is not None and c.eval_loss is not None for c in row.clients)
    assert 0.3 < row.knn <= 1  # ten classes
    assert row.failures == ()
    size = sum(t.nbytes for t in federation.method.state_dict().values())
    assert row.bytes_moved == pytest.approx(9 * size, rel=0.01)  # 3 clients: out, back, out


def poison(value, at=1):
    def tamper(partition, reply):
        if partition == at:
            change(reply, lambda s: s["encoder.conv1.weight"][0, 0, 0, :1].fill_(value))
        return reply

    return tamper


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out_and_named(federate, value):
    federation, (row,), _ = federate("num_rounds=1", tamper=poison(value))
    assert all(torch.isfinite(t).all() for t in federation.method.state_dict().values())
    assert row.failures == (Failure(1, "array 'encoder.conv1.weight' is not finite"),)


def scale(factor):
    def tamper(partition, reply):
        if partition == 1:
            change(reply, lambda s: [t.mul_(factor) for t in s.values() if t.is_floating_point()])
        return reply

    return tamper


def test_an_enormous_update_is_left_out_and_named(federate):
    federation, (row,), _ = federate("num_rounds=1", tamper=scale(1e30))
    assert federation.method.encoder.conv1.weight.abs().max() < 10
    (failure,) = row.failures
    assert failure.partition == 1
    assert "moved by" in failure.reason
    assert [client.partition for client in row.clients if client.update_norm is not None] == [0, 2]


@pytest.mark.parametrize("overrides", [["partition=dirichlet"], ["partition=pathological"]])
def test_honest_clients_of_unequal_size_are_not_taken_for_attackers(federate, overrides):
    _, rows, _ = federate(*overrides, "num_clients=5", "train.max_steps=0", "num_rounds=2")
    assert all(row.failures == () for row in rows)


def test_too_few_results_end_the_run_with_the_reasons(federate):
    with pytest.raises(
        RuntimeError, match=r"2 of 3 clients came back, min_results=3 .*client 1: array"
    ):
        federate("min_results=3", tamper=poison(np.nan))


def test_the_end_of_a_run_names_its_clients_and_who_was_refused(federate, monkeypatch):
    import client

    def refuse(who, state, message, context, answer=client.query_reply):
        if who.partition == 1:
            return Message(Error(2, "<class 'X'>:<'partition 1: no image'>"), reply_to=message)
        return answer(who, state, message, context)

    monkeypatch.setattr(client, "query_reply", refuse)
    few = ["min_nodes=2", "min_results=3"]
    with pytest.raises(RuntimeError) as caught:
        federate(*few, tamper=poison(np.nan, at=2), names={1: "south", 2: "west"})
    assert str(caught.value).startswith("round 1: 1 of 2 clients came back, min_results=3 are ")
    assert "(west: array " in str(caught.value)
    assert str(caught.value).endswith("; refused: south (partition 1): no image")


def test_who_joined_and_whose_images_vanished_stands_in_the_round(federate):
    def lose(partition, reply):
        reply.content["metrics"]["unreadable-images"] = partition
        reply.content["metrics"]["num-examples"] -= len(lost) * partition
        lost.append(partition)
        return reply

    lost = []
    _, (first, second), _ = federate(tamper=lose)
    assert [str(event) for event in first.nodes] == [
        f"partition {number} is connected" for number in range(3)
    ]
    assert second.nodes == ()
    assert [client.unreadable_images for client in second.clients] == [0, 1, 2]
    assert any(line.startswith("client 2 left out 2 unreadable") for line in first.warnings)
    assert not any("vanished" in line for line in first.warnings)
    assert [line.partition(" ")[2][:1] for line in second.warnings if "vanished" in line] == [
        "1",
        "2",
    ]


def test_a_drifting_client_is_named_in_a_warning(federate):
    def turn_back(partition, reply):
        if partition == 1:
            change(reply, lambda s: [t.mul_(-0.5) for n, t in s.items() if "weight" in n])
        return reply

    _, (row,), _ = federate("num_rounds=1", "max_update_ratio=null", tamper=turn_back)
    assert any("client 1 drifts away" in warning for warning in row.warnings)


def test_a_collapsed_representation_gives_a_warning(federate):
    def flatten_head(partition, reply):
        def flatten(state):
            head = [name for name in state if name.startswith("projection_head")]
            for name in head:
                state[name].zero_() if name.endswith("weight") else None
            state["projection_head.3.bias"].fill_(1.0)

        return change(reply, flatten)

    _, (row,), _ = federate("num_rounds=1", "max_update_ratio=null", tamper=flatten_head)
    assert any("collapsed" in warning for warning in row.warnings)
    _, (sound,), _ = federate("num_rounds=1")
    assert sound.warnings == ()
    assert sound.uniformity < -0.3
    assert sound.effective_rank > 2


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

    _, rows, _ = federate(tamper=fail_first)
    assert rows[0].failures == (Failure(0, "out of memory"),)
    with pytest.raises(
        RuntimeError, match=r"0 of 3 clients came back, min_results=1 .*client 0: out of memory"
    ):
        federate(tamper=fail)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_leave_waiting_to_us_and_start_with_one(strategy):
    built = build_strategy(plain(load_config("config", [f"strategy={strategy}"]).strategy))
    assert built.min_available_nodes == built.min_train_nodes == built.min_evaluate_nodes == 1


def test_a_client_that_raises_is_named_with_its_reason(federate, monkeypatch):
    import client

    def diverge(*arguments, **settings):
        raise FloatingPointError("the training loss became nan")

    monkeypatch.setattr(client, "local_train", diverge)
    with pytest.raises(RuntimeError, match=r"partition \d: the training loss became nan"):
        federate()
