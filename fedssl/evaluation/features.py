"""Features of images by a frozen encoder."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.networks.encoder import Encoder


@torch.inference_mode()
def extract_features(
    model: Encoder,
    images: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    size: int,
) -> np.ndarray:
    """Encode images in eval mode, so that batch statistics neither matter nor move.

    Args:
        images: uint8 (N, 3, H, W).
        dtype: the autocast type of the forward pass, float32 for none.
        size: side in pixels to which larger images are shrunk, see `encode_size`.

    Returns:
        float32 (N, feature_size). The model's train/eval mode is as before.
    """
    was_training = model.training
    model.eval()
    chunks = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size]))
        pixels = shrink(batch.to(device).float() / 255, size)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            chunks.append(model.features(pixels).float().cpu())
    model.train(was_training)
    return torch.cat(chunks).numpy()


def shrink(images: Tensor, size: int) -> Tensor:
    """Shrink square float images (N, 3, S, S) to `size` pixels where they are larger."""
    if images.shape[-1] <= size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
