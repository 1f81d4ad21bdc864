"""Fine-tuning: the encoder is trained on labels together with a linear head."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from fedssl.evaluation.base import EvaluationData
from fedssl.evaluation.classifier import ClassifierEvaluation, fit, put_head, score_networks
from fedssl.networks.encoder import Encoder
from fedssl.runs.results import Score
from fedssl.seeding import generator_for


@dataclass(frozen=True)
class FineTuning(ClassifierEvaluation):
    """The encoder tuned together with its head, from the same start for each draw of labels.

    Attributes:
        encoder_learning_rate: of the encoder, which has no weight decay.
        knn_neighbors: as in the linear evaluation; not used.
    """

    mode = "finetune"

    encoder_learning_rate: float
    knn_neighbors: int

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score tuned copies of the encoder."""
        return [Score(name, "fine-tuned", score_networks(encoder, data, self.train))]

    def train(
        self, encoder: Encoder, data: EvaluationData, rows: np.ndarray, seed: int
    ) -> nn.Linear:
        """Train the encoder in place together with the head that is returned.

        BatchNorm keeps its statistics: those of small labelled batches are worse.
        """
        generator = generator_for(seed, "finetune")
        head, logits_of, targets = put_head(encoder, data, rows, generator)
        encoder.eval()
        groups = [
            {"params": list(head.parameters()), "lr": self.learning_rate},
            {
                "params": list(encoder.parameters()),
                "lr": self.encoder_learning_rate,
                "weight_decay": 0.0,
            },
        ]
        fit(self, groups, logits_of, targets, generator)
        return head
