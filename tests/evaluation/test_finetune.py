"""Fine-tuning."""

from dataclasses import replace

import pytest
import torch
from evaluation.small import COMMON, HEAD, make_data, make_encoder

from fedssl.evaluation.finetune import FineTuning
from fedssl.networks.state import state_digest

TUNED = FineTuning(**COMMON, **HEAD, encoder_learning_rate=0.001, knn_neighbors=10)


@pytest.mark.slow
def test_it_changes_a_copy_and_beats_chance(digits):
    encoder = make_encoder()
    before = state_digest(encoder)
    (score,) = replace(TUNED, epochs=20).run("ours", encoder, make_data(digits, 1))
    assert (score.encoder, score.method, score.encoder_sha256) == ("ours", "fine-tuned", None)
    assert score.mean > 0.5
    assert state_digest(encoder) == before


def test_weights_move_and_batch_statistics_stay(digits):
    encoder, data = make_encoder(), make_data(digits, 1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    (seed, rows), *_ = data.draws()
    replace(TUNED, epochs=1).train(encoder, data, rows, seed)
    after = encoder.state_dict()
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert all(
        torch.equal(before[name], after[name])
        for name, _ in encoder.named_buffers()
        if name in after
    )


def test_it_trains_at_the_size_that_is_scored(digits, monkeypatch):
    encoder, data, sizes = make_encoder(), make_data(digits, 2, resolution=6), []
    encoder.register_forward_pre_hook(lambda _, images: sizes.append(images[0].shape[-1]))
    replace(TUNED, epochs=1).run("ours", encoder, data)
    assert set(sizes) == {6}
