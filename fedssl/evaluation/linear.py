"""Linear evaluation: a linear head, and nearest neighbours, over a frozen encoder."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from fedssl.evaluation.base import EvaluationData
from fedssl.evaluation.classifier import ClassifierEvaluation, fit, zero_linear
from fedssl.evaluation.converged import fit_converged_head
from fedssl.evaluation.knn import knn_accuracy
from fedssl.networks.encoder import Encoder
from fedssl.networks.state import state_digest
from fedssl.runs.results import Score
from fedssl.seeding import generator_for


@dataclass(frozen=True)
class LinearEvaluation(ClassifierEvaluation):
    """A linear head on the features of the frozen encoder, trained and converged, and kNN.

    Attributes:
        knn_neighbors: that vote.
    """

    mode = "linear"

    knn_neighbors: int

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score all three, with the checksum that the encoder had before and after.

        Raises:
            RuntimeError: the encoder changed, which would be a defect.
        """
        digest = state_digest(encoder)
        rows = np.unique(np.concatenate(data.labelled))
        features = data.features(encoder, data.train.pixels[rows])
        test_features = data.features(encoder, data.test.pixels)
        linear, converged, knn = [], [], []
        for seed, labelled in data.draws():
            bank, labels = features[np.searchsorted(rows, labelled)], data.train.labels[labelled]
            predict = train_linear_head(bank, labels, data.num_classes, self, seed)
            linear.append(data.top1(predict(test_features)))
            predict = fit_converged_head(bank, labels, seed)
            converged.append(data.top1(predict(test_features)))
            test = test_features, data.test.labels
            knn.append(knn_accuracy(bank, labels, *test, self.knn_neighbors))
        if state_digest(encoder) != digest:
            raise RuntimeError("the frozen encoder changed during the evaluation")
        return [
            Score(name, "linear head", linear, encoder_sha256=digest),
            Score(name, "converged head", converged, encoder_sha256=digest),
            Score(name, "kNN", knn, encoder_sha256=digest),
        ]


def train_linear_head(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    settings: ClassifierEvaluation,
    seed: int,
) -> Callable[[np.ndarray], np.ndarray]:
    """Train a linear softmax classifier on standardized features.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), below num_classes.

    Returns:
        A function from features (M, D) to predicted classes (M,).
    """
    scaler = StandardScaler().fit(features)
    inputs = torch.from_numpy(scaler.transform(features)).float()
    head = zero_linear(inputs.shape[1], num_classes, torch.device("cpu"))
    groups = [{"params": list(head.parameters()), "lr": settings.learning_rate}]
    order = generator_for(seed, "head")
    fit(settings, groups, lambda rows: head(inputs[rows]), torch.from_numpy(labels), order)

    @torch.inference_mode()
    def predict(queries: np.ndarray) -> np.ndarray:
        return head(torch.from_numpy(scaler.transform(queries)).float()).argmax(dim=1).numpy()

    return predict
