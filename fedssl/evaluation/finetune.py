"""Fine-tuning: the encoder is trained on labels together with a linear head."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedssl.data.views import Augmentation
from fedssl.evaluation.classifier import _classifier, _fit
from fedssl.seeding import generator_for
from model import SimCLR


def finetune(
    model: SimCLR,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    augmentation: Augmentation,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """Train the encoder in place together with a linear head on labelled images.

    The images (uint8, (N, 3, H, W)) are cropped, turned and flipped as in
    training, their colours stay. BatchNorm keeps its statistics: those of small
    labelled batches are worse. Returns the head.
    """
    generator = generator_for(seed, "finetune")
    head, logits_of = _classifier(model, images, num_classes, augmentation, dtype, generator)
    model.eval()
    groups = [
        {"params": list(head.parameters()), "lr": settings["learning_rate"]},
        {
            "params": list(model.encoder.parameters()),
            "lr": settings["encoder_learning_rate"],
            "weight_decay": 0.0,
        },
    ]
    _fit(groups, logits_of, torch.from_numpy(labels), settings, generator)
    return head
