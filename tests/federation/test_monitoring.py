"""Alignment, uniformity and effective rank against what is known of simple layouts."""

import math

import pytest
import torch

from fedssl.federation.monitoring import find_warnings
from fedssl.runs.metrics import ClientMetrics, RoundMetrics
from fedssl.training.representation import measure_health


def test_all_in_one_point_has_rank_one_and_no_uniformity():
    health = measure_health(torch.ones(20, 8))
    assert health["alignment"] == pytest.approx(0, abs=1e-6)
    assert health["uniformity"] == pytest.approx(0, abs=1e-6)
    assert health["effective-rank"] == pytest.approx(1, abs=1e-3)


def test_orthogonal_directions_have_full_rank():
    corners = torch.eye(8)
    health = measure_health(torch.cat([corners, corners]))
    assert health["effective-rank"] == pytest.approx(8, rel=1e-6)
    assert health["uniformity"] == pytest.approx(-2 * 2, rel=1e-6)  # squared distance 2
    assert health["alignment"] == pytest.approx(0, abs=1e-9)


def test_opposite_views_are_as_badly_aligned_as_can_be():
    views = torch.randn(5, 4)
    assert measure_health(torch.cat([views, -views]))["alignment"] == pytest.approx(4)


def test_the_length_of_a_projection_does_not_matter():
    views = torch.randn(10, 4)
    assert measure_health(views) == pytest.approx(measure_health(views * 7))


def test_a_uniform_circle_has_the_uniformity_of_the_integral():
    angles = torch.arange(4000) / 4000 * 2 * math.pi
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    # mean of exp(-2 (2 - 2 cos t)) over the circle = exp(-4) I0(4)
    expected = math.log(math.exp(-4) * float(torch.special.i0(torch.tensor(4.0))))
    found = measure_health(torch.cat([circle, circle]))["uniformity"]
    assert found == pytest.approx(expected, abs=1e-3)


def a_round(uniformity=-2.0, effective_rank=10.0, norms=(1.0, 1.1, 0.9), cosines=(0.5, 0.4, 0.6)):
    clients = tuple(
        ClientMetrics(number, update_norm=norm, cosine=cosine)
        for number, (norm, cosine) in enumerate(zip(norms, cosines, strict=True))
    )
    evaluated = ClientMetrics(9, eval_loss=1.0)  # it did not train
    return RoundMetrics(
        1, uniformity=uniformity, effective_rank=effective_rank, clients=(*clients, evaluated)
    )


def test_a_sound_round_gives_no_warning():
    assert find_warnings(a_round()) == []
    assert find_warnings(a_round(uniformity=None, effective_rank=None)) == []
    assert find_warnings(a_round(norms=(0.0, 0.0, 5.0))) == []  # half of them did not move


def test_of_two_clients_nobody_knows_which_one_drifts():
    assert find_warnings(a_round(norms=(1.0, 9.0), cosines=(0.5, -0.5))) == []


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
    (warning,) = find_warnings(a_round(**wrong))
    assert message in warning
