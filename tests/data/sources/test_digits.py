import numpy as np
import pytest
from conftest import open_images

from fedssl.data.sources.digits import DigitsSource
from fedssl.errors import UserError

DIGITS = DigitsSource(name="digits", test_fraction=0.2)


def test_the_digits_are_split_by_the_seed_with_the_class_shares_kept(cache_dir, digits):
    assert (len(digits.train.pixels), len(digits.test.pixels)) == (1437, 360)
    assert digits.train.pixels.shape[1:] == (3, 8, 8)
    shares = [np.bincount(part.labels) / len(part.labels) for part in (digits.train, digits.test)]
    np.testing.assert_allclose(*shares, atol=0.005)
    other = open_images(DIGITS, 8, cache_dir, seed=1)
    assert not np.array_equal(other.test.labels, digits.test.labels)
    whole = [np.concatenate([s.train.pixels, s.test.pixels]) for s in (digits, other)]
    rows = [np.sort(w.reshape(len(w), -1).view("S192").ravel()) for w in whole]
    assert np.array_equal(*rows)  # the same 1,797 images, split otherwise


def test_without_a_share_all_digits_are_for_training(cache_dir):
    source = DigitsSource(name="digits", test_fraction=None)
    found = open_images(source, 8, cache_dir)
    assert (len(found.train.pixels), found.test, found.labelled) == (1797, None, False)
    assert source.fingerprint(0) == source.fingerprint(1)


def test_a_folder_that_would_be_left_unread_is_refused(pets):
    with pytest.raises(UserError, match=r"dataset\.path=/.*dataset=imagefolder"):
        DigitsSource(name="digits", path=str(pets), test_fraction=0.2).check()
    with pytest.raises(UserError, match="no such folder"):
        DigitsSource(name="digits", path="nowhere", test_fraction=0.2).check()
