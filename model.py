"""SimCLR: two views of an image attract each other, those of other images repel.

Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", https://arxiv.org/abs/2002.05709.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedssl.methods.projected import Projected
from fedssl.networks.encoder import Encoder


class SimCLR(Projected):
    """An encoder and projection heads, with NT-Xent for a loss."""

    loss_name = "NT-Xent (nats)"

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
            projection_hidden, projection_size, deep_supervision: see `Projected`.
            shared_negatives: negatives of other clients for each view of a batch, for the
                last stage's loss, see fedssl/federation/negatives.py.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        self.shared_negatives, self.shares_projections = shared_negatives, shared_negatives > 0
        self._points: Tensor | None = None
        self._generator: Generator | None = None
        self.temperature = temperature

    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute NT-Xent of each head, in nats; the last stage's may have negatives of others."""
        last, *deep = projections
        loss = nt_xent(last, self.temperature, self._draw_negatives(len(last)))
        return [loss, *(nt_xent(each, self.temperature) for each in deep)]

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
