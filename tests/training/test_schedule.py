"""What changes over the rounds."""

from itertools import pairwise

import pytest

from fedssl.training.schedule import RoundPlan, Schedule, cosine


def test_train_resolutions_have_equal_parts_of_the_run():
    schedule = Schedule(7, 32, train_resolutions=[16, 24, 32])
    sides = [schedule.train_resolution(number) for number in range(1, 8)]
    assert sides == [16, 16, 16, 24, 24, 32, 32]
    short = Schedule(2, 32, train_resolutions=[16, 24, 32])
    assert [short.train_resolution(number) for number in (1, 2)] == [16, 24]


def test_without_resolutions_views_have_the_images_size():
    assert Schedule(7, 32).train_resolution(3) == 32


def test_a_round_behind_the_last_is_taken_for_the_last():
    """As a checkpoint of a longer run has it."""
    assert Schedule(7, 32, train_resolutions=[16, 32]).train_resolution(9) == 32


def test_whole_images_have_the_size_of_the_views_unless_told_otherwise():
    growing = Schedule(2, 32, train_resolutions=[16, 24])
    assert [growing.eval_resolution(number) for number in (1, 2)] == [16, 24]
    told = Schedule(2, 32, train_resolutions=[16], whole_resolution=24)
    assert told.eval_resolution(1) == 24


def test_images_are_never_enlarged():
    assert Schedule(2, 32, train_resolutions=[48]).eval_resolution(1) == 32
    assert Schedule(2, 32, whole_resolution=64).eval_resolution(2) == 32


def test_rounds_are_whole_unless_told_otherwise():
    plans = [Schedule(4, 32).plan(number) for number in range(1, 5)]
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = [RoundPlan(1.0, *ends) for ends in pairwise(edges)]
    assert plans == expected


def test_short_rounds_take_as_little_of_the_schedule_and_leave_no_gap():
    schedule = Schedule(6, 32, round_fractions=[0.1, 0.5, 1])
    plans = [schedule.plan(number) for number in range(1, 7)]
    assert [plan.fraction for plan in plans] == [0.1, 0.1, 0.5, 0.5, 1, 1]
    assert plans[0].begin == 0
    assert plans[-1].end == pytest.approx(1)
    ends, begins = [plan.end for plan in plans[:-1]], [plan.begin for plan in plans[1:]]
    assert ends == pytest.approx(begins)
    assert [p.end - p.begin for p in plans] == pytest.approx([p.fraction / 3.2 for p in plans])


def test_progress_runs_from_the_begin_to_the_end_of_a_round():
    plan = RoundPlan(1.0, 0.25, 0.75)
    assert [plan.progress(part) for part in (0, 0.5, 1)] == [0.25, 0.5, 0.75]


def test_the_rate_falls_from_one_to_nothing():
    assert cosine(0) == 1
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1) == pytest.approx(0)
    values = [cosine(part / 20) for part in range(21)]
    assert values == sorted(values, reverse=True)
