"""BYOL: a predictor tells what a slowly following network makes of the other view.

Grill et al., "Bootstrap Your Own Latent", https://arxiv.org/abs/2006.07733.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from fedssl.methods.follower import Follower
from fedssl.methods.simsiam import SimSiam
from fedssl.networks.encoder import Encoder


class BYOL(SimSiam):
    """An encoder, heads and predictors; the target network stays with the client, or travels."""

    def __init__(
        self,
        encoder: Encoder,
        momentum: float,
        share_target: bool,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Start with a target network that equals the encoder and its heads.

        Args:
            momentum: of the target network as the run begins, from 0 to 1; it rises to 1 along
                a cosine.
            share_target: average the target networks, too, as FedBYOL
                (https://arxiv.org/abs/2204.04385) averages all, for twice the bytes.
            projection_hidden, projection_size, deep_supervision: see `SimSiam`.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        self.momentum, self.share_target, self.target = momentum, share_target, Follower(self)

    def targets(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Give the target network's projections."""
        return self.target.project(views)

    def begin_locally(self) -> None:
        """Begin with the encoder itself as target network."""
        if not self.share_target:
            self.target.equal(self)

    def after_step(self, progress: float) -> None:
        """Let the target network follow."""
        way = (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        self.target.follow(self, 1 - way)

    def local_names(self) -> frozenset[str]:
        """Keep the target network at the client, unless it is shared."""
        own = () if self.share_target else ("target.",)
        return frozenset(name for name in self.state_dict() if name.startswith(own))
