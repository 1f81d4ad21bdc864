"""Negatives of other clients: what travels of projections, and what is drawn from it."""

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedssl.federation.messages import BUFFERS, pack_tensors, unpack_tensors, write_tensors
from fedssl.federation.negatives import (
    CLIENTS,
    COUNT,
    draw_negatives,
    flatten,
    newest,
    others,
    read_projections,
    unflatten,
)

pytestmark = pytest.mark.usefixtures("narrow")

SIZE = 4


def told(mean=0.0, scale=1.0):
    return {
        "mean": torch.full((SIZE,), mean),
        "covariance": scale * (torch.eye(SIZE) + torch.ones(SIZE, SIZE)),
    }


def test_moments_come_back_as_they_were():
    moments = told(2.0)
    read = read_projections(RecordDict({**write_tensors(moments)}), SIZE)
    assert read.keys() == moments.keys()
    assert all(torch.equal(read[name], moments[name]) for name in read)


BAD = {
    "holds no moments": None,
    "are": {"mean": torch.zeros(SIZE)},
    r"mean of its projections is \(1,\)": told() | {"mean": torch.zeros(1)},
    "mean of its projections is not finite": told(float("inf")),
    "not symmetric": told() | {"covariance": torch.ones(SIZE, SIZE).triu()},
    "negative variances": told(scale=-1.0),
    r"covariance of its projections is \(4, 4\)": told()
    | {"covariance": torch.eye(SIZE, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", BAD)
def test_odd_moments_are_refused(message):
    given = BAD[message]
    content = RecordDict()
    if given is not None:
        content = RecordDict({BUFFERS: ConfigRecord({BUFFERS: pack_tensors(given)})})
    with pytest.raises(ValueError, match=message):
        read_projections(content, SIZE)


def test_points_lie_where_the_projections_do():
    drawn = unpack_tensors(draw_negatives({3: told(5.0), 1: told(-5.0, 4.0)}, 0, 1))
    points, owners = drawn["points"], drawn["owners"]
    assert points.shape == (COUNT, SIZE)
    for partition, expected in ((3, told(5.0)), (1, told(-5.0, 4.0))):
        own = points[owners == partition]
        assert len(own) == COUNT // 2
        torch.testing.assert_close(own.mean(dim=0), expected["mean"], atol=0.3, rtol=0)
        torch.testing.assert_close(torch.cov(own.T), expected["covariance"], atol=0.3, rtol=0.15)


def test_a_client_gets_the_points_of_the_others():
    packed = draw_negatives({0: told(5.0), 1: told(-5.0)}, 0, 1)
    assert others(packed, 0).mean() < -4
    assert others(packed, 1).mean() > 4
    assert len(others(packed, 7)) == COUNT
    assert others(None, 0) is None


def test_the_seed_and_the_round_decide():
    first, again, later, other = (
        draw_negatives({0: told(), 1: told()}, seed, number)
        for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert first == again
    assert len({first, later, other}) == 3


def test_a_client_with_few_images_has_a_distribution():
    thin = torch.zeros(SIZE, SIZE)
    thin[0, 0] = 1.0  # of rank one
    packed = draw_negatives({0: told() | {"covariance": thin}, 1: told()}, 0, 1)
    assert torch.isfinite(unpack_tensors(packed)["points"]).all()


def test_what_clients_told_goes_through_a_checkpoint():
    before = {5: told(1.0), 2: told(2.0)}
    after = unflatten({"momentum.x": torch.zeros(1), **flatten(before)})
    assert list(after) == [5, 2]
    assert all(torch.equal(after[p][n], before[p][n]) for p in before for n in before[p])


def test_the_newest_clients_are_kept():
    many = {number: told() for number in range(CLIENTS + 3)}
    assert list(newest(many)) == list(range(3, CLIENTS + 3))
