"""Projection heads."""

from torch import nn


def make_head(features: int, hidden: int, size: int) -> nn.Sequential:
    """Build a projection head from features (B, features) to projections (B, size)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )
