"""The linear head, and nearest neighbours beside it, on a frozen encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.small import COMMON, HEAD, make_data, make_encoder

from fedssl.evaluation import base
from fedssl.evaluation.linear import LinearEvaluation, train_linear_head

LINEAR = LinearEvaluation(**COMMON, **HEAD, knn_neighbors=10)


def test_a_linear_head_learns_what_is_linear(rng):
    features = rng.normal(size=(300, 5)).astype(np.float32) * [1, 10, 100, 1, 1] + 50
    labels = (features[:, 1] > 50).astype(np.int64)
    settings = replace(LINEAR, epochs=40, learning_rate=0.1)
    predict = train_linear_head(features, labels, 2, settings, seed=0)
    assert (predict(features) == labels).mean() > 0.95


def test_the_frozen_encoder_is_bit_identical_afterwards(digits):
    encoder = make_encoder().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    scores = LINEAR.run("ours", encoder, make_data(digits))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert [score.method for score in scores] == ["linear head", "converged head", "kNN"]
    assert all(0.6 < score.mean <= 1 for score in scores)  # ten classes, random features
    assert len(scores[0].top1) == 2


def test_a_changed_encoder_is_noticed(digits, monkeypatch):
    def careless(encoder, pixels, *rest):
        encoder.train()
        with torch.no_grad():
            return encoder(torch.from_numpy(np.array(pixels)).float() / 255).numpy()

    monkeypatch.setattr(base, "extract_features", careless)
    with pytest.raises(RuntimeError, match="encoder changed"):
        LINEAR.run("ours", make_encoder(), make_data(digits))


def test_two_tensors_are_trained_for_each_draw(digits, monkeypatch):
    trained, optimizer = [], torch.optim.SGD

    def look(groups, **settings):
        trained.append([tuple(p.shape) for group in groups for p in group["params"]])
        return optimizer(groups, **settings)

    monkeypatch.setattr(torch.optim, "SGD", look)
    LINEAR.run("ours", make_encoder(), make_data(digits, 2))
    assert trained == [[(10, 512), (10,)]] * 2  # weights and biases of the head


def test_the_whole_test_set_is_scored(digits, monkeypatch):
    seen, extract = [], base.extract_features

    def count(encoder, pixels, *rest):
        seen.append(len(pixels))
        return extract(encoder, pixels, *rest)

    monkeypatch.setattr(base, "extract_features", count)
    LINEAR.run("ours", make_encoder(), make_data(digits, 3))
    assert seen[1:] == [360]
    assert 143 <= seen[0] <= 3 * 143  # the labelled images of all seeds, each once


def test_the_same_seeds_give_the_same_scores(digits):
    first, again = (LINEAR.run("ours", make_encoder(), make_data(digits)) for _ in range(2))
    assert first == again
