"""Features of images by a frozen encoder."""

import numpy as np
import torch

from fedssl.compute import Backend
from fedssl.data.views import shrink
from fedssl.networks.encoder import Encoder


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
