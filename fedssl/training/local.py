"""Local training and the held-out loss: what a client computes, free of Flower."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from fedssl.compute import Backend
from fedssl.data.views import Augmentation
from fedssl.methods.base import Method, shared_norm_layers
from fedssl.training.optimizers import (
    OptimizerSettings,
    build_optimizers,
    read_momentum,
    set_momentum,
)
from fedssl.training.representation import measure_representation
from fedssl.training.schedule import RoundPlan, cosine

MEASURED_IMAGES = 512  # the effective rank depends on how many images it is measured on
PROJECTED_IMAGES = 1024  # of a client, for the moments of their projections
DEVICE_SHARE = 0.1  # of a GPU's free memory, which the images may take

Pixels = np.ndarray | Tensor  # uint8 (N, 3, H, W), of a whole image set


@dataclass(frozen=True)
class TrainSettings:
    """How a client trains in a round.

    Attributes:
        local_epochs: passes over the client's images.
        batch_size: images per step; a smaller client uses the batch it can fill.
        max_steps: steps of a round at most, 0 for no limit.
        global_statistics_from: where in the run, from 0 to 1, BatchNorm begins to normalize by
            the federation's statistics instead of the batch's, see `freeze_statistics`.
    """

    local_epochs: int
    batch_size: int
    max_steps: int
    optimizer: OptimizerSettings
    global_statistics_from: float = 1.0

    def steps(self, num_images: int, fraction: float) -> int:
        """Count the steps of a round, one at least.

        Args:
            num_images: of the client, at least two.
            fraction: of a whole round.
        """
        steps = self.local_epochs * (num_images // min(self.batch_size, num_images))
        steps = min(steps, self.max_steps) if self.max_steps else steps
        return max(1, round(fraction * steps))


@dataclass(frozen=True)
class TrainResult:
    """What a round gave beside the weights.

    Attributes:
        loss: `Losses.reported`, the mean over the steps.
        images: used, each as often as it was.
        momentum: of the optimizers at the end, where the round was given one.
    """

    loss: float
    images: int
    images_per_second: float
    momentum: Mapping[str, Tensor] = field(default_factory=dict)


def cache_on_device(pixels: np.ndarray, device: torch.device) -> Pixels:
    """Put images, uint8 (N, 3, H, W), on a GPU if they are small beside its free memory.

    Otherwise they stay where they are, in a file that all processes share.
    """
    if device.type != "cuda" or pixels.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return pixels
    return torch.from_numpy(np.array(pixels)).to(device)


def get_batch(pixels: Pixels, rows: np.ndarray, device: torch.device) -> Tensor:
    """Take a batch of images to the device, in ascending order of their rows."""
    rows = np.sort(rows)
    if isinstance(pixels, Tensor):
        return pixels[torch.from_numpy(rows).to(pixels.device, non_blocking=True)]
    return torch.from_numpy(pixels[rows]).to(device, non_blocking=True)


def local_train(
    method: Method,
    images: Pixels,
    indices: np.ndarray,
    augmentation: Augmentation,
    settings: TrainSettings,
    *,
    plan: RoundPlan,
    proximal_mu: float,
    generator: Generator,
    backend: Backend,
    momentum: Mapping[str, Tensor] | None = None,
    negatives: Tensor | None = None,
) -> TrainResult:
    """Train the method in place on the client's images for one round.

    Args:
        images: the whole image set, see `cache_on_device`.
        indices: which of them are this client's, at least two.
        plan: how much of the run's training this is; the learning rate is a cosine
            over the whole run.
        proximal_mu: weight of FedProx's term, mu / 2 * |w - w_global|^2
            (https://arxiv.org/abs/1812.06127); 0 for none.
        generator: on the CPU; decides the order and the views.
        momentum: that the optimizers begin with, see `zero_momentum`; None or empty for zero.
        negatives: where projections of other clients lie, see `Method.take_negatives`.

    Raises:
        ValueError: fewer than two images.
        FloatingPointError: the loss is not finite any more.
    """
    if len(indices) < 2:
        raise ValueError(f"a client needs at least 2 images to train, this one has {len(indices)}")
    batch_size = min(settings.batch_size, len(indices))
    steps = settings.steps(len(indices), plan.fraction)
    optimizers = build_optimizers(method, settings.optimizer, backend.dtype)
    set_momentum(optimizers, method, momentum or {})
    scale = batch_size / settings.batch_size  # of the learning rates
    global_params = _copy_parameters(method) if proximal_mu > 0 else []
    method.train()
    together = plan.begin >= settings.global_statistics_from
    if together:
        freeze_statistics(method)
    if negatives is not None and together:  # else they lie where another network puts them
        method.take_negatives(negatives.to(backend.device), generator)
    losses = torch.zeros(steps, device=backend.device)
    began = time.perf_counter()
    for step, rows in enumerate(_batches(indices, batch_size, steps, generator)):
        progress = plan.progress(step / steps)
        views = augmentation.two_views(get_batch(images, rows, backend.device), generator)
        with backend.autocast():
            loss = method.loss(views)
        method.zero_grad(set_to_none=True)
        loss.total.backward()
        losses[step] = loss.reported
        add_proximal_gradient(method, global_params, proximal_mu)
        _step(optimizers, scale * cosine(progress))
        method.after_step(progress)
    method.take_negatives(None, generator)
    method.zero_grad(set_to_none=True)  # the method outlives the round, gradients need not
    mean = float(losses.mean())
    if not math.isfinite(mean):
        rates = " or ".join(settings.optimizer.rates)
        raise FloatingPointError(f"the training loss became {mean}; lower {rates}")
    elapsed = time.perf_counter() - began
    ended = read_momentum(optimizers, method) if momentum else {}
    return TrainResult(mean, steps * batch_size, steps * batch_size / elapsed, ended)


def freeze_statistics(method: Method) -> None:
    """Let BatchNorm normalize by the statistics that came with the weights, in training too.

    So all clients see one network, whatever classes they hold (FixBN,
    https://arxiv.org/abs/2303.06530), until the method's mode is set again.
    """
    for layer in shared_norm_layers(method).values():
        layer.eval()


def _batches(
    indices: np.ndarray, batch_size: int, steps: int, generator: Generator
) -> Iterator[np.ndarray]:
    """Deal out the client's images, in a new order, and so with other negatives, every epoch."""
    per_epoch = len(indices) // batch_size
    for step in range(steps):
        place = step % per_epoch
        if place == 0:
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
        yield order[place * batch_size : (place + 1) * batch_size]


def _step(optimizers: list[Optimizer], factor: float) -> None:
    """Move the weights, with each optimizer's rate times a factor."""
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        group["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()


def _copy_parameters(method: Method) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in method.parameters()]


@torch.no_grad()
def add_proximal_gradient(method: Method, global_params: list[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term, mu * (w - w_global), to those of the method.

    Args:
        global_params: in the order of the method's parameters; empty for no term.
    """
    if not global_params:
        return
    for parameter, start in zip(method.parameters(), global_params, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=mu)


@torch.inference_mode()
def local_loss(
    method: Method,
    images: Pixels,
    indices: np.ndarray,
    augmentation: Augmentation,
    *,
    batch_size: int,
    generator: Generator,
    backend: Backend,
) -> tuple[float, dict[str, float]]:
    """Compute the mean `Losses.reported` of held-out images in eval mode.

    Args: as of `local_train`. A last batch of one image joins its neighbour.

    Returns:
        The loss, and `measure_representation` of the first images, at least 512
        if there are so many.

    Raises:
        ValueError: fewer than two images.
    """
    if len(indices) < 2:
        raise ValueError(f"a held-out loss needs at least 2 images, got {len(indices)}")
    method.eval()
    total = 0.0
    first: list[Tensor] = []
    second: list[Tensor] = []
    for rows in np.array_split(indices, max(1, len(indices) // batch_size)):
        views = augmentation.two_views(get_batch(images, rows, backend.device), generator)
        with backend.autocast():
            loss = method.loss(views)
        total += float(loss.reported) * len(rows)
        if sum(map(len, first)) < MEASURED_IMAGES:
            first.append(loss.projections[: len(rows)])
            second.append(loss.projections[len(rows) :])
    return total / len(indices), measure_representation(torch.cat([*first, *second]))


@torch.inference_mode()
def projection_moments(
    method: Method,
    images: Pixels,
    indices: np.ndarray,
    augmentation: Augmentation,
    *,
    batch_size: int,
    generator: Generator,
    backend: Backend,
) -> dict[str, Tensor]:
    """Measure projections in eval mode, over 1,024 images.

    Args: as of `local_train`.

    Returns:
        float32 `mean` (D,) and `covariance` (D, D).

    Raises:
        ValueError: fewer than two images.
    """
    if len(indices) < 2:
        raise ValueError(f"moments of projections need at least 2 images, got {len(indices)}")
    method.eval()
    rows = indices[torch.randperm(len(indices), generator=generator)[:PROJECTED_IMAGES].numpy()]
    projections = []
    for batch in np.array_split(rows, max(1, len(rows) // batch_size)):
        views = augmentation.two_views(get_batch(images, batch, backend.device), generator)
        with backend.autocast():
            projections.append(method.loss(views).projections.float())
    points = torch.cat(projections).double()
    moments = {"mean": points.mean(dim=0), "covariance": torch.cov(points.T)}
    return {name: value.float().cpu() for name, value in moments.items()}
