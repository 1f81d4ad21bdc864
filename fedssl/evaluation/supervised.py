"""The bound that labels alone give: the same network trained from scratch."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from fedssl.evaluation.base import EvaluationData
from fedssl.evaluation.classifier import ClassifierEvaluation, fit, put_head, score_networks
from fedssl.networks.encoder import Encoder
from fedssl.runs.results import Score
from fedssl.seeding import generator_for


@dataclass(frozen=True)
class SupervisedTraining(ClassifierEvaluation):
    """The whole network trained from random weights on nothing but the labelled images."""

    mode = "supervised"
    starts_from_scratch = True

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score trained copies of an encoder at random initialization."""
        return [Score(name, "supervised", score_networks(encoder, data, self.train))]

    def train(
        self, encoder: Encoder, data: EvaluationData, rows: np.ndarray, seed: int
    ) -> nn.Linear:
        """Train the encoder, BatchNorm's statistics too, in place with the head returned."""
        generator = generator_for(seed, "supervised")
        head, logits_of, targets = put_head(encoder, data, rows, generator)
        encoder.train()
        parameters = [*head.parameters(), *encoder.parameters()]
        fit(self, [{"params": parameters, "lr": self.learning_rate}], logits_of, targets, generator)
        encoder.eval()
        return head
