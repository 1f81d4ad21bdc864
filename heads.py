"""What is trained on labels: a linear head, the encoder too, or a network from scratch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from augment import Augmentation
from errors import UserError
from model import SimCLR
from utils import generator_for


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


def _fit(
    groups: list[dict[str, Any]],
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> None:
    """Minimize the cross entropy over rows for the epochs of the settings."""
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=settings["weight_decay"])
    batches = -(-len(targets) // settings["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"] * batches)
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(len(targets), generator=generator).chunk(batches):
            loss = F.cross_entropy(logits_of(rows), targets[rows].to(groups[0]["params"][0].device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


def finetune(
    model: SimCLR,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    augmentation: Augmentation,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """Train the encoder in place together with a linear head on labelled images.

    The images (uint8, (N, 3, H, W)) are cropped, turned and flipped as in
    training, their colours stay. BatchNorm keeps its statistics: those of small
    labelled batches are worse. Returns the head.
    """
    generator = generator_for(seed, "finetune")
    head, logits_of = _classifier(model, images, num_classes, augmentation, dtype, generator)
    model.eval()
    groups = [
        {"params": list(head.parameters()), "lr": settings["learning_rate"]},
        {
            "params": list(model.encoder.parameters()),
            "lr": settings["encoder_learning_rate"],
            "weight_decay": 0.0,
        },
    ]
    _fit(groups, logits_of, torch.from_numpy(labels), settings, generator)
    return head


def train_supervised(
    model: SimCLR,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    augmentation: Augmentation,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    """Train a fresh encoder in place, with a linear head, on nothing but labelled images.

    As `finetune`, but BatchNorm's statistics are learned, too, and settings are
    those of its section `supervised`. Returns the head.
    """
    generator = generator_for(seed, "supervised")
    head, logits_of = _classifier(model, images, num_classes, augmentation, dtype, generator)
    model.train()
    parameters = [*head.parameters(), *model.encoder.parameters()]
    groups = [{"params": parameters, "lr": settings["learning_rate"]}]
    _fit(groups, logits_of, torch.from_numpy(labels), settings, generator)
    model.eval()
    return head


def _classifier(
    model: SimCLR,
    images: np.ndarray,
    num_classes: int,
    augmentation: Augmentation,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[nn.Linear, Callable[[Tensor], Tensor]]:
    """Put a linear head on an encoder; give it with a function from rows to logits.

    The views are cropped, turned and flipped as in training, their colours stay.
    """
    device = model.mean.device
    head = nn.Linear(model.feature_size, num_classes, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    mild = replace(augmentation, jitter=0.0, grayscale=0.0, blur=0.0)

    def logits_of(rows: Tensor) -> Tensor:
        batch = torch.from_numpy(images[rows.numpy()]).to(device)
        views = mild.two_views(batch, generator)[: len(rows)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return head(model.features(views)).float()

    return head, logits_of
