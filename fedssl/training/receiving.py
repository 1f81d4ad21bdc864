"""How a client takes the global model that it is to train on: as it is, or beside its own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedssl.methods.base import Method

PREDICTORS = "predictors."  # before the names of a method's predictors, if it has any
ENCODER = "encoder."
RATE = "rate"
APART = 1e-3  # of the global weights' length: nearer is nothing but rounding

State = Mapping[str, Tensor]


class Receiving(ABC):
    """What a client makes of the model that a training message brings.

    Attributes:
        remembers: whether it needs the model that the client's last training gave.
    """

    remembers: ClassVar[bool] = True

    def check(self, method: Method) -> None:
        """Make sure that it suits a method.

        Raises:
            ValueError: it does not.
        """
        return

    @abstractmethod
    def receive(self, sent: State, own: State, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give what the client trains on.

        Args:
            sent: the shared state of the global model.
            own: the same arrays as the client's last training left them.
            memory: what stays with this client from round to round; may be changed.
        """


@dataclass(frozen=True)
class Replace(Receiving):
    """FedAvg's way: the global model as it is."""

    remembers = False

    def receive(self, sent: State, own: State, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give what was sent."""
        return dict(sent)


@dataclass(frozen=True)
class FedEMA(Receiving):
    """A mean of the global model and the client's own, more of its own the further they are apart.

    Zhuang et al., "Divergence-aware Federated Self-Supervised Learning",
    https://arxiv.org/abs/2204.04385: the share of its own is min(1, rate * distance), with
    the distance of the two encoders' weights; a client's rate is such that the share is
    `first_share` when it first comes back to a model that is not its own. A client that was
    alone in its last round finds its own again, and takes it.

    Attributes:
        first_share: tau of the paper, from 0 to 1.
    """

    first_share: float

    def receive(self, sent: State, own: State, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mix all floats; counters come as they are sent."""
        apart = distance(sent, own)
        if RATE not in memory and apart > APART * length(sent):
            memory[RATE] = torch.tensor(self.first_share / apart)
        share = min(1.0, float(memory[RATE]) * apart) if RATE in memory else 0.0
        return {
            name: torch.lerp(value, own[name], share) if value.is_floating_point() else value
            for name, value in sent.items()
        }


@dataclass(frozen=True)
class FedU(Receiving):
    """The global encoder, and the global predictors only where the two encoders are near.

    Zhuang et al., "Collaborative Unsupervised Visual Representation Learning from
    Decentralized Data", https://arxiv.org/abs/2108.06492.

    Attributes:
        threshold: distance of the two encoders' weights, as a share of the length of the
            global ones, from which on a client keeps its own predictors.
    """

    threshold: float

    def check(self, method: Method) -> None:
        """Make sure that the method has predictors.

        Raises:
            ValueError: it has none.
        """
        if not any(name.startswith(PREDICTORS) for name in method.shared_state()):
            raise ValueError(f"{type(method).__name__} has no predictors, as BYOL and SimSiam have")

    def receive(self, sent: State, own: State, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give what was sent, perhaps with the client's own predictors."""
        if distance(sent, own) < self.threshold * length(sent):
            return dict(sent)
        return {name: own[name] if name.startswith(PREDICTORS) else sent[name] for name in sent}


def distance(first: State, second: State) -> float:
    """Compute the Euclidean distance of two encoders' weights, running statistics left out."""
    return length({name: first[name] - second[name] for name in weights_of_encoder(first)})


def length(state: State) -> float:
    """Compute the Euclidean length of an encoder's weights, running statistics left out."""
    squares = [float(state[name].double().square().sum()) for name in weights_of_encoder(state)]
    return float(sum(squares)) ** 0.5


def weights_of_encoder(state: State) -> list[str]:
    """Name the weights of the encoder in a method's state."""
    return [n for n in state if n.startswith(ENCODER) and n.endswith((".weight", ".bias"))]
