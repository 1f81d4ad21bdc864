"""What moves the weights."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fedssl.methods.base import Method
from fedssl.training.muon import Muon


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its rates.

    Attributes:
        name: "sgd" for all weights, or "muon" for all matrices and convolutions behind
            the first and SGD for the others.
        learning_rate: SGD's peak rate at the settings' batch size, scaled linearly to a
            smaller batch.
        momentum, weight_decay: of SGD.
        muon_learning_rate, muon_momentum: of Muon, the rate in the same way.
    """

    name: str
    learning_rate: float
    momentum: float
    weight_decay: float
    muon_learning_rate: float = 0.0
    muon_momentum: float = 0.0

    @property
    def rates(self) -> list[str]:
        """The settings that are learning rates, to name them in messages."""
        muon = ["optimizer.muon_learning_rate"] if self.name == "muon" else []
        return ["optimizer.learning_rate", *muon]


def build_optimizers(
    method: Method, settings: OptimizerSettings, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Build what moves the weights, at the peak of the learning rates.

    Args:
        dtype: of Muon's products; the weights and their momentum are floats.
    """
    muon: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for weight in method.parameters():
        inner = weight.dim() > 1 and weight is not method.encoder.conv1.weight
        (muon if inner and settings.name == "muon" else others).append(weight)
    rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
    optimizers: list[Optimizer] = [
        torch.optim.SGD(others, rate, momentum=momentum, weight_decay=decay)
    ]
    if muon:
        optimizers.append(Muon(muon, settings.muon_learning_rate, settings.muon_momentum, dtype))
    return optimizers
