"""The layers that normalize: by the images of a batch, or each image by itself."""

from collections.abc import Callable

from torch import nn

CHANNELS_PER_GROUP = 16  # as in table 3 of the GroupNorm paper


class GroupNorm(nn.GroupNorm):
    """Normalizes each image by groups of 16 channels; it has no statistics that could travel.

    Wu and He, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """

    def __init__(self, channels: int) -> None:
        """Normalize inputs (B, channels) or (B, channels, H, W)."""
        groups = channels // CHANNELS_PER_GROUP
        super().__init__(groups if groups and channels % groups == 0 else 1, channels)


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "group": GroupNorm}
OF_VECTORS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "group": GroupNorm}


def norm_of(name: str, *, vectors: bool = False) -> Callable[[int], nn.Module]:
    """Give what builds a layer for so many channels.

    Args:
        name: "batch" or "group".
        vectors: for inputs (B, channels) instead of maps.

    Raises:
        ValueError: an unknown name.
    """
    known = OF_VECTORS if vectors else NORMS
    if name not in known:
        raise ValueError(f"unknown norm {name!r}, known: {', '.join(known)}")
    return known[name]
