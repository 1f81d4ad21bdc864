"""Features by a frozen encoder."""

import numpy as np
import torch
from evaluation.small import BACKEND, make_encoder
from PIL import Image

from fedssl.data.views import shrink
from fedssl.evaluation.features import extract_features


def test_features_come_from_eval_mode_and_leave_no_trace(digits):
    encoder = make_encoder().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    whole = extract_features(encoder, digits.test.pixels[:40], BACKEND, 40, 8)
    parts = extract_features(encoder, digits.test.pixels[:40], BACKEND, 7, 8)
    assert whole.shape == (40, 512)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)  # no batch statistics
    assert encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_larger_images_are_shrunk_as_pillow_does(rng):
    large = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    small = shrink(torch.from_numpy(large)[None].float(), 12)[0]
    picture = Image.fromarray(large.transpose(1, 2, 0)).resize((12, 12), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(small, np.array(picture).transpose(2, 0, 1), atol=1.01)  # rounds
    assert torch.equal(shrink(small[None], 12)[0], small)


def test_features_are_those_of_the_shrunk_images(digits):
    encoder, small = make_encoder(), np.array(digits.test.pixels[:3])
    enlarged = small.repeat(2, axis=2).repeat(2, axis=3)
    shrunk = extract_features(encoder, enlarged, BACKEND, 3, 8)
    whole = extract_features(encoder, enlarged, BACKEND, 3, 16)
    own = extract_features(encoder, small, BACKEND, 3, 8)
    assert np.abs(shrunk - own).mean() < np.abs(whole - own).mean()
