"""Draw the pictures of the README and of docs/.

python -m scripts.draw_images
python -m scripts.draw_images --run=outputs/latest   # and those that need the weights of a run
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fedssl.config.compose import load_config
from fedssl.data.partitions import count_classes
from fedssl.env import ROOT
from fedssl.reporting.comparison import MAIN_METRIC, draw_comparison, find_runs, gather
from fedssl.reporting.figures import (
    BLUE,
    INK,
    ORANGE,
    WIDTH,
    draw_knn,
    draw_loss_graph,
    draw_partitions,
    show_image,
)
from fedssl.runs.directory import RunDirectory
from fedssl.seeding import generator_for
from model import SimCLR
from utils import build_views, open_images, open_partitions

DIGITS = ROOT / "results" / "digits"
RECORDED_RUN = DIGITS / "seed0"
BENCHMARK = ROOT / "results" / "cifar10_cpu" / "seed0"
SWEEP = ROOT / "results" / "sweep"
FEDERATIONS = ROOT / "results" / "federation"
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


def draw_views(file: Path, overrides: Sequence[str], count: int = 8) -> None:
    """Show training images above two random views of each.

    Args:
        overrides: which data set and views, as for main.py.
    """
    config = load_config("config", overrides)
    images = open_images(config).train.pixels[:count]
    generator = generator_for(config.seed, "figure")
    views = build_views(config).two_views(torch.from_numpy(np.array(images)), generator)
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
    image_set = open_images(config)
    counts = count_classes(image_set, open_partitions(config, image_set))
    draw_partitions(counts, image_set.class_names, file)


def read_heads(name: str) -> list[float]:
    """Read the linear head's accuracy of every recorded seed of a federation, in percent."""
    runs = map(RunDirectory, sorted((FEDERATIONS / name).glob("seed*")))
    return [100 * run.read_results()[-1]["rows"][0]["mean"] for run in runs]


