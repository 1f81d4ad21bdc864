"""Nearest neighbours in the space of the features."""

import numpy as np
from sklearn.neighbors import KNeighborsClassifier


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
