"""A client against messages as the server sends them, with and without Flower's mods."""

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, KEY_NORM_BIT
from serving import NUM_CLIENTS, Server, make_moving, make_small

from fedssl.federation.aggregation import arrays_for_strategy
from fedssl.federation.guards import validate_replies
from fedssl.federation.keeping import KEPT
from fedssl.federation.messages import pack_tensors, read_state
from fedssl.methods.base import local_arrays
from fedssl.networks.state import load_state

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def serve(digits):
    """Make a server and clients with some of the digits."""
    pixels = np.array(digits.train.pixels[:48])
    return lambda method=None, mods=(): Server(method or make_small(), pixels, mods)


def test_clients_tell_their_partitions(serve):
    server = serve()
    assert server.nodes.partition_of == {1: 0, 2: 1}


def test_a_client_trains_and_says_how(serve):
    server = serve()
    updates = server.updates(server.ask())
    assert [update.partition for update in updates] == [0, 1]
    for update in updates:
        assert update.num_examples == 18  # of 24, a quarter held out
        assert update.metrics["images"] == 2 * 8
        assert server.norm(update) > 0.1
        assert int(update.state["encoder.bn1.num_batches_tracked"]) == 2


def test_a_client_depends_on_seed_round_and_partition_alone(serve):
    server = serve()
    first, again, other = (server.updates(server.ask(number=n)) for n in (1, 1, 2))

    def data(update):
        return pack_tensors(update.state)

    assert list(map(data, first)) == list(map(data, again))
    assert data(first[0]) != data(other[0])
    assert data(first[0]) != data(first[1])


@pytest.mark.parametrize("acts_on", ["parameters", "floats", "backwards"])
def test_replies_hold_the_arrays_in_the_order_of_the_request(serve, acts_on):
    server = serve()
    names = server.names[::-1]
    if acts_on != "backwards":
        names = arrays_for_strategy(server.method, acts_on)
    for update in server.updates(server.ask(names=names), names):
        assert list(update.message.content["arrays"]) == names
        assert update.state.keys() == server.method.state_dict().keys()


def test_an_evaluation_gives_the_loss_and_leaves_the_model_at_home(serve):
    server = serve()
    first, again = (server.ask("evaluate", number) for number in (1, 3))
    for one, other in zip(first, again, strict=True):
        assert one.reply.content.array_records == {}
        assert one.reply.content["metrics"] == other.reply.content["metrics"]  # the same views
        assert one.reply.content["metrics"]["num-examples"] == 6
    updates, failures = validate_replies(first, server.nodes.partition_of, None)
    assert (len(updates), failures) == (2, [])


def test_fedprox_comes_with_the_request(serve):
    server = serve()
    free, tied = (server.updates(server.ask(**{"proximal-mu": mu}))[0] for mu in (0.0, 50.0))
    assert server.norm(tied) != pytest.approx(server.norm(free), rel=1e-3)


def test_an_error_is_a_line_that_names_the_partition(serve):
    server = serve()
    server.state.partitions = [np.arange(24), np.arange(3)]
    context = server.grid.contexts[2]
    with pytest.raises(RuntimeError, match=r"^partition 1: a client has 3 images"):
        server.grid.answer(Message(RecordDict(), 2, "query"), context)


# --- mods ----------------------------------------------------------------------


def test_mods_see_plain_arrays_of_training_alone(serve):
    seen = []

    def watch(message, context, call_next):
        reply = call_next(message, context)
        both = [list(each.content["arrays"]) for each in (message, reply)]
        seen.append((message.metadata.message_type, *both))
        return reply

    server = serve(mods=[watch])
    server.ask("evaluate")
    assert seen == []
    server.ask()
    assert seen == [("train", server.names, server.names)] * NUM_CLIENTS


def test_fixed_clipping_clips_what_the_strategy_acts_on(serve):
    plain, clipped = serve(), serve(mods=[fixedclipping_mod])
    free = plain.updates(plain.ask())
    short = clipped.updates(clipped.ask(**{KEY_CLIPPING_NORM: 0.05}))
    for one, other in zip(free, short, strict=True):
        assert plain.norm(one) > 0.1
        assert clipped.norm(other) == pytest.approx(0.05, rel=1e-3)
        name = "encoder.bn1.num_batches_tracked"  # a counter is nothing to clip
        assert one.state[name].equal(other.state[name])
    loose = clipped.updates(clipped.ask(**{KEY_CLIPPING_NORM: 1e6}))
    assert clipped.norm(loose[0]) == pytest.approx(plain.norm(free[0]), rel=1e-3)


