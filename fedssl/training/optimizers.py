"""What moves the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer

from fedssl.training.muon import Muon
from model import SimCLR


@dataclass(frozen=True)
class Optimization:
    """How a client trains in a round.

    Attributes:
        local_epochs: passes over the client's images.
        batch_size: images per step; a smaller client uses the batch it can fill.
        max_steps: steps of a round at most, 0 for no limit.
        optimizer: "sgd" for all weights, or "muon" for all matrices and convolutions behind
            the first and SGD for the others.
        learning_rate: SGD's peak rate at `batch_size`, scaled linearly to a smaller batch.
        momentum, weight_decay: of SGD.
        muon_learning_rate, muon_momentum: of Muon, the rate in the same way.
        temperature: of NT-Xent.
    """

    local_epochs: int
    batch_size: int
    max_steps: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    muon_learning_rate: float
    muon_momentum: float
    temperature: float


def make_optimization(spec: Mapping[str, Any]) -> Optimization:
    """Build the settings of the `train` section."""
    return Optimization(**{field.name: spec[field.name] for field in fields(Optimization)})


def make_optimizers(
    model: SimCLR, settings: Optimization, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Build what moves the weights, at the peak of the learning rates.

    Args:
        dtype: of Muon's products; the weights and their momentum are floats.
    """
    muon, others = [], []
    for weight in model.parameters():
        inner = weight.dim() > 1 and weight is not model.encoder.conv1.weight
        (muon if inner and settings.optimizer == "muon" else others).append(weight)
    rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
    optimizers: list[Optimizer] = [
        torch.optim.SGD(others, rate, momentum=momentum, weight_decay=decay)
    ]
    if muon:
        optimizers.append(Muon(muon, settings.muon_learning_rate, settings.muon_momentum, dtype))
    return optimizers
