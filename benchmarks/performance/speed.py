"""How fast local training is, against the bare network and against the usual way.

    python -m benchmarks.performance.speed --path cifar10-parquet --out results/speed.json

Three ways to train the same encoder on the same images, measured alternately in
one process, in images per second:

- ours: `local_train` as it runs in a client;
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
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from omegaconf import DictConfig
from torch import nn
from torchvision import transforms

from benchmarks.performance.usual import batched_transform, make_loader
from fedssl.compute import Backend, choose_backend, count_cores
from fedssl.config.compose import load_config
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import local_train
from fedssl.training.schedule import RoundPlan
from model import nt_xent
from utils import build_method, build_train_settings, build_views, open_images

DROPPED_AT_MOST = 3  # turns, for each that counts
CASES = [("resnet18", "imagenet"), ("resnet18", "conv3x3_stride1"), ("resnet50", "imagenet")]


class Contest:
    """The three ways for one encoder and batch, each ready to do some steps."""

    def __init__(
        self, config: DictConfig, pixels: np.ndarray, backend: Backend, workers: int
    ) -> None:
        self.config, self.pixels, self.backend = config, pixels, backend
        self.settings = build_train_settings(config)
        self.batch = self.settings.batch_size
        self.augmentation = build_views(config)
        self.ours_method = build_method(config, backend.device)
        self.bare_encoder = build_method(config, backend.device).encoder
        self.usual_network = self._usual_network()
        side = config.dataset.image_size
        self.random_views = torch.rand(2 * self.batch, 3, side, side, device=backend.device)
        self.random_views = self.random_views.contiguous(memory_format=torch.channels_last)
        cuda = backend.device.type == "cuda"
        self.loader = make_loader(pixels, side, self.batch, workers, cuda)

    def _usual_network(self) -> nn.Module:
        """Build the same network from torchvision's layers, in the usual memory format."""
        method = build_method(self.config, self.backend.device)
        plain = getattr(torchvision.models, self.config.model.encoder)(weights=None)
        if self.config.model.stem != "imagenet":
            plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        plain.fc = nn.Identity()
        dataset = self.config.dataset
        normalize = transforms.Normalize(list(dataset.mean), list(dataset.std))
        network = nn.Sequential(normalize, plain, method.projection_head)
        return network.to(self.backend.device, memory_format=torch.contiguous_format)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that local training uses."""
        s = self.settings.optimizer
        return torch.optim.SGD(
            network.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay
        )

    def ours(self, steps: int) -> float:
        """Train as a client does; give images per second."""
        result = local_train(
            self.ours_method,
            self.pixels,
            np.arange(len(self.pixels)),
            self.augmentation,
            replace(self.settings, max_steps=steps, local_epochs=1000),
            plan=RoundPlan(1.0, 0.0, 0.1),
            proximal_mu=0.0,
            generator=generator_for(0, "benchmark"),
            backend=self.backend,
        )
        return result.images_per_second

    def bare(self, steps: int) -> float:
        """Do nothing but the encoder's forward and backward pass and the optimizer's step."""
        encoder = self.bare_encoder.train()
        optimizer = self.optimizer(encoder)

        def step() -> None:
            with self.backend.autocast():
                features = encoder(self.random_views)
            optimizer.zero_grad(set_to_none=True)
            features.float().sum().backward()
            optimizer.step()

        return self._timed(step, steps)

    def usual(self, steps: int) -> float:
        """Train as most tutorials do."""
        network = self.usual_network.train()
        optimizer = self.optimizer(network)
        batches = iter(self.loader)  # workers of its own, which end with it

        def step() -> None:
            views = (view.to(self.backend.device, non_blocking=True) for view in next(batches))
            projections = torch.cat([network(view) for view in views])
            loss = nt_xent(projections, self.config.method.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

        step()
        return self._timed(step, steps)

    def _timed(self, step: Callable[[], None], steps: int) -> float:
        wait_for(self.backend.device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(self.backend.device)
        return steps * self.batch / (time.perf_counter() - began)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(contest: Contest, seconds: float, repeats: int) -> dict:
    """Measure the ways in turns; give medians, and the medians of each turn's ratios.

    In a turn the bare network, which does always the same, runs before ours and after it. Where
    these two differ by more than a third, the machine was busy with something else, and the turn
    is dropped.

    Args:
        contest: the three ways.
        seconds: of a measurement, which has at least two steps; the usual way takes three times
            as long, long against the few batches that a DataLoader has ready beforehand.
        repeats: turns that count.

    Raises:
        SystemExit: it was busy most of the time.
    """
    ways = {"ours": contest.ours, "bare": contest.bare, "usual": contest.usual}
    steps = {}
    for name, way in ways.items():
        way(1)  # warm: kernels chosen, memory taken
        lasts = seconds * (3 if name == "usual" else 1)
        steps[name] = max(2, round(lasts * way(1) / contest.batch))
    turns: list[dict[str, float]] = []
    dropped = 0
    while len(turns) < repeats:
        before, ours, after, usual = (
            ways[name](steps[name]) for name in ("bare", "ours", "bare", "usual")
        )
        bare = (before + after) / 2
        if abs(before - after) <= bare / 3:
            turns.append({"ours": ours, "bare": bare, "usual": usual})
            continue
        dropped += 1
        if dropped > DROPPED_AT_MOST * repeats:
            raise SystemExit(f"the bare network varied by over a third in {dropped} turns")
    found = {name: [turn[name] for turn in turns] for name in ways}
    return {
        "images_per_second": {name: median(values) for name, values in found.items()},
        "all": found,
        "dropped": dropped,
        "of_bare": median(turn["ours"] / turn["bare"] for turn in turns),
        "over_usual": median(turn["ours"] / turn["usual"] for turn in turns),
    }


def compare_augmentations(
    config: DictConfig, pixels: np.ndarray, device: torch.device, workers: int
) -> dict:
    """Time two views of a batch of 512, three ways, in milliseconds."""
    count, side = 512, config.dataset.image_size
    batch = torch.from_numpy(pixels[:count].copy()).to(device)
    ours = build_views(config)
    generator = generator_for(0, "benchmark")
    batched = batched_transform(side)

    def time_tensors(way: Callable[[], object], repeats: int = 30) -> float:
        way()
        wait_for(device)
        began = time.perf_counter()
        for _ in range(repeats):
            way()
        wait_for(device)
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
    parser.add_argument("--seconds", type=float, default=5, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = ["dataset=cifar10", f"dataset.path={given.path}"]
    config = load_config("config", base)
    backend, workers, measured = choose_backend("auto"), count_cores(), provenance()
    torch.set_num_threads(workers)
    pixels = np.array(open_images(config).train.pixels)
    augmentation = compare_augmentations(config, pixels, backend.device, workers)
    print("two views of 512 images")
    for name, value in augmentation["milliseconds"].items():
        print(f"  {name:32}{value:9.1f} ms")
    rows = []
    print(f"{'encoder':10}{'stem':17}{'batch':>6}{'ours':>8}{'bare':>8}{'usual':>8}   images/s")
    for case in given.cases:
        encoder, stem = case.split("/")
        for batch in given.batches:
            changes = [f"model={encoder}", f"model.stem={stem}", f"train.batch_size={batch}"]
            contest = Contest(load_config("config", [*base, *changes]), pixels, backend, workers)
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
        result |= {"precision": str(backend.dtype), "measured": measured}
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
