"""The losses of the methods against their papers' formulas, loop by loop."""

import math

import pytest
import torch

from fedssl.methods.barlow_twins import barlow_twins
from fedssl.methods.moco import info_nce
from fedssl.methods.simsiam import distance
from fedssl.methods.vicreg import vicreg


def random_projections(images, size=5, seed=0):
    return torch.randn(2 * images, size, generator=torch.Generator().manual_seed(seed))


def columns(points):
    return [[float(value) for value in column] for column in points.double().T]


def mean(values):
    return sum(values) / len(values)


def covariance(one, other):
    return sum((a - mean(one)) * (b - mean(other)) for a, b in zip(one, other, strict=True))


def naive_vicreg(projections, invariance, variance, covariance_weight):
    """The paper's equations, weighed as in its authors' code."""
    first, second = projections.chunk(2)
    count, size = first.shape
    agree = sum(
        float((a - b).double() @ (a - b).double()) for a, b in zip(first, second, strict=True)
    )
    total = invariance * agree / count / size
    for half in (first, second):
        numbers = columns(half)
        lacks = [max(0, 1 - math.sqrt(covariance(z, z) / (count - 1) + 1e-4)) for z in numbers]
        total += variance * mean(lacks) / 2
        together = sum(
            (covariance(a, b) / (count - 1)) ** 2
            for i, a in enumerate(numbers)
            for j, b in enumerate(numbers)
            if i != j
        )
        total += covariance_weight * together / size
    return total


def naive_barlow_twins(projections, redundancy):
    """Equations 1 and 2 of the paper."""
    first, second = (columns(half) for half in projections.chunk(2))
    total = 0.0
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            lengths = math.sqrt(covariance(a, a) * covariance(b, b))
            correlation = covariance(a, b) / lengths
            total += (1 - correlation) ** 2 if i == j else redundancy * correlation**2
    return total


@pytest.mark.parametrize("images", [2, 3, 8])
@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_vicreg_equals_the_formula(images, weights):
    projections = random_projections(images, seed=images)
    expected = naive_vicreg(projections, *weights)
    assert float(vicreg(projections, *weights)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("images", [3, 8])
def test_barlow_twins_equals_the_formula(images):
    projections = random_projections(images, seed=images)
    expected = naive_barlow_twins(projections, 0.01)
    assert float(barlow_twins(projections, 0.01)) == pytest.approx(expected, rel=1e-3)


def test_what_each_term_of_vicreg_wants():
    spread = random_projections(64)[:64].repeat(2, 1) * 3  # equal views, wide apart
    assert float(vicreg(spread, 1, 1, 0)) == 0
    point = torch.zeros(16, 5)
    assert float(vicreg(point, 25, 25, 1)) == pytest.approx(25 * (1 - 0.01))
    line = torch.linspace(-2, 2, 8)[:, None].repeat(2, 5)
    assert float(vicreg(line, 0, 0, 1)) > float(vicreg(spread[:16] / 3, 0, 0, 1))


@pytest.mark.parametrize("loss", [vicreg, barlow_twins])
def test_gradients_are_those_of_finite_differences(loss):
    projections = random_projections(4, size=3).requires_grad_()
    loss(projections).backward()
    step = 1e-2
    for row, column in ((0, 0), (3, 1), (7, 2)):
        with torch.no_grad():
            moved = [projections.clone() for _ in range(2)]
            moved[0][row, column] += step
            moved[1][row, column] -= step
            slope = (float(loss(moved[0])) - float(loss(moved[1]))) / (2 * step)
        assert float(projections.grad[row, column]) == pytest.approx(slope, rel=0.05, abs=0.02)


@pytest.mark.parametrize("loss", [vicreg, barlow_twins])
def test_losses_are_in_float32_under_autocast(loss):
    projections = random_projections(8, size=16)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(projections.bfloat16())
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(loss(projections)), rel=0.05)


def cosine(one, other):
    one, other = one.double(), other.double()
    return float(one @ other) / float(one.norm() * other.norm())


def test_the_distance_is_that_of_unit_vectors():
    predictions, targets = random_projections(3), random_projections(3, seed=1)
    apart = [
        float(((p / p.norm()) - (t / t.norm())).square().sum())
        for p, t in zip(predictions, targets, strict=True)
    ]
    assert float(distance(predictions, targets)) == pytest.approx(mean(apart), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_the_formula(temperature):
    queries, keys = random_projections(3), random_projections(3, seed=1)
    queue = torch.nn.functional.normalize(random_projections(4, seed=2), dim=1)
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        right = math.exp(cosine(query, key) / temperature)
        others = sum(math.exp(cosine(query, point) / temperature) for point in queue)
        total -= math.log(right / (right + others))
    found = float(info_nce(queries, keys, queue, temperature))
    assert found == pytest.approx(total / len(queries), rel=1e-5)
