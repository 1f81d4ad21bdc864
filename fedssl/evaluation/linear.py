"""The linear head on frozen features, and the labels that it sees."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

from fedssl.errors import UserError
from fedssl.evaluation.classifier import _fit
from fedssl.seeding import generator_for


def draw_labelled(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the rows whose labels the head may see: stratified, sorted, int64.

    Raises:
        UserError: too few for every class to appear.
    """
    rows = np.arange(len(labels))
    if fraction == 1:
        return rows
    classes = np.unique(labels)
    remedy = f"too few labels for each of the {len(classes)} classes to appear; raise it"
    try:
        drawn, _ = train_test_split(rows, train_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise UserError(f"label_fraction={fraction}: {remedy}") from error
    if len(np.unique(labels[drawn])) < len(classes):
        raise UserError(f"label_fraction={fraction}: {len(drawn)} labels, {remedy}")
    return np.sort(drawn)


def train_linear_head(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    settings: Mapping[str, Any],
    seed: int,
) -> Callable[[np.ndarray], np.ndarray]:
    """Train a linear softmax classifier on standardized features, float32 (N, D).

    SGD with momentum 0.9, the rate falling to zero along a cosine.

    Returns:
        A function from features (M, D) to predicted classes (M,).
    """
    scaler = StandardScaler().fit(features)
    inputs = torch.from_numpy(scaler.transform(features)).float()
    targets = torch.from_numpy(labels)
    head = nn.Linear(inputs.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr": settings["learning_rate"]}]
    order = generator_for(seed, "head")
    _fit(groups, lambda rows: head(inputs[rows]), targets, settings, order)

    @torch.inference_mode()
    def predict(queries: np.ndarray) -> np.ndarray:
        return head(torch.from_numpy(scaler.transform(queries)).float()).argmax(dim=1).numpy()

    return predict
