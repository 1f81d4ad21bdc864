"""Pictures: the loss graph of a run, and those of the README.

python figures.py       # draws images/ again
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from augment import make_augmentation
from config import load_config
from features import nearest_neighbours
from utils import generator_for, open_image_set

HERE = Path(__file__).resolve().parent
RECORDED_RUN = HERE / "results" / "digits" / "seed0"
BLUE, ORANGE, INK = "#2a6fb0", "#c8571b", "#333333"
NT_XENT = (
    r"$\ell_{i,j} = -\log\;\frac{\exp(\mathrm{sim}(z_i, z_j)/\tau)}"
    r"{\sum_{k=1}^{2N} 1_{[k \neq i]}\,\exp(\mathrm{sim}(z_i, z_k)/\tau)}$"
)
SIMILARITY = r"$\mathrm{sim}(u, v) = u^{\top} v \,/\, (\|u\|\,\|v\|)$"


def draw_loss_graph(metrics: Sequence[Mapping[str, Any]], file: Path, dataset: str) -> None:
    """Plot the clients' mean train and evaluation loss over rounds, and their range.

    Args:
        metrics: the lines of metrics.jsonl.
        dataset: its name, for the title.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    rounds = [line["round"] for line in metrics]
    for key, name, color, marker in (
        ("train_loss", "train", BLUE, "o"),
        ("eval_loss", "evaluation (held-out images)", ORANGE, "s"),
    ):
        means = [math.nan if line[key] is None else line[key] for line in metrics]
        axes.plot(rounds, means, color=color, marker=marker, label=name)
        clients = [[c[key] for c in line["clients"] if key in c] or [math.nan] for line in metrics]
        low, high = [min(values) for values in clients], [max(values) for values in clients]
        axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
    count = max(len(line["clients"]) for line in metrics)
    axes.set_title(f"SimCLR on {dataset}, {count} clients", color=INK, loc="left")
    axes.set_xlabel("round")
    axes.set_ylabel("NT-Xent loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="mean over clients; band: all clients", frameon=False, alignment="left")
    figure.savefig(file, dpi=150)


def draw_formula(file: Path) -> None:
    """Typeset NT-Xent, equation 1 of the SimCLR paper."""
    with matplotlib.rc_context({"mathtext.fontset": "cm"}):
        figure = Figure(figsize=(6.4, 1.5))
        figure.text(0.5, 0.64, NT_XENT, ha="center", va="center", fontsize=20, color=INK)
        figure.text(0.5, 0.14, SIMILARITY, ha="center", va="center", fontsize=13, color=INK)
        figure.savefig(file, dpi=150)


def draw_views(file: Path, overrides: Sequence[str], count: int = 8) -> None:
    """Show training images above two random views of each.

    Args:
        overrides: which data set and views, as for main.py.
    """
    config = load_config("config", overrides)
    images = open_image_set(config.dataset, config.cache_dir, config.seed).train.pixels[:count]
    augmentation = make_augmentation(config.augment, config.dataset.image_size)
    views = augmentation.two_views(
        torch.from_numpy(np.array(images)), generator_for(config.seed, "figure")
    )
    rows = [images / 255, views[:count].numpy(), views[count:].numpy()]
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    grid = figure.subplots(3, count)
    for name, pictures, line in zip(("image", "view 1", "view 2"), rows, grid, strict=True):
        for picture, axes in zip(pictures, line, strict=True):
            _show(axes, picture)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=INK)
    figure.savefig(file, dpi=150)


def draw_neighbours(
    pixels: Mapping[int, np.ndarray] | np.ndarray,
    features: np.ndarray,
    file: Path,
    names: Sequence[str] | None = None,
    queries: int = 6,
    neighbours: int = 8,
) -> None:
    """Show some images, each with those whose features are most similar.

    The queries are taken at equal distances from all rows.

    Args:
        pixels: uint8 (3, S, S) by row; only those that are shown are asked for.
        features: float32 (N, D), N at least 2.
        names: of the rows' classes, shown below the images.
        queries, neighbours: so many, or as many as there are.
    """
    count = min(neighbours, len(features) - 1)
    asked = np.linspace(0, len(features) - 1, min(queries, len(features))).round().astype(np.int64)
    rows, similarity = nearest_neighbours(features, asked, count)
    text = 0.36 if names else 0.22  # inches below each image
    height = (0.7 + text) * len(asked) + 0.3
    figure = Figure(figsize=(0.72 * (count + 1) + 0.4, height))
    widths = [1, 0.4, *[1] * count]
    grid = figure.subplots(len(asked), count + 2, squeeze=False, width_ratios=widths)
    figure.subplots_adjust(0.01, text / height, 0.99, 1 - 0.3 / height, 0.08, text / 0.7)
    for line, query, near, closeness in zip(grid, asked, rows, similarity, strict=True):
        line[1].text(0.5, 0.5, "→", ha="center", va="center", fontsize=14, color=INK)
        line[1].set_axis_off()
        values = ["", *(f"{value:.2f}" for value in closeness)]
        for axes, row, value in zip(np.delete(line, 1), [query, *near], values, strict=True):
            _show(axes, pixels[row])
            lines = [_shortened(names[row]) if names else "", value]
            axes.set_xlabel("\n".join(filter(None, lines)), fontsize=7, labelpad=2)
    grid[0, 0].set_title("query", fontsize=9, color=INK)
    grid[0, 2].set_title("its nearest, by cosine similarity", fontsize=9, color=INK, loc="left")
    figure.savefig(file, dpi=150, format="png")


def _shortened(name: str, length: int = 12) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _show(axes: Axes, picture: np.ndarray) -> None:
    """Show an image (3, S, S); one that is enlarged keeps its pixels sharp."""
    interpolation = "nearest" if picture.shape[-1] <= 100 else "antialiased"
    axes.imshow(picture.transpose(1, 2, 0), interpolation=interpolation)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def main() -> None:
    """Draw every picture of images/."""
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    draw_formula(folder / "loss_eq.png")
    draw_views(folder / "views.png", [])
    lines = (RECORDED_RUN / "metrics.jsonl").read_text().splitlines()
    draw_loss_graph([json.loads(line) for line in lines], folder / "loss_graph.png", "digits")


if __name__ == "__main__":
    main()
