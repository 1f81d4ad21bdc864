"""MoCo v2: negatives are a queue of what a slowly following network made of earlier batches.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning",
https://arxiv.org/abs/1911.05722, and Chen et al., https://arxiv.org/abs/2003.04297.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.methods.follower import Follower
from fedssl.methods.projected import Projected
from fedssl.networks.encoder import Encoder


class MoCo(Projected):
    """An encoder and heads; the key encoder and the queues stay with the client."""

    queues: Tensor
    place: Tensor
    least_images_key = "method.queue_size"
    loss_name = "InfoNCE (nats)"

    def __init__(
        self,
        encoder: Encoder,
        temperature: float,
        momentum: float,
        queue_size: int,
        projection_hidden: int,
        projection_size: int,
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Start with queues of random directions.

        Args:
            temperature: of InfoNCE, above 0.
            momentum: of the key encoder, from 0 to 1.
            queue_size: keys that each head's queue holds; no client may have fewer images. As
                an epoch begins the queue holds keys of the last images of the one before, so with
                few images an image may meet its own.
            projection_hidden, projection_size, deep_supervision: see `Projected`.
        """
        super().__init__(encoder, projection_hidden, projection_size, deep_supervision)
        self.temperature, self.momentum, self.target = temperature, momentum, Follower(self)
        self.least_images = queue_size
        random = torch.randn(1 + len(self.deep_heads), queue_size, projection_size)
        self.register_buffer("queues", F.normalize(random, dim=2))
        self.register_buffer("place", torch.tensor(0))
        self._keys: Tensor | None = None

    def compare(self, projections: Sequence[Tensor], views: Tensor) -> list[Tensor]:
        """Compute InfoNCE of both views for each head, in nats."""
        keys = torch.stack([F.normalize(k.float(), dim=1) for k in self.target.project(views)])
        self._keys = keys if self.training else None
        return [
            info_nce(own, key.roll(len(key) // 2, dims=0), queue, self.temperature)
            for own, key, queue in zip(projections, keys, self.queues, strict=True)
        ]

    def begin_locally(self) -> None:
        """Begin with the encoder itself as key encoder."""
        self.target.equal(self)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let the key encoder follow, and put the keys of the step in the place of the oldest."""
        self.target.follow(self, self.momentum)
        if self._keys is not None:
            size = self.queues.shape[1]
            new = self._keys[:, :size]
            where = (self.place + torch.arange(new.shape[1], device=new.device)) % size
            self.queues[:, where] = new
            self.place.add_(new.shape[1]).remainder_(size)
            self._keys = None

    def local_names(self) -> frozenset[str]:
        """Keep the key encoder and the queues at the client."""
        own = ("target.", "queues", "place")
        return frozenset(name for name in self.state_dict() if name.startswith(own))


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Compute equation 1 of the MoCo paper, in float32 whatever the dtype.

    Args:
        queries, keys: (N, D); rows of the same number belong together.
        queue: (K, D), negatives of all rows, of length 1.

    Returns:
        The mean over rows, in nats.
    """
    with torch.autocast(queries.device.type, enabled=False):
        own, right = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        positive = (own * right).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, own @ queue.T], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(own), dtype=torch.long, device=own.device))
