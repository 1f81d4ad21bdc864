"""BatchNorm's statistics, taken anew for averaged weights.

The mean of clients' weights has activations of smaller variance than the mean of their
running variances says, most of all while the clients differ much
(https://arxiv.org/abs/2211.08403). So clients tell the moments that the averaged weights
have on their images, and the server pools these as sums: for views, on which the loss is,
and for whole images, on which the encoder is used.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Generator, Tensor, nn

from fedssl.compute import Backend
from fedssl.data.views import Augmentation, shrink
from fedssl.methods.base import Method, shared_norm_layers
from fedssl.training.local import Pixels, get_batch

IMAGES = 512  # of a client and round, at most
VIEWS, WHOLE = "views.", "whole."  # before the names of layers
MEAN, SQUARE = ".mean", ".square"  # behind them

Moments = Mapping[str, Tensor]  # float32 (channels,), by VIEWS or WHOLE, layer, MEAN or SQUARE


@torch.no_grad()
def measure_moments(
    method: Method,
    images: Pixels,
    indices: np.ndarray,
    augmentation: Augmentation,
    resolution: int,
    *,
    batch_size: int,
    generator: Generator,
    backend: Backend,
) -> dict[str, Tensor]:
    """Measure mean and mean square of what enters each BatchNorm layer, over 512 images.

    Each batch is normalized by its own statistics, as in training, so deeper layers see
    what they see there. No weight changes, and no statistics of layers that are shared.

    Args: as of `local_train`.
        resolution: side in pixels of whole images.
        batch_size: images at once, two at least.

    Returns:
        `Moments` for views, of all layers, and for whole images, of the encoder's.
    """
    rows = indices[torch.randperm(len(indices), generator=generator)[:IMAGES].numpy()]
    batches = np.array_split(rows, max(1, len(rows) // batch_size))

    def see_views(batch: Tensor) -> None:
        method.loss(augmentation.two_views(batch, generator))

    def see_whole(batch: Tensor) -> None:
        method.encoder(shrink(batch.float() / 255, resolution))

    moments = {}
    for prefix, see in ((VIEWS, see_views), (WHOLE, see_whole)):
        with _watch(method) as sums, backend.autocast():
            for batch in batches:
                see(get_batch(images, batch, backend.device))
        for name, (mean, square, weight) in sums.items():
            moments[f"{prefix}{name}{MEAN}"] = (mean / weight).float().cpu()
            moments[f"{prefix}{name}{SQUARE}"] = (square / weight).float().cpu()
    return moments


@contextmanager
def _watch(method: Method) -> Iterator[dict[str, Tensor]]:
    """Sum up what enters each layer in train mode, by name; the method is as before afterwards."""
    sums: dict[str, Tensor] = {}  # (3, channels): values, squares, their number

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            values = inputs[0].float()
            axes = [axis for axis in range(values.dim()) if axis != 1]
            ones = torch.full_like(values.mean(axes), values.numel() // values.shape[1])
            found = torch.stack([values.mean(axes) * ones, values.square().mean(axes) * ones, ones])
            sums[name] = sums.get(name, 0) + found.double()

        return hook

    layers, was_training = shared_norm_layers(method), method.training
    kept = {name: [buffer.clone() for buffer in layer.buffers()] for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    method.train()
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            for buffer, value in zip(layer.buffers(), kept[name], strict=True):
                buffer.copy_(value)
        method.train(was_training)


def pool_moments(told: Sequence[Moments], weights: Sequence[float]) -> dict[str, Tensor]:
    """Pool the moments of clients as if their images were in one place.

    Args:
        told: with the same names each, at least one.
        weights: of each, such as its images.

    Returns:
        `running_mean` and `running_var` (biased) by VIEWS or WHOLE and layer.
    """
    total = math.fsum(weights)
    pooled = {}
    for name in told[0]:
        terms = [w / total * each[name].double() for each, w in zip(told, weights, strict=True)]
        pooled[name] = torch.stack(terms).sum(dim=0)
    state = {}
    for name in pooled:
        if name.endswith(MEAN):
            layer = name.removesuffix(MEAN)
            variance = pooled[f"{layer}{SQUARE}"] - pooled[name].square()
            state[f"{layer}.running_mean"] = pooled[name].float()
            state[f"{layer}.running_var"] = variance.clamp(min=0).float()
    return state
