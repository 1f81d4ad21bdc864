"""Features of images by a frozen encoder, and logits by one that trains."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor, nn

from fedssl.compute import Backend
from fedssl.data.views import Augmentation, shrink
from fedssl.networks.encoder import Encoder

LogitsOf = Callable[[Tensor], Tensor]  # places, int64 (B,), to logits (B, num_classes)


@torch.inference_mode()
def extract_features(
    encoder: Encoder, images: np.ndarray, backend: Backend, batch_size: int, resolution: int
) -> np.ndarray:
    """Encode images in eval mode, so that batch statistics neither matter nor move.

    Args:
        images: uint8 (N, 3, S, S), at least one.
        batch_size: images encoded at once.
        resolution: side in pixels to which larger images are shrunk, see
            `Schedule.eval_resolution`.

    Returns:
        float32 (N, feature_size). The encoder's train/eval mode is as before.
    """
    was_training = encoder.training
    encoder.eval()
    chunks = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size]))
        pixels = shrink(batch.to(backend.device).float() / 255, resolution)
        with backend.autocast():
            chunks.append(encoder(pixels).float().cpu())
    encoder.train(was_training)
    return torch.cat(chunks).numpy()


def view_logits(
    encoder: Encoder,
    head: nn.Linear,
    pixels: np.ndarray,
    views: Augmentation,
    backend: Backend,
    generator: Generator,
) -> LogitsOf:
    """Make the function from places in images, uint8 (N, 3, S, S), to logits of random views.

    Views are cropped, turned and flipped as in training, their colours stay.

    Args:
        generator: on the CPU; decides the views.
    """
    mild = replace(views, jitter=0.0, grayscale=0.0, blur=0.0)

    def logits_of(places: Tensor) -> Tensor:
        batch = torch.from_numpy(pixels[places.numpy()]).to(backend.device)
        seen = mild.two_views(batch, generator)[: len(places)]
        with backend.autocast():
            return head(encoder(seen)).float()

    return logits_of
