"""What a self-supervised method is to the rest of the project."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedssl.networks.encoder import Encoder
from fedssl.networks.state import norm_layers


class Losses(NamedTuple):
    """What a method makes of a batch of views.

    Attributes:
        total: what training minimizes, a scalar.
        reported: what the run shows of it, a scalar, without gradient.
        projections: (2B, D), without gradient, for the metrics of the
            representation; rows i and i + B show the same image.
    """

    total: Tensor
    reported: Tensor
    projections: Tensor


class Method(nn.Module, ABC):
    """An encoder and what a method trains it with.

    Attributes:
        encoder: what is left of the method when training has ended.
        shares_projections: whether it uses negatives of other clients, which tell the moments
            of their projections then.
        least_images: that a client must have to train on.
        least_images_key: the setting that asks for so many.
        loss_name: of `Losses.reported`, for graphs.
    """

    encoder: Encoder
    shares_projections: bool = False
    least_images: int = 2
    least_images_key: str = ""
    loss_name: str = "loss"

    @abstractmethod
    def loss(self, views: Tensor) -> Losses:
        """Compute the loss of views (2B, 3, H, W) in [0, 1], B at least 2.

        Rows i and i + B are the two views of one image. Called under autocast, in
        train mode for the steps of training and in eval mode for held-out images.
        """

    def begin_locally(self) -> None:
        """Set the arrays of `local_names` by the others, as a client's first round begins."""
        return

    def after_step(self, progress: float) -> None:
        """Do what follows a step of the optimizer, such as moving a momentum target.

        Args:
            progress: where the step lies within the run, from 0 to 1.
        """
        return

    def take_negatives(self, points: Tensor | None, generator: Generator) -> None:
        """Take where the projections of other clients lie, for the steps that follow.

        Args:
            points: float (N, D); None for none any more. A method that knows no negatives
                takes no notice.
            generator: on the CPU; decides which of them a step sees.
        """
        return

    def local_names(self) -> frozenset[str]:
        """Name the arrays of the state that never travel and stay with each client."""
        return frozenset()

    def shared_state(self) -> dict[str, Tensor]:
        """Give the state that travels: all of it but `local_names`."""
        local = self.local_names()
        return {name: value for name, value in self.state_dict().items() if name not in local}


def local_arrays(method: Method) -> dict[str, Tensor]:
    """Copy the arrays of a method's state that never travel."""
    state = method.state_dict()
    return {name: state[name].clone() for name in sorted(method.local_names())}


def shared_norm_layers(method: Method) -> dict[str, _BatchNorm]:
    """List the BatchNorm layers whose statistics travel, by name."""
    local = method.local_names()
    layers = norm_layers(method)
    return {name: layers[name] for name in layers if f"{name}.running_mean" not in local}
