"""VICReg: views of an image agree, numbers of a projection vary and do not go together.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning", https://arxiv.org/abs/2105.04906.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.methods.projected import Projected
from fedssl.networks.encoder import Encoder

EPSILON = 1e-4  # beside the variance, under the root


class VICReg(Projected):
    """An encoder and projection heads; the loss needs no negatives and no second network."""

    loss_name = "VICReg loss"

    def __init__(
        self,
        encoder: Encoder,
        invariance: float,
        variance: float,
        covariance: float,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Put heads at random initialization on an encoder.

        Args:
            invariance, variance, covariance: weights of the three terms, 0 or above.
            projection_hidden, projection_size, deep_supervision: see `Projected`.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        self.weights = invariance, variance, covariance

    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute the sum of the three terms for each head."""
        return [vicreg(each, *self.weights) for each in projections]


def vicreg(
    projections: Tensor, invariance: float = 25, variance: float = 25, covariance: float = 1
) -> Tensor:
    """Compute the loss of VICReg as its authors' code does, in float32 whatever the dtype.

    Unlike in equation 6, the invariance is divided by D, and the terms of variance are averaged.

    Args:
        projections: (2B, D), B >= 2 images; rows i and i + B are the two views of one image.
        invariance, variance, covariance: weights of the terms, with the paper's values.

    Returns:
        A scalar: the mean square between the views of an image; how far the standard
        deviations of the D numbers stay below 1; the squares of the covariances between
        them, by D. The last two are means, and sums, of both halves.
    """
    with torch.autocast(projections.device.type, enabled=False):
        first, second = projections.float().chunk(2)
        agree = F.mse_loss(first, second)
        vary = (_lack_of_spread(first) + _lack_of_spread(second)) / 2
        apart = _dependence(first) + _dependence(second)
        return invariance * agree + variance * vary + covariance * apart


def _lack_of_spread(points: Tensor) -> Tensor:
    return F.relu(1 - torch.sqrt(points.var(dim=0) + EPSILON)).mean()


def _dependence(points: Tensor) -> Tensor:
    centred = points - points.mean(dim=0)
    covariance = centred.T @ centred / (len(points) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / points.shape[1]
