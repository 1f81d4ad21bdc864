"""Barlow Twins: the correlations between the numbers of two views come close to the identity.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
https://arxiv.org/abs/2103.03230.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedssl.methods.projected import Projected
from fedssl.networks.encoder import Encoder

EPSILON = 1e-5  # beside the variance, under the root


class BarlowTwins(Projected):
    """An encoder and projection heads; the loss needs no negatives and no second network."""

    loss_name = "Barlow Twins loss"

    def __init__(
        self,
        encoder: Encoder,
        redundancy: float,
        scale: float,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Put heads at random initialization on an encoder.

        Args:
            redundancy: weight of the correlations between different numbers, lambda.
            scale: of the whole loss, for rates as with other methods.
            projection_hidden, projection_size, deep_supervision: see `Projected`.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        self.redundancy, self.scale = redundancy, scale

    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute the scaled loss of each head."""
        return [self.scale * barlow_twins(each, self.redundancy) for each in projections]


def barlow_twins(projections: Tensor, redundancy: float = 5e-3) -> Tensor:
    """Compute equation 1 of the Barlow Twins paper, in float32 whatever the dtype.

    Args:
        projections: (2B, D), B >= 2 images; rows i and i + B are the two views of one image.
        redundancy: lambda, with the paper's value.

    Returns:
        A scalar: the squares of what the cross-correlations (D, D) of the two views' numbers
        lack on the diagonal to 1, and lambda times those beside it.
    """
    with torch.autocast(projections.device.type, enabled=False):
        first, second = map(_standardize, projections.float().chunk(2))
        correlations = first.T @ second / len(first)
        diagonal = correlations.diagonal()
        beside = correlations.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + redundancy * beside


def _standardize(points: Tensor) -> Tensor:
    centred = points - points.mean(dim=0)
    return centred / torch.sqrt(points.var(dim=0, correction=0) + EPSILON)
