"""Twenty hostile clients beside five honest ones: each is rejected and named."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import create_run
from federation.shuffled import FAST, change
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.federation import messages
from fedssl.federation.guards import Update
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import PACKED, ROUNDED, pack_tensors, unpack_tensors
from fedssl.federation.nodes import Nodes
from fedssl.federation.weights import Weighting
from fedssl.federation.wire import compress, encode
from utils import build_federation, build_patience

pytestmark = pytest.mark.usefixtures("narrow")

WEIGHT, MEAN = "encoder.conv1.weight", "encoder.bn1.running_mean"
VARIANCE, COUNTER = "encoder.bn1.running_var", "encoder.bn1.num_batches_tracked"


def fill(name, value):
    return lambda reply: change(reply, lambda state: state[name].fill_(value))


def put(name, value):
    """Put an array of another kind into the record that the strategy acts on."""

    def how(reply):
        arrays = dict(reply.content["arrays"])
        arrays[name] = Array(value)
        reply.content["arrays"] = ArrayRecord(arrays)

    return how


def drop(reply):
    arrays = dict(reply.content["arrays"])
    arrays.popitem()
    reply.content["arrays"] = ArrayRecord(arrays)


def turn_round(reply):
    arrays = dict(reply.content["arrays"])
    reply.content["arrays"] = ArrayRecord(dict(reversed(arrays.items())))


def tell(**values):
    def how(reply):
        given = {name.replace("_", "-"): value for name, value in values.items()}
        metrics = {**reply.content["metrics"], **given}
        kept = {name: value for name, value in metrics.items() if value is not None}
        reply.content["metrics"] = MetricRecord(kept)

    return how


def raw(make, kind=PACKED):
    """Change the packed bytes, as they travel."""

    def how(reply):
        data = make(reply.content["arrays"][PACKED].data)
        array = Array("uint8", (len(data),), kind, data)
        reply.content["arrays"] = ArrayRecord({PACKED: array})

    how.packed = True
    return how


def endless_steps(data):
    coded = encode(unpack_tensors(data), "int8")
    coded[f"step {WEIGHT}"].fill_(float("inf"))
    return compress(pack_tensors(coded))


def header_of(entries, data=b""):
    text = json.dumps(entries) if not isinstance(entries, str) else entries
    return struct.pack("<Q", len(text)) + text.encode() + data


def entry(begin, end, shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def pickled(reply):
    data = np.array([{"a": 1}], dtype=object)
    array = Array("object", (1,), "numpy.ndarray", data.dumps())
    reply.content["arrays"] = ArrayRecord({WEIGHT: array})


def enlarge(reply):
    noise = bytes(messages.MORE_BYTES)
    reply.content["more"] = ConfigRecord({"bytes": noise})
    reply.content["still"] = ConfigRecord({"bytes": noise})


def enlarge_lists(reply):
    half = bytes(messages.MORE_BYTES // 2)
    reply.content["more"] = ConfigRecord({"list": [half, half, half, half]})


HOSTILE = {  # what a client does, and what is said of it
    "not a number": (fill(WEIGHT, float("nan")), f"array {WEIGHT!r} is not finite"),
    "endless statistics": (fill(MEAN, float("inf")), f"array {MEAN!r} is not finite"),
    "enormous weights": (fill(WEIGHT, 1e12), "its weights moved by"),
    "enormous statistics": (fill(MEAN, 1e9), "its statistics moved by"),
    "negative variance": (fill(VARIANCE, -1), "holds negative variances"),
    "negative counter": (fill(COUNTER, -5), f"array {COUNTER!r} holds counts that can't be"),
    "enormous counter": (fill(COUNTER, 2**62), f"array {COUNTER!r} holds counts that can't be"),
    "a missing array": (drop, "is missing"),
    "an unknown array": (put("more", np.zeros(3, np.float32)), "array 'more' is unknown"),
    "another shape": (put(WEIGHT, np.zeros(3, np.float32)), "has shape (3,)"),
    "another kind": (put(WEIGHT, np.zeros((64, 3, 7, 7))), "has dtype torch.float64"),
    "another order": (turn_round, "its arrays are not those of the request, in their order"),
    "no images": (tell(num_examples=0), "num-examples is 0"),
    "endless images": (tell(num_examples=float("inf")), "num-examples is inf"),
    "more images than there can be": (tell(num_examples=2**60), "num-examples is"),
    "no loss": (tell(train_loss=None), "train-loss is missing"),
    "metrics of its own": (tell(mine=1.0), "its metrics have mine, unlike those of most clients"),
    "pickled objects": (pickled, "instead of 'safetensors'"),
    "a reply too large": (enlarge, "MB, over"),
    "lists too large": (enlarge_lists, "MB, over"),
    "garbage": (raw(lambda data: b"x" * 1000), "can't be read"),
    "cut off": (raw(lambda data: data[: len(data) // 2]), "can't be read"),
    "a header of gigabytes": (
        raw(lambda data: struct.pack("<Q", 2**40) + data[8:]),
        "can't be read",
    ),
    "arrays of gigabytes": (
        raw(lambda data: header_of({"a": entry(0, 2**40, [2**38])}, bytes(8))),
        "can't be read",
    ),
    "arrays that overlap": (
        raw(lambda data: header_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))),
        "can't be read",
    ),
    "a rounded bomb": (raw(lambda data: zlib.compress(bytes(2**28)), ROUNDED), "more than"),
    "rounded garbage": (raw(lambda data: data, ROUNDED), "can't be decompressed"),
    "endless steps": (raw(endless_steps, ROUNDED), f"array {WEIGHT!r} is not finite"),
    "one name twice": (
        raw(
            lambda data: header_of(
                f'{{"a": {json.dumps(entry(0, 8, [2]))}, "a": {json.dumps(entry(8, 16, [2]))}}}',
                bytes(16),
            )
        ),
        "can't be read",
    ),
}
HONEST = len(HOSTILE) + 2


class Hostile(LocalGrid):
    """The last clients are honest, each of the others tampers in its way."""

    def __init__(self, config):
        self.ways = [how for how, _ in HOSTILE.values()]

        def tampering(message, context, call_next):
            reply = call_next(message, context)
            return self.tamper(message, context, reply, packed=False)

        super().__init__(make_client_app(simulated(config), [tampering]), config.num_clients)

    def answer(self, message, context):
        return self.tamper(message, context, super().answer(message, context), packed=True)

    def tamper(self, message, context, reply, packed):
        place = context.node_config["partition-id"]
        if message.metadata.message_type == "train" and place < len(self.ways):
            how = self.ways[place]
            late = getattr(how, "packed", False) or how in (enlarge, pickled)
            if late == packed:
                how(reply)
        return reply


def test_every_hostile_update_is_rejected_by_name(config, digits, tmp_path):
    count = len(HOSTILE) + HONEST
    given = [f"cache_dir={config.cache_dir}", f"num_clients={count}", "num_rounds=1"]
    given += ["train.max_steps=1", "train.local_epochs=1", "precision=float32", FAST]
    given += ["train.batch_size=8", f"output_dir={tmp_path}"]
    changed = load_config("config", given)
    nodes, rounds = Nodes(Hostile(changed), build_patience(changed)), []
    federation = build_federation(changed, nodes, create_run(tmp_path / "run", changed), digits)
    federation.train(rounds.append)
    failures = {failure.partition: failure.reason for failure in rounds[0].failures}
    assert len(HOSTILE) >= 20
    for place, (name, (_, reason)) in enumerate(HOSTILE.items()):
        assert reason in failures.pop(place, ""), name
    assert failures == {}
    trained = [c.partition for c in rounds[0].clients if c.train_loss is not None]
    assert trained == list(range(len(HOSTILE), count))
    assert all(torch.isfinite(each).all() for each in federation.method.state_dict().values())


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([100, 110, 90, 10**9], [100, 110, 90, 1000]),
        ([100, 10**9], [100, 1000]),
        ([5, 5, 60], [5, 5, 50]),
        ([7], [7]),
        ([], []),
    ],
)
def test_no_client_counts_for_more_than_ten_times_the_median(counts, weights):
    assert Weighting().weigh(counts) == weights
    assert Weighting(max_ratio=0).weigh(counts) == counts
    assert Weighting("equal").weigh(counts) == [1] * len(counts)


def lie(partition, reply):
    if partition == 1:
        tell(num_examples=10**9)(reply)
    return reply


def test_a_client_that_claims_a_billion_images_is_bounded_and_named(federate):
    note = {}

    def keep(partition, reply):
        note[partition] = messages.read_state(reply.content)
        return lie(partition, reply)

    federation, (row,), _ = federate("num_rounds=1", tamper=keep)
    honest = row.clients[0].num_examples
    weights = [honest, 10 * honest, row.clients[2].num_examples]
    assert [client.weight for client in row.clients] == [None, 10 * honest, None]
    assert any("client 1 says that it has 1,000,000,000 images" in line for line in row.warnings)
    for name, value in federation.method.state_dict().items():
        if value.is_floating_point():
            parts = [w * note[n][name].double() for n, w in enumerate(weights)]
            torch.testing.assert_close(
                value.double(), sum(parts) / sum(weights), atol=1e-6, rtol=1e-5
            )


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_equal_weights_are_what_any_strategy_averages_by(federate, strategy):
    given = f"strategy={strategy}", "num_rounds=1", "weighting=equal"
    honest, (row,), _ = federate(*given)
    lied, _, _ = federate(*given, tamper=lie)
    for name, value in honest.method.state_dict().items():
        assert torch.equal(value, lied.method.state_dict()[name]), name
    losses = [client.train_loss for client in row.clients]
    assert row.train_loss == pytest.approx(np.mean(losses))


def test_bounds_hold_for_statistics_and_losses_too(federate, monkeypatch):
    """A liar's BatchNorm statistics and its loss count as its weights do."""
    asked = []
    bare = Weighting.weigh
    monkeypatch.setattr(
        Weighting, "weigh", lambda self, counts: asked.append(counts) or bare(self, counts)
    )
    federate("num_rounds=1", "train.statistics=recomputed")
    assert len(asked) == 3  # training, statistics, evaluation
    update = Update(0, 10**9, {"loss": 1.0}, {}, None, weight=10)
    assert Weighting().bounds(update)
    assert not Weighting("equal").bounds(update)
