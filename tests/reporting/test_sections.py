"""The pictures of the report: what they are drawn from."""

import numpy as np
from evaluation.small import BACKEND, make_encoder

from fedssl.data.image_set import Images
from fedssl.evaluation.features import extract_features
from fedssl.reporting.sections import Encoders, RunImages, encode_some


class Bare:
    """An image set without test images."""

    def __init__(self, images):
        self.train, self.test = Images(images.pixels, None), None


def test_some_test_images_are_encoded_before_and_after_training(digits):
    encoders = Encoders(make_encoder(0), make_encoder(1), 3, 8, 16, BACKEND)
    encoded = encode_some(RunImages(digits, [], encoders), 40, seed=0)
    assert (encoded.kind, encoded.round, len(encoded.labels)) == ("test", 3, 40)
    for features, encoder in ((encoded.before, make_encoder(0)), (encoded.after, make_encoder(1))):
        expected = extract_features(encoder, encoded.pixels, BACKEND, 256, 8)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    again = encode_some(RunImages(digits, [], encoders), 40, seed=0)
    other = encode_some(RunImages(digits, [], encoders), 40, seed=1)
    assert np.array_equal(encoded.pixels, again.pixels)
    assert not np.array_equal(encoded.pixels, other.pixels)


def test_training_images_stand_in_where_there_are_no_others(digits):
    encoders = Encoders(make_encoder(0), make_encoder(1), 3, 8, 16, BACKEND)
    encoded = encode_some(RunImages(Bare(digits.train), [], encoders), 5, seed=0)
    assert (encoded.kind, encoded.labels, len(encoded.pixels)) == ("training", None, 5)
