"""What evaluations share that train a classifier: the settings, the loop, whole networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedssl.evaluation.base import Evaluation, EvaluationData
from fedssl.evaluation.features import LogitsOf, view_logits
from fedssl.networks.encoder import Encoder

# Trains an encoder in place on the labelled rows of a seed; gives the head on it.
TrainNetwork = Callable[[Encoder, EvaluationData, np.ndarray, int], nn.Linear]


@dataclass(frozen=True)
class ClassifierEvaluation(Evaluation):
    """An evaluation that trains a classifier by SGD with momentum 0.9.

    Attributes:
        epochs: passes over the labelled images.
        batch_size: labelled images per step.
        learning_rate: of the first step; it falls to zero along a cosine.
        weight_decay: of the classifier.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


def fit(
    settings: ClassifierEvaluation,
    groups: list[dict[str, Any]],
    logits_of: LogitsOf,
    targets: Tensor,
    generator: Generator,
) -> None:
    """Minimize the cross entropy over all rows, in a new order every epoch.

    Args:
        groups: of parameters, as optimizers take them, each with its "lr".
        targets: classes, int64 (N,), on the device of the logits.
        generator: on the CPU; decides the order.
    """
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay)
    batches = -(-len(targets) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    for _ in range(settings.epochs):
        for rows in deal_batches(torch.randperm(len(targets), generator=generator), batches):
            loss = F.cross_entropy(logits_of(rows), targets[rows.to(targets.device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


def deal_batches(order: Tensor, count: int) -> list[Tensor]:
    """Cut rows (N,) into at most so many batches, without a last one of one row.

    BatchNorm refuses such a batch; of N = 1 nothing else can be made.
    """
    batches = list(order.chunk(count))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def zero_linear(features: int, classes: int, device: torch.device) -> nn.Linear:
    """Build a linear layer of zeros, which favours no class."""
    head = nn.Linear(features, classes, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def put_head(
    encoder: Encoder, data: EvaluationData, rows: np.ndarray, generator: Generator
) -> tuple[nn.Linear, LogitsOf, Tensor]:
    """Put a linear head on an encoder that trains with it, see `view_logits`.

    Args:
        rows: of the labelled training images, int64 (N,).
        generator: on the CPU; decides the views.

    Returns:
        The head; a function from places in `rows` to logits; the targets (N,).
    """
    device = data.backend.device
    pixels = np.asarray(data.train.pixels[rows])
    targets = torch.from_numpy(data.train.labels[rows]).to(device)
    head = zero_linear(encoder.feature_size, data.num_classes, device)
    logits_of = view_logits(encoder, head, pixels, data.views, data.backend, generator)
    return head, logits_of, targets


def score_networks(encoder: Encoder, data: EvaluationData, train: TrainNetwork) -> list[float]:
    """Train a copy of an encoder for each draw of labels; give the top-1 of each."""
    scores = []
    for seed, rows in data.draws():
        trained = copy.deepcopy(encoder)
        head = train(trained, data, rows, seed)
        features = torch.from_numpy(data.features(trained, data.test.pixels))
        with torch.inference_mode():
            predicted = head(features.to(data.backend.device)).argmax(dim=1).cpu().numpy()
        scores.append(data.top1(predicted))
    return scores
