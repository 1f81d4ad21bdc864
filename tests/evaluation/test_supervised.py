"""Supervised training from scratch."""

from dataclasses import replace

import torch
from evaluation.small import COMMON, make_data, make_encoder

from fedssl.evaluation.classifier import deal_batches
from fedssl.evaluation.supervised import SupervisedTraining
from fedssl.networks.state import state_digest

SETTINGS = {"epochs": 10, "batch_size": 16, "learning_rate": 0.02, "weight_decay": 5e-4}
SUPERVISED = SupervisedTraining(**COMMON, **SETTINGS)


def test_it_starts_afresh_and_learns(digits):
    encoder = make_encoder()
    before = state_digest(encoder)
    (score,) = SUPERVISED.run("labels only", encoder, make_data(digits, 1))
    assert score.method == "supervised"
    assert score.mean > 0.25  # 90 steps; chance is 0.1
    assert state_digest(encoder) == before
    assert SUPERVISED.starts_from_scratch


def test_no_batch_has_one_image(digits):
    """BatchNorm can't take the statistics of one, where the last map is a point."""
    data = make_data(digits, 1)
    (seed, rows), *_ = data.draws()
    assert len(rows) % 2 == 1
    replace(SUPERVISED, epochs=1, batch_size=2).train(make_encoder(), data, rows[:5], seed)
    assert list(map(len, deal_batches(torch.arange(5), 3))) == [2, 3]
    assert list(map(len, deal_batches(torch.arange(6), 3))) == [2, 2, 2]
    assert list(map(len, deal_batches(torch.arange(1), 1))) == [1]


def test_weights_and_batch_statistics_are_learned(digits):
    encoder, data = make_encoder(), make_data(digits, 1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    (seed, rows), *_ = data.draws()
    replace(SUPERVISED, epochs=1).train(encoder, data, rows, seed)
    for name in ("conv1.weight", "bn1.running_mean"):
        assert not torch.equal(before[name], encoder.state_dict()[name])
    assert not encoder.training


def test_it_trains_at_the_size_that_is_scored(digits):
    encoder, data, sizes = make_encoder(), make_data(digits, 2, resolution=6), []
    encoder.register_forward_pre_hook(lambda _, images: sizes.append(images[0].shape[-1]))
    replace(SUPERVISED, epochs=1).run("labels only", encoder, data)
    assert set(sizes) == {6}
