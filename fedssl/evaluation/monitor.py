"""The kNN accuracy at every evaluation, on training images; the test set stays unseen."""

from dataclasses import dataclass

import numpy as np

from fedssl.compute import Backend
from fedssl.data.image_set import Images
from fedssl.data.sources.base import NO_LABEL
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.knn import knn_accuracy
from fedssl.networks.encoder import Encoder
from fedssl.seeding import derive_seed
from fedssl.training.schedule import Schedule

BATCH_SIZE = 256


@dataclass(frozen=True)
class KnnMonitor:
    """Classifies some training images by others, the same at every evaluation.

    Attributes:
        images: training images with labels.
        seed: of the run.
        bank: images to compare with, at most.
        queries: images to classify, at most; no more than half of all.
        neighbors: that vote.
        schedule: tells the size of the images in each round.
    """

    images: Images
    seed: int
    bank: int
    queries: int
    neighbors: int
    backend: Backend
    schedule: Schedule

    def accuracy(self, encoder: Encoder, round_number: int) -> float:
        """Give the top-1, from 0 to 1, of the frozen encoder after a round.

        Raises:
            ValueError: the images have no labels.
        """
        pixels, labels = self.images.pixels, self.images.labels
        if labels is None:
            raise ValueError("images without labels can't be monitored")
        order = np.random.default_rng(derive_seed(self.seed, "monitor")).permutation(len(pixels))
        order = order[labels[order] != NO_LABEL]
        queries = order[: min(self.queries, len(order) // 2)]
        bank = order[len(queries) : len(queries) + self.bank]
        resolution = self.schedule.eval_resolution(round_number)
        features, asked = (
            extract_features(encoder, pixels[rows], self.backend, BATCH_SIZE, resolution)
            for rows in (bank, queries)
        )
        return knn_accuracy(features, labels[bank], asked, labels[queries], self.neighbors)