def test_fixed_clipping_without_its_strategy_is_a_failure_that_says_so(serve):
    (first, _) = serve(mods=[fixedclipping_mod]).ask()
    assert first.reply is None
    assert "requires the key 'clipping_norm'" in first.failure


@pytest.mark.parametrize(("norm", "bit"), [(0.05, 1), (1e6, 0)])
def test_adaptive_clipping_clips_and_tells_whether_it_did(serve, norm, bit):
    server = serve(mods=[adaptiveclipping_mod])
    for update in server.updates(server.ask(**{KEY_CLIPPING_NORM: norm})):
        assert update.message.content["metrics"][KEY_NORM_BIT] == bit
        assert server.norm(update) <= norm * 1.001


def test_local_privacy_clips_and_adds_noise(serve):
    np.random.seed(0)
    norm, sensitivity, epsilon, delta = 0.05, 0.01, 2.0, 1e-5
    server = serve(mods=[LocalDpMod(norm, sensitivity, epsilon, delta)])
    spread = sensitivity * np.sqrt(2 * np.log(1.25 / delta)) / epsilon
    first, second = server.updates(server.ask())
    start = server.method.state_dict()
    for update in (first, second):
        moves = [(update.state[name] - start[name]).flatten() for name in server.names]
        assert float(torch.cat(moves).std()) == pytest.approx(spread, rel=0.01)
    name = "encoder.layer4.1.conv2.weight"
    noise = torch.stack([(u.state[name] - start[name]).flatten() for u in (first, second)])
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.01


def test_evaluations_and_greetings_pass_all_mods(serve):
    server = serve(mods=[fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1, 1, 1, 0.1)])
    assert all(answer.failure == "" for answer in server.ask("evaluate"))


def test_a_mod_that_refuses_is_the_clients_failure(serve):
    def refuse(message, context, call_next):
        return Message(Error(0, "not today"), reply_to=message)

    assert [answer.failure for answer in serve(mods=[refuse]).ask()] == ["not today"] * 2


# --- arrays that stay with a client ----------------------------------------------


@pytest.fixture
def moving(serve):
    return serve(make_moving())


def kept(server, node):
    record = server.grid.contexts[node].state.array_records.get(KEPT)
    return record and dict(record.to_torch_state_dict())


def test_local_arrays_stay_with_each_client_and_never_travel(moving):
    begin = local_arrays(moving.method)
    assert kept(moving, 1) is None
    for update in moving.updates(moving.ask()):
        assert not any(name.startswith("target") for name in update.state)
        assert list(update.message.content["arrays"]) == moving.names
    first, second = kept(moving, 1), kept(moving, 2)
    assert first.keys() == second.keys() == begin.keys()
    weight = "target.0.weight"
    assert not first[weight].equal(begin[weight])
    assert not first[weight].equal(second[weight])  # one process, two clients


def test_a_clients_second_round_begins_with_what_it_kept(moving):
    moving.ask(number=1)
    expected = make_moving()
    load_state(expected, {**moving.method.shared_state(), **kept(moving, 1)})
    loaded = []
    original = moving.state.method.loss

    def watch(views):
        loaded.append(moving.state.method.target[0].weight.detach().clone())
        return original(views)

    moving.state.method.loss = watch
    moving.ask(number=2)
    assert loaded[0].equal(expected.target[0].weight)
    assert not kept(moving, 1)["target.0.weight"].equal(loaded[0])


def test_an_evaluation_uses_what_a_client_kept_and_leaves_it(moving):
    moving.ask()
    before = kept(moving, 1)
    moving.ask("evaluate")
    assert all(tensor.equal(kept(moving, 1)[name]) for name, tensor in before.items())


def test_the_order_in_which_clients_are_asked_does_not_matter(serve):
    results = []
    for order in ([1, 2], [2, 1]):
        server = serve(make_moving())
        for number in (1, 2):
            request = server.nodes.get_node_ids
            server.nodes.get_node_ids = lambda order=order: order
            answers = server.ask(number=number)
            server.nodes.get_node_ids = request
        results.append([pack_tensors(read_state(a.reply.content)) for a in answers])
        results[-1] += [pack_tensors(kept(server, node)) for node in (1, 2)]
    assert results[0] == results[1]
