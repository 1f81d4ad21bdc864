"""How fast local training is, against the bare network and against the usual way.

    python -m benchmarks.performance.speed --path cifar10-parquet --out results/speed.json

Three ways to train the same encoder on the same images, measured alternately in
one process, in images per second:

- ours: `client.local_train` as it runs in a client;
- bare: the same encoder, batch, precision and optimizer on random tensors that
  lie ready: no data, no augmentation, no projection head, a sum for a loss;
- usual: torchvision's transforms on one PIL image after the other in a
  DataLoader with a worker per core, one forward pass per view, float32.

Then the augmentation alone: two views of a batch of 512 by ours, by
torchvision's v2 transforms on the whole batch (which draw one set of parameters
for all its images), and by the per-image pipeline. Ratios within a run mean
something; absolute figures depend on the machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from fedssl.compute import choose_device, choose_dtype
from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.views import make_augmentation
from fedssl.federation.resources import count_cores
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import local_train
from fedssl.training.optimizers import make_optimization
from model import nt_xent
from utils import build_model, open_source

CASES = [("resnet18", "imagenet"), ("resnet18", "conv3x3_stride1"), ("resnet50", "imagenet")]


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


class Contest:
    """The three ways for one encoder and batch, each ready to do some steps."""

    def __init__(self, config, pixels: np.ndarray, device: torch.device, workers: int) -> None:
        self.config, self.pixels, self.device = config, pixels, device
        self.dtype = choose_dtype(config.precision, device)
        self.batch = config.train.batch_size
        self.settings = make_optimization(config.train)
        self.augmentation = make_augmentation(config.augment, config.dataset.image_size)
        self.ours_model = build_model(config.model, config.dataset, 0, device)
        self.bare_model = build_model(config.model, config.dataset, 0, device)
        self.usual_model = self._usual_model()
        side = config.dataset.image_size
        self.random_views = torch.rand(2 * self.batch, 3, side, side, device=device)
        self.random_views = self.random_views.contiguous(memory_format=torch.channels_last)
        self.loader = make_loader(pixels, side, self.batch, workers, device.type == "cuda")

    def _usual_model(self) -> nn.Module:
        """Build the same network from torchvision's layers, in the usual memory format."""
        model = build_model(self.config.model, self.config.dataset, 0, self.device)
        plain = getattr(torchvision.models, self.config.model.encoder)(weights=None)
        if self.config.model.stem != "imagenet":
            plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        plain.fc = nn.Identity()
        model.encoder = plain
        return model.to(self.device, memory_format=torch.contiguous_format)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that local training uses."""
        s = self.settings
        return torch.optim.SGD(
            model.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay
        )

    def ours(self, steps: int) -> float:
        """Train as a client does; give images per second."""
        result = local_train(
            self.ours_model,
            self.pixels,
            np.arange(len(self.pixels)),
            self.augmentation,
            make_optimization({**self.config.train, "max_steps": steps, "local_epochs": 1000}),
            length=1.0,
            run_part=(0, 0.1),
            proximal_mu=0.0,
            generator=generator_for(0, "benchmark"),
            device=self.device,
            dtype=self.dtype,
        )
        return result.images_per_second

    def bare(self, steps: int) -> float:
        """Do nothing but the encoder's forward and backward pass and the optimizer's step."""
        encoder = self.bare_model.encoder.train()
        optimizer = self.optimizer(encoder)
        enabled = self.dtype != torch.float32

        def step() -> None:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
                features = encoder(self.random_views)
            optimizer.zero_grad(set_to_none=True)
            features.float().sum().backward()
            optimizer.step()

        return self._timed(step, steps)

    def usual(self, steps: int) -> float:
        """Train as most tutorials do."""
        model = self.usual_model.train()
        optimizer = self.optimizer(model)
        batches = iter(self.loader)  # workers of its own, which end with it

        def step() -> None:
            first, second = (view.to(self.device, non_blocking=True) for view in next(batches))
            projections = [
                model.projection_head(model.encoder((view - model.mean) / model.std))
                for view in (first, second)
            ]
            loss = nt_xent(torch.cat(projections), self.settings.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

        step()
        return self._timed(step, steps)

    def _timed(self, step: Callable[[], None], steps: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        self._wait()
        return steps * self.batch / (time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(contest: Contest, seconds: float, repeats: int) -> dict:
    """Measure the ways in turns; give the medians and their ratios.

    A measurement lasts `seconds` or at least two steps, long against the few
    batches that a DataLoader has ready beforehand.
    """
    ways = {"ours": contest.ours, "bare": contest.bare, "usual": contest.usual}
    steps = {}
    for name, way in ways.items():
        way(1)  # warm: kernels chosen, memory taken
        steps[name] = max(2, round(seconds * way(1) / contest.batch))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way(steps[name]))
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return {
        "images_per_second": medians,
        "all": found,
        "of_bare": medians["ours"] / medians["bare"],
        "over_usual": medians["ours"] / medians["usual"],
    }


def compare_augmentations(config, pixels: np.ndarray, device: torch.device, workers: int) -> dict:
    """Time two views of a batch of 512, three ways, in milliseconds."""
    count, side = 512, config.dataset.image_size
    batch = torch.from_numpy(pixels[:count].copy()).to(device)
    ours = make_augmentation(config.augment, side)
    generator = generator_for(0, "benchmark")
    batched = batched_transform(side)

    def time_tensors(way: Callable[[], object], repeats: int = 30) -> float:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began) / repeats

    def time_loader(batches: int = 30) -> float:
        rows = np.resize(pixels, ((batches + 2 * workers) * count, *pixels.shape[1:]))
        loader = iter(make_loader(rows, side, count, workers, False))
        for _ in range(2 * workers):  # what was made before the clock starts
            next(loader)
        began = time.perf_counter()
        for _ in range(batches):
            next(loader)
        return 1000 * (time.perf_counter() - began) / batches

    found = {
        "ours": time_tensors(lambda: ours.two_views(batch, generator)),
        "torchvision v2 on the batch": time_tensors(lambda: (batched(batch), batched(batch))),
        "one PIL image after the other": time_loader(),
    }
    return {
        "milliseconds": found,
        "over_pil": found["one PIL image after the other"] / found["ours"],
    }


def main() -> None:
    """Measure, print tables, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--cases", nargs="+", default=[f"{e}/{s}" for e, s in CASES])
    parser.add_argument("--seconds", type=float, default=20, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = ["dataset=cifar10", f"dataset.path={given.path}"]
    config = load_config("config", base)
    device, workers, measured = choose_device(), count_cores(), provenance()
    torch.set_num_threads(workers)
    places = (config.dataset.image_size, config.cache_dir, 0)
    pixels = np.array(open_image_set(open_source(config.dataset), *places).train.pixels)
    augmentation = compare_augmentations(config, pixels, device, workers)
    print("two views of 512 images")
    for name, value in augmentation["milliseconds"].items():
        print(f"  {name:32}{value:9.1f} ms")
    rows = []
    print(f"{'encoder':10}{'stem':17}{'batch':>6}{'ours':>8}{'bare':>8}{'usual':>8}   images/s")
    for case in given.cases:
        encoder, stem = case.split("/")
        for batch in given.batches:
            changes = [f"model={encoder}", f"model.stem={stem}", f"train.batch_size={batch}"]
            contest = Contest(load_config("config", [*base, *changes]), pixels, device, workers)
            row = {"encoder": encoder, "stem": stem, "batch": batch}
            row |= compare(contest, given.seconds, given.repeats)
            rows.append(row)
            speeds = row["images_per_second"]
            print(
                f"{encoder:10}{stem:17}{batch:6}{speeds['ours']:8.0f}{speeds['bare']:8.0f}"
                f"{speeds['usual']:8.0f}   {row['of_bare']:.2f} of bare, "
                f"{row['over_usual']:.1f} times the usual",
                flush=True,
            )
            del contest
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.performance.speed --path DIR --seconds {given.seconds:g}"
        result = {"command": command, "augmentation": augmentation, "rows": rows}
        result |= {"precision": str(choose_dtype("auto", device)), "measured": measured}
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
