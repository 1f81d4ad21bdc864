"""A copy of an encoder and its heads that follows them slowly and takes no gradients."""

import copy

import torch
from torch import Tensor, nn

from fedssl.methods.projected import Projected, project


class Follower(nn.Module):
    """The key encoder of MoCo, the target network of BYOL."""

    def __init__(self, source: Projected) -> None:
        """Start as a copy of a method's encoder and heads."""
        super().__init__()
        self.encoder = copy.deepcopy(source.encoder)
        self.projection_head = copy.deepcopy(source.projection_head)
        self.deep_heads = copy.deepcopy(source.deep_heads)
        self.requires_grad_(False)

    @torch.no_grad()
    def project(self, views: Tensor) -> list[Tensor]:
        """Project views (2B, 3, H, W) in [0, 1], see `Projected.project`."""
        return project(self.encoder, self.projection_head, self.deep_heads, views)

    def equal(self, source: Projected) -> None:
        """Become a copy of the source again."""
        own = self.state_dict()
        self.load_state_dict({name: source.state_dict()[name] for name in own})

    @torch.no_grad()
    def follow(self, source: Projected, momentum: float) -> None:
        """Move by 1 - momentum of the way to the source."""
        for name, slow in self.named_parameters():
            slow.lerp_(source.get_parameter(name), 1 - momentum)
