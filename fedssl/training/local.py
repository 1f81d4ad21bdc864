"""Local training and the held-out loss: what a client computes, free of Flower."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedssl.data.views import Augmentation
from fedssl.training.optimizers import Optimization, make_optimizers
from fedssl.training.representation import measure_health
from fedssl.training.schedule import cosine
from model import SimCLR, nt_xent

HEALTH_IMAGES = 512  # the effective rank depends on how many images it is measured on
DEVICE_SHARE = 0.1  # of a GPU's free memory, which the images may take


@dataclass(frozen=True)
class TrainResult:
    """The mean NT-Xent over the steps of a round, in nats, the images used, and the pace."""

    loss: float
    images: int
    images_per_second: float


def hold_images(pixels: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """Put images, uint8 (N, 3, H, W), on a GPU if they are small beside its free memory.

    Otherwise they stay where they are, in a file that all processes share.
    """
    if device.type != "cuda" or pixels.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return pixels
    return torch.from_numpy(np.array(pixels)).to(device)


def take_images(pixels: np.ndarray | Tensor, rows: np.ndarray, device: torch.device) -> Tensor:
    """Take a batch of images to the device, in ascending order of their rows."""
    rows = np.sort(rows)
    if isinstance(pixels, Tensor):
        return pixels[torch.from_numpy(rows).to(pixels.device, non_blocking=True)]
    return torch.from_numpy(pixels[rows]).to(device, non_blocking=True)


def local_train(
    model: SimCLR,
    images: np.ndarray | Tensor,
    indices: np.ndarray,
    augmentation: Augmentation,
    settings: Optimization,
    *,
    length: float,
    run_part: tuple[float, float],
    proximal_mu: float,
    generator: Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> TrainResult:
    """Train the model in place on the client's images for one round.

    Args:
        images: uint8 (N, 3, H, W), the whole image set, see `hold_images`.
        indices: which of them are this client's, at least two.
        length: of this round, as a share of the steps that the settings allow; one at least.
        run_part: where this round begins and ends within the run, from 0 to 1;
            the learning rate is a cosine over the whole run.
        proximal_mu: weight of FedProx's term, mu / 2 * |w - w_global|^2
            (https://arxiv.org/abs/1812.06127); 0 for none.
        generator: on the CPU; decides the order and the views.
        dtype: autocast type of the forward pass and of Muon's products, float32 for none.

    Raises:
        ValueError: fewer than two images.
        FloatingPointError: the loss is not finite any more.
    """
    if len(indices) < 2:
        raise ValueError(f"a client needs at least 2 images to train, this one has {len(indices)}")
    batch_size = min(settings.batch_size, len(indices))
    batches_per_epoch = len(indices) // batch_size
    steps = settings.local_epochs * batches_per_epoch
    steps = min(steps, settings.max_steps) if settings.max_steps else steps
    steps = max(1, round(length * steps))
    optimizers = make_optimizers(model, settings, dtype)
    share = batch_size / settings.batch_size
    anchor = [p.detach().clone() for p in model.parameters()] if proximal_mu > 0 else []
    model.train()
    losses = torch.zeros(steps, device=device)
    began = time.perf_counter()
    for step in range(steps):
        place = step % batches_per_epoch
        if place == 0:  # a new order, and so other negatives, in every epoch
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
        rows = order[place * batch_size : (place + 1) * batch_size]
        batch = take_images(images, rows, device)
        progress = run_part[0] + (run_part[1] - run_part[0]) * step / steps
        losses[step] = _step(model, batch, augmentation, settings.temperature, generator, dtype)
        if anchor:
            _pull(model, anchor, proximal_mu)
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"] = optimizer.defaults["lr"] * share * cosine(progress)
            optimizer.step()
    model.zero_grad(set_to_none=True)  # the model outlives the round, gradients need not
    loss = float(losses.mean())
    if not math.isfinite(loss):
        rates = ["train.learning_rate", "train.muon_learning_rate"][: len(optimizers)]
        raise FloatingPointError(f"the training loss became {loss}; lower {' or '.join(rates)}")
    elapsed = time.perf_counter() - began
    return TrainResult(loss, steps * batch_size, steps * batch_size / elapsed)


def _step(
    model: SimCLR,
    batch: Tensor,
    augmentation: Augmentation,
    temperature: float,
    generator: Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the gradients of one batch, uint8 (B, 3, H, W); return the loss of the last stage.

    The losses of all deep heads together count as much.
    """
    views = augmentation.two_views(batch, generator)
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
        projections = model.project_stages(views)
    loss, *deep = (nt_xent(some, temperature) for some in projections)
    total = loss + torch.stack(deep).mean() if deep else loss
    model.zero_grad(set_to_none=True)
    total.backward()
    return loss.detach()


@torch.no_grad()
def _pull(model: SimCLR, anchor: list[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term, mu * (w - w_global)."""
    for parameter, start in zip(model.parameters(), anchor, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=mu)


@torch.inference_mode()
def local_loss(
    model: SimCLR,
    images: np.ndarray | Tensor,
    indices: np.ndarray,
    augmentation: Augmentation,
    *,
    batch_size: int,
    temperature: float,
    generator: Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, dict[str, float]]:
    """Compute the mean NT-Xent of held-out images in eval mode, in nats.

    Args: as of `local_train`. A last batch of one image joins its neighbour.

    Returns:
        The loss, and `measure_health` of the first images, at least 512 if
        there are so many.

    Raises:
        ValueError: fewer than two images.
    """
    if len(indices) < 2:
        raise ValueError(f"a held-out loss needs at least 2 images, got {len(indices)}")
    model.eval()
    total = 0.0
    first: list[Tensor] = []
    second: list[Tensor] = []
    for rows in np.array_split(indices, max(1, len(indices) // batch_size)):
        batch = take_images(images, rows, device)
        views = augmentation.two_views(batch, generator)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            projections = model(views)
        total += float(nt_xent(projections, temperature)) * len(rows)
        if sum(map(len, first)) < HEALTH_IMAGES:
            first.append(projections[: len(rows)])
            second.append(projections[len(rows) :])
    return total / len(indices), measure_health(torch.cat([*first, *second]))
