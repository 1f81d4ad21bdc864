"""SimCLR and its loss, NT-Xent.

Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", https://arxiv.org/abs/2002.05709.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.networks.encoder import STAGES, Encoder
from fedssl.networks.heads import make_head


class SimCLR(Encoder):
    """An encoder and the projection heads that only the loss sees.

    With deep supervision (Lee et al., https://arxiv.org/abs/1409.5185) earlier stages have
    heads and losses of their own, so that they learn from the first step on.
    """

    def __init__(
        self,
        architecture: str,
        stem: str,
        projection_hidden: int,
        projection_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Build all parts at random initialization.

        Args:
            architecture, stem, mean, std: see `Encoder`.
            projection_hidden, projection_size: widths of the two-layer heads.
            deep_supervision: names of earlier stages with heads of their own.
        """
        super().__init__(architecture, stem, mean, std)
        sizes = projection_hidden, projection_size
        self.projection_head = make_head(self.feature_size, *sizes)
        widths = {name: self.feature_size >> 3 - STAGES.index(name) for name in deep_supervision}
        self.deep_heads = nn.ModuleDict({n: make_head(w, *sizes) for n, w in widths.items()})

    def forward(self, views: Tensor) -> Tensor:
        """Project views (B, 3, H, W) in [0, 1] to the loss's space (B, projection_size)."""
        return self.projection_head(self.features(views))

    def project_stages(self, views: Tensor) -> list[Tensor]:
        """Project views to what `forward` gives, and beside it those of each deep head."""
        stages = self.stages(views)
        deep = [head(stages[name]) for name, head in self.deep_heads.items()]
        return [self.projection_head(stages[STAGES[-1]]), *deep]


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross entropy, equation 1 of the SimCLR paper.

    Args:
        projections: (2B, D), B >= 2 images; rows i and i + B are the two views
            of one image. Computed in float32 whatever the dtype.
        temperature: above 0.

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
        partner = torch.arange(rows, device=unit.device).roll(rows // 2)
        return F.cross_entropy(similarity, partner)
