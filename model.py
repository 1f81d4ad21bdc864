"""SimCLR: two views of an image attract each other, those of other images repel.

Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", https://arxiv.org/abs/2002.05709.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedssl.methods.base import Losses, Method
from fedssl.networks.encoder import STAGES, Encoder
from fedssl.networks.heads import make_head


class SimCLR(Method):
    """An encoder and the projection heads that only the loss sees.

    With deep supervision (Lee et al., https://arxiv.org/abs/1409.5185) earlier stages have
    heads and losses of their own, so that they learn from the first step on.
    """

    def __init__(
        self,
        encoder: Encoder,
        temperature: float,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
        shared_negatives: float = 0.0,
    ) -> None:
        """Put heads at random initialization on an encoder.

        Args:
            temperature: of NT-Xent, above 0.
            projection_hidden, projection_size: widths of the two-layer heads.
            deep_supervision: names of earlier stages with heads of their own.
            shared_negatives: negatives of other clients for each view of a batch, for the
                last stage's loss, see fedssl/federation/negatives.py.
        """
        super().__init__()
        self.shared_negatives, self.shares_projections = shared_negatives, shared_negatives > 0
        self._points: Tensor | None = None
        self._generator: Generator | None = None
        self.encoder, self.temperature = encoder, temperature
        sizes = projection_hidden, projection_size
        self.projection_head = make_head(encoder.feature_size, *sizes)
        self.deep_heads = nn.ModuleDict(
            {stage: make_head(encoder.width(stage), *sizes) for stage in deep_supervision}
        )

    def project(self, views: Tensor) -> list[Tensor]:
        """Project views (2B, 3, H, W) in [0, 1] by all heads, the last stage's first.

        Returns:
            (2B, projection_size) of each head.
        """
        stages = self.encoder.stages(views)
        deep = [head(stages[name]) for name, head in self.deep_heads.items()]
        return [self.projection_head(stages[STAGES[-1]]), *deep]

    def loss(self, views: Tensor) -> Losses:
        """Compute NT-Xent of the last stage; the losses of all deep heads together count as much.

        See `Method.loss`; the last stage's loss is reported, in nats.
        """
        projections, *deep = self.project(views)
        loss = nt_xent(projections, self.temperature, self._draw_negatives(len(views)))
        total = loss
        if deep:
            total = loss + torch.stack([nt_xent(p, self.temperature) for p in deep]).mean()
        return Losses(total, loss.detach(), projections.detach())

    def take_negatives(self, points: Tensor | None, generator: Generator) -> None:
        """Take where the projections of other clients lie, see `Method.take_negatives`."""
        self._points, self._generator = points, generator

    def _draw_negatives(self, views: int) -> Tensor | None:
        """Draw negatives for a step of training, (shared_negatives * views, D)."""
        if self._points is None or not len(self._points) or not self.training:
            return None
        count = round(self.shared_negatives * views)
        return self._points[torch.randint(len(self._points), (count,), generator=self._generator)]


def nt_xent(projections: Tensor, temperature: float, negatives: Tensor | None = None) -> Tensor:
    """Normalized temperature-scaled cross entropy, equation 1 of the SimCLR paper.

    Args:
        projections: (2B, D), B >= 2 images; rows i and i + B are the two views
            of one image. Computed in float32 whatever the dtype.
        temperature: above 0.
        negatives: (N, D), repelled by all views beside those of the batch.

    Returns:
        The mean over all 2B anchors, in nats; log(2B - 1) when all projections
        are equal.

    Raises:
        ValueError: an odd number of rows or fewer than two images.
    """
    rows = projections.shape[0]
    if rows % 2 or rows < 4:
        raise ValueError(f"NT-Xent needs two views of at least two images, got {rows} rows")
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections.float(), dim=1)
        similarity = unit @ unit.T / temperature
        similarity.fill_diagonal_(-torch.inf)
        if negatives is not None:
            others = unit @ F.normalize(negatives.float(), dim=1).T / temperature
            similarity = torch.cat([similarity, others], dim=1)
        partner = torch.arange(rows, device=unit.device).roll(rows // 2)
        return F.cross_entropy(similarity, partner)
