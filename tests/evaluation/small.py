"""A small encoder, and the digits to evaluate it on."""

import torch
from conftest import CPU

from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.views import make_augmentation
from fedssl.evaluation.base import EvaluationData
from fedssl.networks.encoder import Encoder, EncoderSettings

BACKEND = Backend(CPU, torch.float32)
STATISTICS = [0.31] * 3
COMMON = {"label_fraction": 0.1, "seeds": 2, "baselines": True, "feature_batch_size": 256}
HEAD = {"epochs": 5, "batch_size": 16, "learning_rate": 0.03, "weight_decay": 0.1}


def make_encoder(seed=0):
    """Build an encoder at random initialization."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(EncoderSettings("resnet18", "conv3x3_stride1", STATISTICS, STATISTICS))
    return encoder.to(memory_format=torch.channels_last)


def make_data(image_set, num_seeds=2, resolution=8, **changes):
    """Draw labels of an image set; the views are those of the digits."""
    settings = {"label_fraction": 0.1, "seed": 0, "feature_batch_size": 256, "backend": BACKEND}
    return EvaluationData.of(
        image_set,
        num_seeds=num_seeds,
        resolution=resolution,
        views=make_augmentation(load_config("config", []).augment, resolution),
        **settings | changes,
    )
