"""The bound that labels alone give: the same network trained from scratch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedssl.data.views import Augmentation
from fedssl.evaluation.classifier import _classifier, _fit
from fedssl.seeding import generator_for
from model import SimCLR


def train_supervised(
    model: SimCLR,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    augmentation: Augmentation,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """Train a fresh encoder in place, with a linear head, on nothing but labelled images.

    As `finetune`, but BatchNorm's statistics are learned, too, and settings are
    those of its section `supervised`. Returns the head.
    """
    generator = generator_for(seed, "supervised")
    head, logits_of = _classifier(model, images, num_classes, augmentation, dtype, generator)
    model.train()
    parameters = [*head.parameters(), *model.encoder.parameters()]
    groups = [{"params": parameters, "lr": settings["learning_rate"]}]
    _fit(groups, logits_of, torch.from_numpy(labels), settings, generator)
    model.eval()
    return head
