"""Methods in which a predictor tells the projection of an image's other view; no negatives."""

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.methods.base import Losses
from fedssl.methods.projected import Projected, add_up
from fedssl.networks.encoder import Encoder
from fedssl.networks.heads import make_head


class Predicted(Projected):
    """An encoder, its projection heads, and behind each a predictor."""

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
        self.predictors = nn.ModuleList(make_head(*sizes) for _ in range(1 + len(self.deep_heads)))

    @abstractmethod
    def targets(self, views: Tensor, projections: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give what the predictors are to tell, (2B, D) of each head, without gradient.

        Args:
            projections: of the same views.
        """

    def loss(self, views: Tensor) -> Losses:
        """Compare predictions with the targets of each image's other view.

        See `Method.loss`; the last stage's loss is reported, from 0 to 4, and the losses of
        all deep heads together count as much.
        """
        projections = self.project(views)
        targets = self.targets(views, projections)
        losses = [
            distance(predict(own), target.roll(len(target) // 2, dims=0))
            for predict, own, target in zip(self.predictors, projections, targets, strict=True)
        ]
        return add_up(losses, projections[0])

    def compare(self, projections: Tensor) -> Tensor:
        """Compute the distance between the projections of an image's views."""
        return distance(projections, projections.roll(len(projections) // 2, dims=0))


def distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute 2 - 2 cos, the mean over rows (N, D), in float32; equation 2 of the BYOL paper."""
    return 2 - 2 * F.cosine_similarity(predictions.float(), targets.float()).mean()
