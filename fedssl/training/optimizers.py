"""What moves the weights, and its momentum, which may outlive a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedssl.methods.base import Method
from fedssl.training.muon import Muon

MOMENTUM = "momentum."  # before a parameter's name: its momentum, where that travels

MomentumStart = Literal["zero", "averaged"]


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
        momentum_start: what momentum begins a round with: "zero", or "averaged", the mean of
            what the clients of the round before ended with (https://arxiv.org/abs/2510.27403).
    """

    name: str
    learning_rate: float
    momentum: float
    weight_decay: float
    muon_learning_rate: float = 0.0
    muon_momentum: float = 0.0
    momentum_start: MomentumStart = "zero"

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
    for _, weight in trained_weights(method):
        inner = weight.dim() > 1 and weight is not method.encoder.conv1.weight
        (muon if inner and settings.name == "muon" else others).append(weight)
    rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
    optimizers: list[Optimizer] = [
        torch.optim.SGD(others, rate, momentum=momentum, weight_decay=decay)
    ]
    if muon:
        optimizers.append(Muon(muon, settings.muon_learning_rate, settings.muon_momentum, dtype))
    return optimizers


def zero_momentum(method: Method, settings: OptimizerSettings) -> dict[str, Tensor]:
    """Give the momentum that a run begins with, where it travels: zeros like each parameter.

    Returns:
        By `momentum.NAME` of the parameter, on the CPU; nothing where each round begins anew.
    """
    if settings.momentum_start == "zero":
        return {}
    return {
        f"{MOMENTUM}{name}": torch.zeros(weight.shape) for name, weight in trained_weights(method)
    }


def trained_weights(method: Method) -> list[tuple[str, nn.Parameter]]:
    """List the parameters that take gradients, with their names; a momentum target does not."""
    return [each for each in method.named_parameters() if each[1].requires_grad]


def split_momentum(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split what travels into the model's state and the momentum, by their names."""
    momentum = {name: value for name, value in state.items() if name.startswith(MOMENTUM)}
    return {name: state[name] for name in state if name not in momentum}, momentum


def set_momentum(
    optimizers: Sequence[Optimizer], method: Method, momentum: Mapping[str, Tensor]
) -> None:
    """Let new optimizers begin with a momentum, as `zero_momentum` names it; empty for none."""
    for name, weight in trained_weights(method) if momentum else ():
        kept = torch.empty_like(weight).copy_(momentum[f"{MOMENTUM}{name}"])
        _owner(optimizers, weight).state[weight]["momentum_buffer"] = kept


def read_momentum(optimizers: Sequence[Optimizer], method: Method) -> dict[str, Tensor]:
    """Copy the momentum of all parameters; zeros where an optimizer has none."""
    found = {}
    for name, weight in trained_weights(method):
        kept = _owner(optimizers, weight).state[weight].get("momentum_buffer")
        found[f"{MOMENTUM}{name}"] = torch.zeros_like(weight) if kept is None else kept.clone()
    return found


def _owner(optimizers: Sequence[Optimizer], weight: nn.Parameter) -> Optimizer:
    """Find the optimizer that moves a parameter."""
    return next(o for o in optimizers if any(weight is w for w in o.param_groups[0]["params"]))
