"""A head whose fit has converged, with the decay that folds choose."""

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from fedssl.evaluation import converged
from fedssl.evaluation.converged import DECAYS, fit_converged_head


@pytest.fixture
def blobs(rng):
    """Draw 3 classes in 20 dimensions that overlap."""
    centres = rng.normal(size=(3, 20)) * 0.5
    labels = rng.integers(0, 3, 400)
    features = (centres[labels] + rng.normal(size=(400, 20))).astype(np.float32) * 7 + 3
    return features, labels


def chosen_classifier(features, labels, monkeypatch):
    """Fit a head; give its classifier."""
    made, pipeline = [], converged.make_pipeline
    monkeypatch.setattr(
        converged, "make_pipeline", lambda *steps: made.append(pipeline(*steps)) or made[-1]
    )
    fit_converged_head(features, labels, seed=0)
    return made[0][-1]


def test_the_fit_is_the_minimum_of_the_stated_loss(blobs, monkeypatch):
    features, labels = blobs
    classifier = chosen_classifier(features, labels, monkeypatch)
    inputs = torch.from_numpy(StandardScaler().fit_transform(features)).double()
    weights = torch.tensor(classifier.coef_, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(classifier.intercept_, dtype=torch.float64, requires_grad=True)
    decay = 1 / (classifier.C_ * len(labels))
    assert decay == pytest.approx(min(DECAYS, key=lambda value: abs(value - decay)))
    loss = torch.nn.functional.cross_entropy(inputs @ weights.T + bias, torch.from_numpy(labels))
    (loss + decay / 2 * weights.square().sum()).backward()
    assert float(weights.grad.norm()) < 2e-3
    assert float(bias.grad.norm()) < 2e-3


def test_folds_choose_the_decay(blobs, rng, monkeypatch):
    features, labels = blobs
    noise = rng.normal(size=(400, 300)).astype(np.float32)  # 300 features without meaning
    noisy = chosen_classifier(np.hstack([features, noise]), labels, monkeypatch)
    separable = np.eye(3, dtype=np.float32)[labels] + rng.normal(size=(400, 3)) * 0.01
    clean = chosen_classifier(separable.astype(np.float32), labels, monkeypatch)
    assert noisy.C_ < 1 / (0.03 * 400)  # a decay of more than 0.03
    assert clean.score(StandardScaler().fit_transform(separable), labels) == 1


@pytest.mark.parametrize("counts", [[5, 5, 1], [2, 2, 2], [1, 1, 1], [30, 1]])
def test_few_labels_are_no_obstacle(counts, rng, recwarn):
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.eye(3, dtype=np.float32)[labels] + rng.normal(size=(len(labels), 3)) * 0.01
    predict = fit_converged_head(features.astype(np.float32), labels, seed=0)
    assert (predict(features) == labels).mean() >= max(counts) / len(labels)
    assert not recwarn.list


def test_a_seed_gives_the_same_head(blobs):
    features, labels = blobs
    first, again = (fit_converged_head(features, labels, 3)(features) for _ in range(2))
    assert (first == again).all()
