"""What the frozen encoder sees: features of images, and how well neighbours agree."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from model import Encoder


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


def nearest_neighbours(
    features: np.ndarray, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows whose features point most nearly in the direction of each query's.

    Args:
        features: (N, D); a row of zeros is similar to none.
        queries: rows of them, int64 (Q,).
        count: neighbours of each, below N.

    Returns:
        The neighbours' rows, int64 (Q, count), nearest first and never the
        query itself, and their cosine similarities, (Q, count).
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(similarity, rows, axis=1)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    neighbors: int,
    temperature: float = 0.07,
) -> float:
    """Top-1 of the weighted nearest-neighbour vote on cosine similarity.

    Each neighbour votes with exp(similarity / temperature): Wu et al., section
    3.4, https://arxiv.org/abs/1805.01978.

    Args:
        bank, queries: features (N, D) and (M, D).
        bank_labels, query_labels: int64 (N,) and (M,).
        neighbors: voters per query, at most N are used.

    Returns:
        The fraction of queries classified correctly, 0 to 1.
    """
    classifier = KNeighborsClassifier(
        n_neighbors=min(neighbors, len(bank)),
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    return float(classifier.fit(bank, bank_labels).score(queries, query_labels))
