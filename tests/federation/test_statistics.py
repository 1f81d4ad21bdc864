"""What clients tell of BatchNorm's inputs, checked and pooled."""

import re

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from samples import make_encoder, make_simclr

from fedssl.federation.messages import BUFFERS, write_tensors
from fedssl.federation.nodes import Answer
from fedssl.federation.statistics import (
    check_moments,
    expected_moments,
    pool_statistics,
    statistics_request,
)
from fedssl.networks.state import load_state

METHOD = make_simclr(encoder=make_encoder(stem="imagenet"))
EXPECTED = expected_moments(METHOD)
FIRST = "views.encoder.bn1"


def moments(mean=0.0, square=1.0):
    """Make moments that are the same for all channels."""
    return {
        name: torch.full((size,), square if name.endswith(".square") else mean)
        for name, size in EXPECTED.items()
    }


def answer(node, told, images=10):
    metrics = MetricRecord({"partition-id": node, "num-examples": images})
    content = RecordDict({"metrics": metrics, **told})
    return Answer(node, Message(content, node, "query.statistics"))


def sound(node, *given, images=10):
    return answer(node, write_tensors(moments(*given)), images)


def pool(*answers):
    return pool_statistics(answers, {1: 0, 2: 1, 3: 2}, METHOD, list)


def test_clients_count_by_their_images():
    views, whole, failures = pool(sound(1, 0.0, 1.0, images=30), sound(2, 4.0, 17.0))
    assert failures == []
    for state in (views, whole):
        assert torch.all(state["encoder.bn1.running_mean"] == 1)
        assert torch.all(state["encoder.bn1.running_var"] == 4)
    assert all(name.startswith("encoder.") for name in whole)
    load_state(METHOD, {**METHOD.state_dict(), **views, **whole})  # these are its arrays
    assert {name for name, _ in METHOD.named_buffers() if "running" in name} == views.keys()


def change(name, value):
    return write_tensors(moments() | {name: value})


def without(name):
    return write_tensors({key: value for key, value in moments().items() if key != name})


SIZE = EXPECTED[f"{FIRST}.mean"]
BAD = {
    "is missing": without(f"{FIRST}.mean"),
    "is unknown": change("views.other.mean", torch.zeros(3)),
    r"is torch.float32 \(1,\)": change(f"{FIRST}.mean", torch.zeros(1)),
    "is torch.float64": change(f"{FIRST}.mean", torch.zeros(SIZE).double()),
    "is not finite": change(f"{FIRST}.mean", torch.full((SIZE,), torch.nan)),
    "less than the square of the mean": change(f"{FIRST}.mean", torch.full((SIZE,), 3.0)),
    "no moments": {},
    "can't be read": {BUFFERS: ConfigRecord({BUFFERS: b"12345678"})},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_odd_is_left_out_and_named(message):
    views, _, (failure,) = pool(answer(1, BAD[message]), sound(2, 2.0, 5.0))
    assert failure.partition == 0
    assert re.search(message, failure.reason)
    assert failure.reason.startswith("statistics: ")
    assert torch.all(views["encoder.bn1.running_mean"] == 2)


@pytest.mark.parametrize("images", [0, -1, 2.5, 1e300])
def test_the_number_of_images_is_one(images):
    views, _, failures = pool(sound(1, images=images))
    assert "num-examples is" in failures[0].reason
    assert views == {}


def test_where_nobody_answers_nothing_changes():
    views, whole, failures = pool(Answer(2, None, "no reply within 3 s", absent=True))
    assert (views, whole) == ({}, {})
    assert [str(failure.reason) for failure in failures] == ["statistics: no reply within 3 s"]


def test_constant_activations_are_no_error():
    check_moments(moments(3.0, 9.0 * (1 - 1e-6)), EXPECTED)  # rounding


def test_the_request_holds_what_an_evaluation_does():
    content = RecordDict({"config": ConfigRecord({"server-round": 3})})
    request = statistics_request(Message(content, 7, "evaluate"))
    assert request.metadata.message_type == "query.statistics"
    assert request.metadata.dst_node_id == 7
    assert request.content["config"]["server-round"] == 3
