"""Methods whose loss is of projections: an encoder, and heads on one or several stages."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedssl.methods.base import Losses, Method
from fedssl.networks.encoder import STAGES, Encoder
from fedssl.networks.heads import make_head


class Projected(Method):
    """An encoder and the projection heads that only the loss sees.

    With deep supervision (Lee et al., https://arxiv.org/abs/1409.5185) earlier stages have
    heads and losses of their own, so that they learn from the first step on.
    """

    def __init__(
        self,
        encoder: Encoder,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Put heads at random initialization on an encoder.

        Args:
            projection_hidden, projection_size: widths of the two-layer heads.
            deep_supervision: names of earlier stages with heads of their own.
        """
        super().__init__()
        self.encoder = encoder
        sizes = projection_hidden, projection_size, encoder.settings.norm
        self.projection_head = make_head(encoder.feature_size, *sizes)
        self.deep_heads = nn.ModuleDict(
            {stage: make_head(encoder.width(stage), *sizes) for stage in deep_supervision}
        )

    @abstractmethod
    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute the loss of each head, a scalar.

        Args:
            projections: (2B, D) of each head, the last stage's first; rows i and i + B show
                one image.
            views: what was projected, (2B, 3, H, W) in [0, 1].
        """

    def project(self, views: Tensor) -> list[Tensor]:
        """Project views (2B, 3, H, W) in [0, 1] by all heads, the last stage's first.

        Returns:
            (2B, projection_size) of each head.
        """
        return project(self.encoder, self.projection_head, self.deep_heads, views)

    def loss(self, views: Tensor) -> Losses:
        """Add up the losses of the heads: that of the last stage, and the mean of the others.

        See `Method.loss`; the last stage's loss is reported.
        """
        projections = self.project(views)
        last, *deep = self.compare(projections, views)
        total = last + torch.stack(deep).mean() if deep else last
        return Losses(total, last.detach(), projections[0].detach())


def project(
    encoder: Encoder, projection_head: nn.Module, deep_heads: nn.ModuleDict, views: Tensor
) -> list[Tensor]:
    """Project views (2B, 3, H, W) in [0, 1] by all heads, the last stage's first."""
    stages = encoder.stages(views)
    deep = [head(stages[name]) for name, head in deep_heads.items()]
    return [projection_head(stages[STAGES[-1]]), *deep]
