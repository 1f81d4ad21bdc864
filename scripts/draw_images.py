"""Draw the pictures of the README.

python -m scripts.draw_images
python -m scripts.draw_images --run=outputs/latest   # and those that need the weights of a run
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import count_classes, partition_rows
from fedssl.data.views import make_augmentation
from fedssl.env import ROOT
from fedssl.reporting.comparison import MAIN_METRIC, draw_comparison, find_runs, gather
from fedssl.reporting.figures import INK, draw_knn, draw_loss_graph, draw_partitions, show_image
from fedssl.runs.directory import RunDirectory
from fedssl.seeding import generator_for
from utils import open_source

RECORDED_RUN = ROOT / "results" / "digits" / "seed0"
BENCHMARK = ROOT / "results" / "cifar10_cpu" / "seed0"
SWEEP = ROOT / "results" / "sweep"
NT_XENT = (
    r"$\ell_{i,j} = -\log\;\frac{\exp(\mathrm{sim}(z_i, z_j)/\tau)}"
    r"{\sum_{k=1}^{2N} 1_{[k \neq i]}\,\exp(\mathrm{sim}(z_i, z_k)/\tau)}$"
)
SIMILARITY = r"$\mathrm{sim}(u, v) = u^{\top} v \,/\, (\|u\|\,\|v\|)$"


def draw_formula(file: Path) -> None:
    """Typeset NT-Xent, equation 1 of the SimCLR paper."""
    with matplotlib.rc_context({"mathtext.fontset": "cm"}):
        figure = Figure(figsize=(6.4, 1.5))
        figure.text(0.5, 0.64, NT_XENT, ha="center", va="center", fontsize=20, color=INK)
        figure.text(0.5, 0.14, SIMILARITY, ha="center", va="center", fontsize=13, color=INK)
        figure.savefig(file, dpi=150)


def open_images(config: DictConfig) -> ImageSet:
    """Open the images of a configuration."""
    source, size = open_source(config.dataset), config.dataset.image_size
    return open_image_set(source, size, config.cache_dir, config.seed)


def draw_views(file: Path, overrides: Sequence[str], count: int = 8) -> None:
    """Show training images above two random views of each.

    Args:
        overrides: which data set and views, as for main.py.
    """
    config = load_config("config", overrides)
    images = open_images(config).train.pixels[:count]
    augmentation = make_augmentation(config.augment, config.dataset.image_size)
    views = augmentation.two_views(
        torch.from_numpy(np.array(images)), generator_for(config.seed, "figure")
    )
    rows = [images / 255, views[:count].numpy(), views[count:].numpy()]
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    grid = figure.subplots(3, count)
    for name, pictures, line in zip(("image", "view 1", "view 2"), rows, grid, strict=True):
        for picture, axes in zip(pictures, line, strict=True):
            show_image(axes, picture)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=INK)
    figure.savefig(file, dpi=150)


def draw_dealing(file: Path, overrides: Sequence[str]) -> None:
    """Show how the classes are spread over the clients.

    Args:
        overrides: which data set and partition, as for main.py.
    """
    config = load_config("config", overrides)
    images = open_images(config)
    dealt = (config.num_clients, dict(config.partition), config.seed)
    parts = partition_rows(images.train, *dealt)
    draw_partitions(count_classes(images, parts), images.class_names, file)


def main() -> None:
    """Draw every picture of images/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the run that the map and neighbours show")
    given, folder = parser.parse_args(), ROOT / "images"
    draw_formula(folder / "loss_eq.png")
    draw_views(folder / "views.png", [])
    draw_dealing(folder / "partitions.png", ["partition=dirichlet", "partition.alpha=0.1"])
    recorded = RunDirectory(RECORDED_RUN).read_metrics()
    draw_loss_graph(recorded, folder / "loss_graph.png", "SimCLR on digits")
    benchmark = RunDirectory(BENCHMARK).read_metrics()
    draw_loss_graph(benchmark, folder / "loss_cifar10.png", "SimCLR on CIFAR-10")
    draw_knn(benchmark, folder / "knn_cifar10.png")
    by_clients = sorted(SWEEP.glob("clients-*"))
    if len(by_clients) > 1:
        runs, _, _ = gather(find_runs(by_clients))
        draw_comparison(runs, ["num_clients"], MAIN_METRIC, folder / "clients.png")
    if given.run:
        for name in ("map.png", "neighbours.png"):
            shutil.copy(given.run / "figures" / name, folder)


if __name__ == "__main__":
    main()
