"""Try a recipe on one client's share of the images; the test set stays unseen.

    python benchmarks/tune.py --path=cifar10-parquet --images=40000 train.learning_rate=0.02
    python benchmarks/tune.py --path=cifar10-parquet --images=40000 --optimizer=adamw --warmup=0.1

One client with 9,000 training images takes the whole learning-rate schedule in so many
images, a fifth of the cost of a federation of five. Then linear head and kNN, both with
5,000 labels, are scored on 4,000 other training images. Overrides are those of main.py;
flags are for what main.py does not offer because it did not help. Every trial is a line
of results/tuning.jsonl.
"""

import argparse
import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torchvision.models.resnet import BasicBlock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from augment import encode_size, make_augmentation, view_size  # noqa: E402
from config import load_config  # noqa: E402
from features import extract_features, knn_accuracy  # noqa: E402
from heads import draw_labelled, train_linear_head  # noqa: E402
from model import SimCLR, build_model, nt_xent  # noqa: E402
from resources import count_cores  # noqa: E402
from rundir import provenance  # noqa: E402
from training import cosine  # noqa: E402
from utils import Images, choose_device, choose_dtype, generator_for, open_image_set  # noqa: E402

VALIDATION, CLIENT, LABELLED = 4000, 9000, 5000
COLOURS = ((1, 1, 1), (1, 0, -1), (-1, 2, -1))  # luma and two opponent colours


def split_images(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the rows of the client, those with labels, and those that are scored."""
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.sort(order[:VALIDATION]), np.sort(order[VALIDATION:])
    labelled = rest[draw_labelled(labels[rest], LABELLED / len(rest), 0)]
    return np.random.default_rng(1).permutation(rest)[:CLIENT], labelled, held


def start_model(config: DictConfig, given: Namespace) -> SimCLR:
    """Build the model, with another start where it is asked for."""
    model = build_model(config.model, config.dataset, config.seed, choose_device())
    if given.zero_residual:  # every block starts as the identity
        for block in model.encoder.modules():
            if isinstance(block, BasicBlock):
                nn.init.zeros_(block.bn2.weight)
    if given.cosine_stem:
        start_stem(model.encoder.conv1)
    return model


@torch.no_grad()
def start_stem(conv: nn.Conv2d) -> None:
    """Start the first filters as cosines and their negatives, lowest frequencies first."""
    side = conv.kernel_size[0]
    waves = np.cos(np.pi * np.outer(np.arange(side), np.arange(side) + 0.5) / side)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    colours = np.array(COLOURS) / np.linalg.norm(COLOURS, axis=1, keepdims=True)
    order = sorted(
        np.ndindex(side, side, 3),
        key=lambda p: p[0] ** 2 + p[1] ** 2 + 2 * (p[2] > 0) * side**2 / 9,
    )
    filters = [np.einsum("c,i,j->cij", colours[c], waves[u], waves[v]) for u, v, c in order]
    chosen = np.array(filters[: len(conv.weight) // 2])
    both = torch.from_numpy(np.concatenate([chosen, -chosen])).float()
    conv.weight[: len(both)] = both * conv.weight.std() * math.sqrt(3 * side**2)


def make_optimizer(model: SimCLR, config: DictConfig, name: str) -> Optimizer:
    """SGD as in local training, or AdamW without decay of biases and BatchNorm."""
    settings = config.train
    if name == "sgd":
        return torch.optim.SGD(
            model.parameters(), momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=settings.weight_decay)


def train(model: SimCLR, images: Images, rows: np.ndarray, config: DictConfig, given: Namespace):
    """Train on --images images in all; give the mean loss of the last 50 steps and the pace."""
    settings, generator = config.train, generator_for(config.seed, "train", 1, 0)
    optimizer = make_optimizer(model, config, given.optimizer)
    size, device = settings.batch_size, choose_device()
    dtype, steps = choose_dtype(config.precision, device), given.images // size
    model.train()
    losses, began = [], time.perf_counter()
    for step in range(steps):
        place = step % (len(rows) // size)
        if place == 0:
            order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        batch = images.pixels[np.sort(order[place * size : (place + 1) * size])]
        rising = step / (given.warmup * steps) if given.warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (rising if rising < 1 else cosine(step / steps))
        side = view_size(settings.view_sizes, config.dataset.image_size, step + 1, steps)
        views = make_augmentation(config.augment, side).two_views(
            torch.from_numpy(batch).to(device), generator
        )
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            projections = model(views)
        loss = nt_xent(projections, settings.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    elapsed = time.perf_counter() - began
    return {
        "loss": round(float(np.mean(losses[-50:])), 3),
        "train_s": round(elapsed),
        "images_per_second": round(steps * size / elapsed),
    }


def score(
    model: SimCLR, images: Images, labelled: np.ndarray, held: np.ndarray, config: DictConfig, size
) -> dict[str, float]:
    """Score linear head and kNN on images of so many pixels, in percent."""
    device = choose_device()
    dtype = choose_dtype(config.precision, device)
    features, queries = (
        extract_features(model, images.pixels[rows], device, dtype, 256, size)
        for rows in (labelled, held)
    )
    labels, answers = images.labels[labelled], images.labels[held]
    predict = train_linear_head(features, labels, 10, config.eval, 0)
    linear = float((predict(queries) == answers).mean())
    knn = knn_accuracy(features, labels, queries, answers, 10)
    return {"linear_head": round(100 * linear, 1), "knn": round(100 * knn, 1)}


def whole_numbers(text: str) -> list[int]:
    """Read numbers with commas in between."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run one trial and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--images", type=int, default=40_000, help="in all, repeats included")
    parser.add_argument("--encode", type=whole_numbers, help="sizes to score, in pixels: 16,24")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--warmup", type=float, default=0.0, help="share of the steps")
    parser.add_argument("--zero-residual", action="store_true")
    parser.add_argument("--cosine-stem", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tuning.jsonl")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(count_cores())
    config = load_config("config", ["dataset=cifar10", *given.overrides])
    config.dataset.path = given.path
    images = open_image_set(config.dataset, config.cache_dir, config.seed, report=print).train
    rows, labelled, held = split_images(images.labels)
    measured, model = provenance(), start_model(config, given)
    trained = train(model, images, rows, config, given)
    sizes = given.encode or [encode_size(config.train, config.dataset.image_size, 1, 1)]
    scores = {str(size): score(model, images, labelled, held, config, size) for size in sizes}
    flags = [a for a in sys.argv[1:] if not a.startswith(("--path", "--out", "--encode"))]
    line = {"arguments": flags, **trained, "by_pixels": scores, "measured": measured}
    print(json.dumps(line))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
