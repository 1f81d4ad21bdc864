"""Projection heads."""

from torch import nn

from fedssl.networks.norms import norm_of


def make_head(features: int, hidden: int, size: int, norm: str = "batch") -> nn.Sequential:
    """Build a projection head from features (B, features) to projections (B, size).

    Args:
        norm: see `norm_of`.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        norm_of(norm, vectors=True)(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )
