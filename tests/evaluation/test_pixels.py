"""Logistic regression on the raw pixels."""

import pytest
from evaluation.small import make_data

from fedssl.evaluation.pixels import score_raw_pixels


def test_digits_can_be_told_apart_by_their_pixels(digits):
    score = score_raw_pixels(make_data(digits, 3))
    assert (score.encoder, score.method) == ("raw pixels", "logistic regression")
    assert score.mean == pytest.approx(0.917, abs=0.02)
    assert len(score.top1) == 3


def test_the_images_keep_their_own_size(digits):
    small, whole = make_data(digits, 1, resolution=4), make_data(digits, 1)
    assert score_raw_pixels(small) == score_raw_pixels(whole)
