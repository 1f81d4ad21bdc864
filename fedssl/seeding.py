"""Random choices that depend on the seed and their purpose alone."""

import hashlib
import json

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Hash the run's seed and a purpose, such as ("train", round, partition), to 63 bits."""
    text = json.dumps([seed, *purpose]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def draw_seed(seed: int, draw: int) -> int:
    """Give the seed of a draw of labels, below 2**32, as scikit-learn wants it."""
    return derive_seed(seed, "labels", draw) % 2**32


def generator_for(seed: int, *purpose: int | str) -> torch.Generator:
    """Make a CPU generator that depends on nothing but the seed and the purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
