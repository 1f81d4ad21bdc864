import pytest

from fedssl.training.schedule import cosine, encode_size, plan_round, view_size


def test_view_sizes_have_equal_parts_of_the_run():
    sizes = [view_size([16, 24, 32], 32, number, 7) for number in range(1, 8)]
    assert sizes == [16, 16, 16, 24, 24, 32, 32]
    assert [view_size([16, 24, 32], 32, number, 2) for number in (1, 2)] == [16, 24]
    assert view_size([], 32, 3, 7) == 32
    assert view_size([16, 32], 32, 9, 7) == 32  # a checkpoint of a longer run


def test_images_are_encoded_as_the_views_unless_told_otherwise():
    assert encode_size({"view_sizes": [16, 24]}, 32, 1, 2) == 16
    assert encode_size({"view_sizes": [16, 24], "encode_size": None}, 32, 2, 2) == 24
    assert encode_size({"view_sizes": [16], "encode_size": 24}, 32, 1, 2) == 24
    assert encode_size({"view_sizes": [48]}, 32, 1, 2) == 32  # images are never enlarged


@pytest.mark.parametrize("train", [{}, {"round_lengths": []}])
def test_rounds_are_whole_unless_told_otherwise(train):
    plans = [plan_round(train, number, 4) for number in range(1, 5)]
    assert plans == [(1.0, (0.0, 0.25)), (1.0, (0.25, 0.5)), (1.0, (0.5, 0.75)), (1.0, (0.75, 1.0))]


def test_short_rounds_take_as_little_of_the_schedule_and_leave_no_gap():
    plans = [plan_round({"round_lengths": [0.1, 0.5, 1]}, number, 6) for number in range(1, 7)]
    assert [length for length, _ in plans] == [0.1, 0.1, 0.5, 0.5, 1, 1]
    parts = [part for _, part in plans]
    assert parts[0][0] == 0
    assert parts[-1][1] == pytest.approx(1)
    assert [end for _, end in parts[:-1]] == pytest.approx([begin for begin, _ in parts[1:]])
    assert [end - begin for begin, end in parts] == pytest.approx([n / 3.2 for n, _ in plans])


def test_the_rate_falls_from_one_to_nothing():
    assert cosine(0) == 1
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1) == pytest.approx(0)