def draw_federations(file: Path, counts: Sequence[int] = (1, 2, 5, 10, 20)) -> None:
    """Show what more clients of twenty are worth, for the same time and for the same compute.

    Each line goes as far as its runs are recorded; a comparison without any is left out, and
    nothing is drawn before all federations are recorded.
    """
    alone = "of-20-1"
    together = [f"of-20-{count}" for count in counts]
    panels = {
        "in the same time: as many steps of each client": [
            ("federated", together, BLUE, "o-"),
            ("one of them alone", [alone] * len(counts), INK, "--"),
        ],
        "with the same compute: as many steps of all together": [
            ("federated", together, BLUE, "o-"),
            ("one of them alone", [alone, *(f"of-20-steps-{n}" for n in counts[1:])], INK, "s--"),
            (
                "all their images in one place",
                [alone, *(f"of-20-together-{n}" for n in counts[1:])],
                ORANGE,
                "^:",
            ),
        ],
    }
    if not all(map(read_heads, together)):
        return
    panels = {
        title: lines
        for title, lines in panels.items()
        if any(read_heads(name) for _, names, *_ in lines[1:] for name in names[1:])
    }
    figure = Figure(figsize=(WIDTH, 2.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for label, names, color, style in lines:
            found = {
                n: each for n, name in zip(counts, names, strict=True) if (each := read_heads(name))
            }
            heads = list(found.values())
            axes.plot(
                list(found), [np.mean(each) for each in heads], style, color=color, label=label
            )
            low, high = [min(each) for each in heads], [max(each) for each in heads]
            axes.fill_between(list(found), low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, color=INK, loc="left", fontsize="medium")
        axes.set_ylabel("linear head, %", color=INK)
        axes.set_xscale("log")
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("clients, each with 2,500 images", color=INK)
    figure.savefig(file, dpi=150)


def draw_attack(file: Path) -> None:
    """Show how well images of a client are told from others, by what an attacker sees."""
    record = ROOT / "results" / "privacy" / "attack.json"
    if not record.exists():
        return
    areas = json.loads(record.read_text())["areas"]
    names = list(areas)[::-1]
    means = [areas[name]["mean"] for name in names]
    errors = [areas[name]["standard_error"] for name in names]
    figure = Figure(figsize=(WIDTH, 2.1), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(
        places, np.array(means) - 0.5, xerr=errors, left=0.5, color=BLUE, ecolor=INK, height=0.6
    )
    axes.axvline(0.5, color=INK, linewidth=1)
    axes.set_yticks(places, names)
    axes.set_xlim(0.4, 1)
    axes.set_xlabel("area under the ROC curve", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(file, dpi=150)


def draw_many_clients(file: Path) -> None:
    """Show what ever more clients cost, of which ten take part: seconds, and memory."""
    record = json.loads((ROOT / "results" / "clients.json").read_text())
    rows = [row for row in record["rows"] if row["ray_nodes"] == 1]
    counts = [row["clients"] for row in rows]
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    upper.plot(counts, [row["startup_s"] for row in rows], "o-", color=INK, label="start")
    for label, part, color, style in (
        ("messages of a round", "to clients and back", BLUE, "s-"),
        ("evaluation of a round", "evaluation", ORANGE, "^-"),
    ):
        seconds = [row["parts_s"][part] / len(row["own_mb_by_round"]) for row in rows]
        upper.plot(counts, seconds, style, color=color, label=label)
    upper.set_ylabel("seconds", color=INK)
    upper.legend(frameon=False, fontsize="small")
    lower.plot(counts, [max(row["own_mb_by_round"]) / 1e3 for row in rows], "o-", color=BLUE)
    lower.set_ylabel("memory, GB", color=INK)
    lower.set_xscale("log")
    lower.set_xticks(counts, [f"{count:,}" for count in counts])
    lower.minorticks_off()
    lower.set_xlabel("clients, ten of which take part", color=INK)
    for axes in (upper, lower):
        axes.set_ylim(0, 1.2 * axes.dataLim.ymax)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


class Sketch:
    """Boxes, arrows, words and small pictures, placed in inches from the lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure, self.size = Figure(figsize=(width, height)), (width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(self, left: float, bottom: float, width: float, height: float, color: str) -> None:
        """Draw a box with round corners and a tint of its colour inside."""
        style = "round,pad=0,rounding_size=0.08"
        for alpha, edge in ((0.1, "none"), (1, color)):
            fill = color if edge == "none" else "none"
            corner = (left, bottom)
            self.axes.add_patch(
                FancyBboxPatch(
                    corner, width, height, style, alpha=alpha, ec=edge, fc=fill, linewidth=1.2
                )
            )

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-|>"
    ) -> None:
        """Draw an arrow from point to point."""
        line = {"arrowstyle": style, "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=line | {"mutation_scale": 9})

    def write(self, x: float, y: float, text: str, size: float = 9, **how: object) -> None:
        """Write text around a point."""
        given = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25} | how
        self.axes.text(x, y, text, fontsize=size, **given)

    def picture(self, left: float, bottom: float, side: float, image: np.ndarray) -> None:
        """Show an image (3, S, S)."""
        width, height = self.size
        place = (left / width, bottom / height, side / width, side / height)
        axes: Axes = self.figure.add_axes(place)
        show_image(axes, image)


def draw_overview(file: Path) -> None:
    """Show what happens: clients train on views, a server averages, few labels measure."""
    runs = [RunDirectory(folder) for folder in sorted(DIGITS.glob("seed*"))]
    scores = [run.read_results()[0]["rows"][0]["mean"] for run in runs]  # of the linear head
    rounds = len(runs[0].read_metrics())
    config = load_config("config", [])
    images = np.array(open_images(config).train.pixels[[0, 4, 30]])
    views = build_views(config).two_views(
        torch.from_numpy(images), generator_for(config.seed, "overview")
    )
    first, second = views.numpy().reshape(2, *images.shape)
    sketch = Sketch(WIDTH, 2.75)
    sketch.write(0.98, 2.58, "Clients", 11, weight="bold", color=BLUE)
    sketch.write(3.01, 2.58, "Server", 11, weight="bold", color=BLUE)
    sketch.write(4.56, 2.58, "Evaluation", 11, weight="bold", color=ORANGE)
    for number, (image, *two) in enumerate(zip(images / 255, first, second, strict=True)):
        bottom = 1.81 - 0.66 * number
        sketch.box(0.05, bottom, 1.86, 0.58, BLUE)
        sketch.picture(0.14, bottom + 0.09, 0.4, image)
        sketch.arrow((0.6, bottom + 0.29), (0.84, bottom + 0.29), INK)
        for left, view in zip((0.9, 1.39), two, strict=True):
            sketch.picture(left, bottom + 0.09, 0.4, view)
        sketch.arrow((1.95, bottom + 0.29), (2.47, bottom + 0.29), BLUE, "<|-|>")
    sketch.write(0.98, 0.38, "no labels: two views of\nan image attract each other", 8.5, va="top")
    sketch.box(2.51, 0.49, 1.0, 1.9, BLUE)
    sketch.write(3.01, 1.44, f"averages\nthe weights\n\n↻ {rounds} rounds", 9)
    sketch.write(2.21, 2.2, "weights", 8, color=BLUE)
    sketch.write(3.01, 0.38, "no image\nleaves a client", 8.5, va="top")
    sketch.arrow((3.55, 2.1), (3.95, 2.1), INK)
    sketch.box(3.99, 1.81, 1.14, 0.58, BLUE)
    sketch.write(4.56, 2.1, "encoder,\nfrozen")
    sketch.arrow((4.56, 1.79), (4.56, 1.6), INK)
    sketch.box(3.99, 0.99, 1.14, 0.58, ORANGE)
    sketch.write(4.56, 1.28, "linear head,\n10 % of labels")
    sketch.arrow((4.56, 0.97), (4.56, 0.8), INK)
    sketch.write(4.56, 0.6, f"{100 * np.mean(scores):.0f} %", 18, weight="bold", color=ORANGE)
    sketch.write(4.56, 0.38, "of the test digits\nrecognized", 8.5, va="top")
    sketch.figure.savefig(file, dpi=230, facecolor="white")


def main() -> None:
    """Draw every picture of images/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the run that the map and neighbours show")
    given, folder = parser.parse_args(), ROOT / "images"
    draw_overview(folder / "overview.png")
    draw_formula(folder / "loss_eq.png")
    draw_attack(folder / "attack.png")
    draw_many_clients(folder / "many_clients.png")
    draw_views(folder / "views.png", [])
    draw_dealing(folder / "partitions.png", ["partition=dirichlet", "partition.alpha=0.1"])
    recorded = RunDirectory(RECORDED_RUN).read_metrics()
    draw_loss_graph(recorded, folder / "loss_graph.png", "SimCLR on digits", SimCLR.loss_name)
    benchmark = RunDirectory(BENCHMARK).read_metrics()
    draw_loss_graph(benchmark, folder / "loss_cifar10.png", "SimCLR on CIFAR-10", SimCLR.loss_name)
    draw_knn(benchmark, folder / "knn_cifar10.png")
    by_clients = sorted(SWEEP.glob("clients-*"))
    if len(by_clients) > 1:
        runs, _, _ = gather(find_runs(by_clients))
        draw_comparison(runs, ["num_clients"], MAIN_METRIC, folder / "clients.png")
    draw_federations(folder / "federations.png")
    if given.run:
        for name in ("map.png", "neighbours.png"):
            shutil.copy(given.run / "figures" / name, folder)


if __name__ == "__main__":
    main()
