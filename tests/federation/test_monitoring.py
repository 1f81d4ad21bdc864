"""What looks like a collapse or a drifting client, and what does not."""

from dataclasses import replace

import pytest

from fedssl.federation.monitoring import find_warnings
from fedssl.runs.metrics import ClientMetrics, RoundMetrics


def round_of(uniformity=-2.0, effective_rank=10.0, norms=(1.0, 1.1, 0.9), cosines=(0.5, 0.4, 0.6)):
    clients = tuple(
        ClientMetrics(number, update_norm=norm, cosine=cosine)
        for number, (norm, cosine) in enumerate(zip(norms, cosines, strict=True))
    )
    return RoundMetrics(1, uniformity=uniformity, effective_rank=effective_rank, clients=clients)


@pytest.mark.parametrize(
    "sound",
    [
        {},
        {"uniformity": None, "effective_rank": None},
        {"norms": (0.0, 0.0, 0.0)},
        {"norms": (1.0, 9.0), "cosines": (0.5, -0.5)},  # of two, nobody knows which one drifts
        {"norms": (1.0, 9.0, None), "cosines": (0.5, 0.4, None)},  # only evaluated
        {"cosines": (0.5, None, 0.6)},
    ],
)
def test_a_sound_round_gives_no_warning(sound):
    assert find_warnings(round_of(**sound)) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"uniformity": -0.01}, "collapsed to a point"),
        ({"effective_rank": 1.2}, "collapsed to a line"),
        ({"norms": (1.0, 5.0, 0.9)}, "client 1 drifts away: its update norm is 5.0 times"),
        ({"cosines": (0.5, 0.4, -0.3)}, "client 2 drifts away: it moves against the others"),
    ],
)
def test_each_trouble_is_named(wrong, message):
    (warning,) = find_warnings(round_of(**wrong))
    assert message in warning


def images_of(*counts, **more):
    clients = tuple(ClientMetrics(n, num_examples=count) for n, count in enumerate(counts))
    return replace(round_of(), clients=(*clients[:-1], replace(clients[-1], **more)))


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({}, []),
        ({0: 90, 1: 180}, []),
        ({0: 90, 1: 270}, ["client 1 trained on 180 images, 270 before: some have vanished"]),
        ({0: 90, 1: 100}, ["client 1 trained on 180 images, 100 before: some were added"]),
    ],
)
def test_images_that_vanish_or_are_added_are_told(earlier, expected):
    assert find_warnings(images_of(90, 180), earlier) == expected


def test_who_only_evaluated_has_lost_no_images():
    assert find_warnings(images_of(90, None), {0: 90, 1: 180}) == []


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"unreadable_images": 0, "num_held_out": 4}, []),
        ({"unreadable_images": 1, "num_held_out": 4}, ["left out 1 unreadable image of 41"]),
        ({"unreadable_images": 3}, ["left out 3 unreadable images"]),
    ],
)
def test_images_that_cannot_be_read_are_told_by_the_name_of_the_node(told, expected):
    found = find_warnings(images_of(36, name="north", **told))
    assert found == [f"north {line}" for line in expected]


def test_a_collapse_and_a_drift_are_both_told():
    found = find_warnings(round_of(uniformity=0.0, norms=(1.0, 5.0, 0.9)))
    assert len(found) == 2
