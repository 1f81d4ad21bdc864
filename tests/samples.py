"""Objects as the configuration makes them, made of values instead: small, for digits."""

import torch

from fedssl.compute import Backend
from fedssl.data.views import make_augmentation
from fedssl.networks.encoder import Encoder, EncoderSettings
from fedssl.training.local import TrainSettings
from fedssl.training.optimizers import OptimizerSettings
from fedssl.training.schedule import RoundPlan
from model import SimCLR

CPU = torch.device("cpu")
BACKEND = Backend(CPU, torch.float32)
STATISTICS = ([0.31] * 3, [0.38] * 3)
WHOLE_RUN = RoundPlan(fraction=1.0, begin=0.0, end=1.0)
DIGITS_AUGMENT = {
    "crop_scale": [0.5, 1.0],
    "crop_ratio": [0.75, 1.3333333333333333],
    "flip": 0.0,
    "rotation": 20,
    "shear": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale": 0.0,
    "blur": 0.0,
    "blur_sigma": [0.1, 2.0],
}
VIEWS = make_augmentation(DIGITS_AUGMENT, 8)
OPTIMIZER = OptimizerSettings(
    name="sgd",
    learning_rate=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    muon_learning_rate=0.05,
    muon_momentum=0.95,
)
SETTINGS = TrainSettings(local_epochs=1, batch_size=32, max_steps=0, optimizer=OPTIMIZER)


def make_encoder(architecture="resnet18", stem="conv3x3_stride1", seed=0):
    """Make an encoder at the initialization that a seed gives."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(EncoderSettings(architecture, stem, *STATISTICS))


def make_simclr(seed=0, encoder=None, deep=(), temperature=0.5, hidden=512, size=128):
    """Make SimCLR with the default heads, at the initialization that a seed gives."""
    encoder = encoder or make_encoder(seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SimCLR(encoder, temperature, hidden, size, deep).to(CPU)


def state_bytes(module):
    """Give all bytes of a module's state."""
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
