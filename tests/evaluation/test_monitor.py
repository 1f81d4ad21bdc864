"""The kNN accuracy after every round."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation.small import BACKEND, make_encoder

from fedssl.data.image_set import Images
from fedssl.evaluation import monitor as module
from fedssl.evaluation.monitor import KnnMonitor
from fedssl.training.schedule import Schedule


@pytest.fixture
def monitor(digits):
    schedule = Schedule(num_rounds=2, image_size=8, train_resolutions=[4, 8])
    return KnnMonitor(digits.train, 0, 2000, 1000, 10, BACKEND, schedule)


def test_it_scores_as_well_each_time_and_better_than_chance(monitor):
    encoder = make_encoder()
    accuracy = monitor.accuracy(encoder, 2)
    assert 0.5 < accuracy < 1
    assert monitor.accuracy(encoder, 2) == accuracy
    assert replace(monitor, seed=1).accuracy(encoder, 2) != accuracy  # other images


def test_queries_are_no_more_than_half_and_never_in_the_bank(monitor, monkeypatch):
    seen = []

    def look(encoder, images, backend, batch_size, resolution):
        seen.append((images, resolution))
        return np.ones((len(images), 1), dtype=np.float32)

    monkeypatch.setattr(module, "extract_features", look)
    monitor.accuracy(make_encoder(), 1)
    replace(monitor, bank=100, queries=50).accuracy(make_encoder(), 2)
    assert [len(images) for images, _ in seen] == [719, 718, 100, 50]  # of 1,437
    assert [resolution for _, resolution in seen] == [4, 4, 8, 8]
    bank, queries = ({image.tobytes() for image in images} for images, _ in seen[2:])
    assert len(bank & queries) <= 1  # a digit or two is there twice


def test_images_without_labels_are_refused(monitor):
    bare = replace(monitor, images=Images(monitor.images.pixels, None))
    with pytest.raises(ValueError, match="without labels"):
        bare.accuracy(make_encoder(), 1)
