"""SimSiam: a predictor tells the projection of the other view, through which no gradient goes.

Chen and He, "Exploring Simple Siamese Representation Learning", https://arxiv.org/abs/2011.10566.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.methods.projected import Projected
from fedssl.networks.encoder import Encoder
from fedssl.networks.heads import make_head


class SimSiam(Projected):
    """An encoder, its projection heads, and behind each a predictor; no negatives."""

    loss_name = "distance, 0 to 4"

    def __init__(
        self,
        encoder: Encoder,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Put heads and predictors at random initialization on an encoder.

        Args:
            projection_hidden: width inside the heads and the predictors.
            projection_size, deep_supervision: see `Projected`.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        sizes = projection_size, projection_hidden, projection_size
        count, norm = 1 + len(self.deep_heads), encoder.settings.norm
        self.predictors = nn.ModuleList(make_head(*sizes, norm) for _ in range(count))

    def targets(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Give what the predictors are to tell of the other view, without gradient.

        Args and returns: as of `compare`'s projections.
        """
        return [each.detach() for each in projections]

    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute how far predictions lie from the other view's target, from 0 to 4."""
        targets = self.targets(projections, views)
        return [
            distance(predict(own), target.roll(len(target) // 2, dims=0))
            for predict, own, target in zip(self.predictors, projections, targets, strict=True)
        ]


def distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute 2 - 2 cos, the mean over rows (N, D), in float32; twice the paper's loss plus 2."""
    return 2 - 2 * F.cosine_similarity(predictions.float(), targets.float()).mean()
