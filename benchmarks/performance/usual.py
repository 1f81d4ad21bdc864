"""How SimCLR's views are usually made: by torchvision, one image after the other."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2


class Views(Dataset):
    """The usual way: each image is a PIL image, its two views are made one by one."""

    def __init__(self, pixels: np.ndarray, augment: Callable) -> None:
        self.pixels, self.augment = pixels, augment

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.pixels[row].transpose(1, 2, 0))
        return self.augment(image), self.augment(image)


def usual_transform(size: int) -> Callable:
    """SimCLR's transforms for CIFAR-10 as tutorials write them, strengths as ours."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(0.1),
            transforms.ToTensor(),
        ]
    )


def batched_transform(size: int) -> Callable:
    """Write the same with torchvision's v2, for tensors."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.1),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def make_loader(pixels: np.ndarray, side: int, batch: int, workers: int, cuda: bool) -> DataLoader:
    """Load views the usual way, with a worker process per core."""
    views = Views(pixels, usual_transform(side))
    return DataLoader(
        views, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=cuda
    )
