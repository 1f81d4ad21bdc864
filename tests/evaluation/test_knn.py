"""Nearest neighbours in the space of the features."""

import numpy as np

from fedssl.evaluation.knn import knn_accuracy, nearest_neighbours


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


def test_nearest_neighbours_follow_the_direction_and_leave_the_query_out():
    features = np.array([[1, 0], [5, 0.1], [0, 1], [0, 0], [1, 0]], dtype=np.float32)
    rows, similarity = nearest_neighbours(features, np.array([0, 2]), 3)
    assert rows.tolist() == [[4, 1, 2], [1, 0, 3]]
    np.testing.assert_allclose(similarity[0], [1, 5 / np.hypot(5, 0.1), 0], atol=1e-6)
