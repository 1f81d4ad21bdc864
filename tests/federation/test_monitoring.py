"""What looks like a collapse or a drifting client, and what does not."""

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


def test_a_collapse_and_a_drift_are_both_told():
    found = find_warnings(round_of(uniformity=0.0, norms=(1.0, 5.0, 0.9)))
    assert len(found) == 2
