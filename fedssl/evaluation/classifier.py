"""What fine-tuning and supervised training share: a classifier and its loop."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.data.views import Augmentation
from model import SimCLR


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
