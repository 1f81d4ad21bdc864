import numpy as np
import torch
from conftest import CPU
from PIL import Image

from fedssl.evaluation.features import extract_features, shrink
from fedssl.evaluation.knn import knn_accuracy, nearest_neighbours


def test_features_come_from_eval_mode_and_leave_no_trace(model, digits):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = extract_features(model, digits.test.pixels[:40], CPU, torch.float32, 40, 8)
    parts = extract_features(model, digits.test.pixels[:40], CPU, torch.float32, 7, 8)
    assert whole.shape == (40, 512)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)  # no batch statistics
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_knn_on_four_points():
    bank = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1])
    queries = np.array([[2, 0.1], [0.1, 3]], dtype=np.float32)
    assert knn_accuracy(bank, labels, queries, np.array([0, 1]), neighbors=3) == 1.0
    assert knn_accuracy(bank, labels, queries, np.array([1, 1]), neighbors=3) == 0.5
    assert knn_accuracy(bank, labels, queries, np.array([0, 1]), neighbors=99) == 1.0


def test_knn_lets_near_neighbours_outvote_many_far_ones():
    bank = np.array([[1, 0], [0, 1], [0.05, 1], [-0.05, 1]], dtype=np.float32)
    labels = np.array([0, 1, 1, 1])
    query = np.array([[1, 0.05]], dtype=np.float32)
    assert knn_accuracy(bank, labels, query, np.array([0]), neighbors=4) == 1.0


def test_larger_images_are_shrunk_as_pillow_does(rng):
    large = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    small = shrink(torch.from_numpy(large)[None].float(), 12)[0]
    picture = Image.fromarray(large.transpose(1, 2, 0)).resize((12, 12), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(small, np.array(picture).transpose(2, 0, 1), atol=1.01)  # rounds
    assert torch.equal(shrink(small[None], 12)[0], small)


def test_features_are_those_of_the_shrunk_images(model, digits):
    small = np.array(digits.test.pixels[:3])
    enlarged = small.repeat(2, axis=2).repeat(2, axis=3)
    shrunk = extract_features(model, enlarged, CPU, torch.float32, 3, 8)
    whole = extract_features(model, enlarged, CPU, torch.float32, 3, 16)
    own = extract_features(model, small, CPU, torch.float32, 3, 8)
    assert np.abs(shrunk - own).mean() < np.abs(whole - own).mean()


def test_nearest_neighbours_follow_the_direction_and_leave_the_query_out():
    features = np.array([[1, 0], [5, 0.1], [0, 1], [0, 0], [1, 0]], dtype=np.float32)
    rows, similarity = nearest_neighbours(features, np.array([0, 2]), 3)
    assert rows.tolist() == [[4, 1, 2], [1, 0, 3]]
    np.testing.assert_allclose(similarity[0], [1, 5 / np.hypot(5, 0.1), 0], atol=1e-6)
