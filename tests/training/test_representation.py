"""Alignment, uniformity and effective rank against what is known of simple layouts."""

import math

import pytest
import torch

from fedssl.training.representation import measure_representation


def test_all_in_one_point_has_rank_one_and_no_uniformity():
    found = measure_representation(torch.ones(20, 8))
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert found["effective-rank"] == pytest.approx(1, abs=1e-3)


def test_all_on_one_line_has_rank_one_but_two_ends():
    ends = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    found = measure_representation(ends.repeat(10, 1))
    assert found["effective-rank"] == pytest.approx(1, abs=1e-3)
    assert found["uniformity"] < -0.5


def test_orthogonal_directions_have_full_rank():
    corners = torch.eye(8)
    found = measure_representation(torch.cat([corners, corners]))
    assert found["effective-rank"] == pytest.approx(8, rel=1e-6)
    assert found["uniformity"] == pytest.approx(-2 * 2, rel=1e-6)  # squared distance 2
    assert found["alignment"] == pytest.approx(0, abs=1e-9)


def test_all_zeros_are_no_division_by_nothing():
    found = measure_representation(torch.zeros(8, 4))
    assert all(math.isfinite(value) for value in found.values())


def test_opposite_views_are_as_badly_aligned_as_can_be():
    views = torch.randn(5, 4)
    found = measure_representation(torch.cat([views, -views]))
    assert found["alignment"] == pytest.approx(4)


def test_the_length_of_a_projection_does_not_matter():
    views = torch.randn(10, 4)
    assert measure_representation(views) == pytest.approx(measure_representation(views * 7))


def test_bfloat16_is_measured_in_double_precision():
    views = torch.randn(10, 4).bfloat16()
    assert measure_representation(views) == measure_representation(views.float())


def test_a_uniform_circle_has_the_uniformity_of_the_integral():
    angles = torch.arange(4000) / 4000 * 2 * math.pi
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    # mean of exp(-2 (2 - 2 cos t)) over the circle = exp(-4) I0(4)
    expected = math.log(math.exp(-4) * float(torch.special.i0(torch.tensor(4.0))))
    found = measure_representation(torch.cat([circle, circle]))["uniformity"]
    assert found == pytest.approx(expected, abs=1e-3)
