"""Pictures of a run: arrays in, a PNG out, each written as a whole."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedssl.evaluation.knn import nearest_neighbours
from fedssl.federation.monitoring import COLLAPSED_RANK, COLLAPSED_UNIFORMITY
from fedssl.files import write_atomically
from fedssl.runs.metrics import RoundMetrics

matplotlib.rcParams["text.parse_math"] = False  # names of classes may hold dollar signs
BLUE, ORANGE, INK = "#2a6fb0", "#c8571b", "#333333"
WIDTH = 5.2  # inches: the letters stay readable on a phone
NEAREST = 8  # neighbours beside each query
MAX_COLUMNS = 50  # partitions that fit side by side
MAX_LETTERS = 11  # of a class's name
LEGEND_COLUMNS = 5
MANY_COLORS = "turbo"  # by class number
MAX_NAMES = 20  # classes with a name and a colour that can be told apart
CONTROL = ("Cc", "Cf", "Zl", "Zp")  # letters that do something instead of being seen
REPRESENTATION = (
    ("effective_rank", "effective rank", (COLLAPSED_RANK, "below: collapsed")),
    ("uniformity", "uniformity", (COLLAPSED_UNIFORMITY, "above: collapsed")),
    ("alignment", "alignment", None),
)


def draw_loss_graph(
    rounds: Sequence[RoundMetrics], file: Path, title: str, loss_name: str = "loss"
) -> None:
    """Plot the clients' mean train and evaluation loss over rounds, and their range.

    Args:
        rounds: at least one.
        title: such as "SimCLR on digits".
        loss_name: such as "NT-Xent (nats)".
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for key, name, color, marker in (
        ("train_loss", "train", BLUE, "o"),
        ("eval_loss", "evaluation (held-out images)", ORANGE, "s"),
    ):
        axes.plot(*_over_rounds(rounds, key), color=color, marker=marker, label=name)
        clients = {r.round: values for r in rounds if (values := _known(r.clients, key))}
        low, high = map(min, clients.values()), map(max, clients.values())
        band = list(clients), list(low), list(high)
        axes.fill_between(*band, color=color, alpha=0.15, linewidth=0)
    count = len({client.partition for metrics in rounds for client in metrics.clients})
    axes.set_title(f"{title}, {count} clients", color=INK, loc="left")
    _style(axes, loss_name)
    axes.legend(title="mean over clients; band: all clients", frameon=False, alignment="left")
    save_figure(figure, file)


def draw_knn(rounds: Sequence[RoundMetrics], file: Path) -> None:
    """Plot the kNN accuracy over rounds."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_over_rounds(rounds, "knn"), color=BLUE, marker="o")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _style(axes, "kNN accuracy, top-1")
    save_figure(figure, file)


def draw_representation(rounds: Sequence[RoundMetrics], file: Path) -> None:
    """Plot effective rank, uniformity and alignment over rounds, one above the other."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    panels = figure.subplots(len(REPRESENTATION), sharex=True)
    for axes, (key, name, limit) in zip(panels, REPRESENTATION, strict=True):
        axes.plot(*_over_rounds(rounds, key), color=BLUE, marker="o")
        if limit:
            axes.axhline(limit[0], color=ORANGE, linestyle="--", label=limit[1])
            axes.legend(frameon=False, fontsize="small")
        _style(axes, name)
        axes.label_outer()
    save_figure(figure, file)


def draw_map(
    maps: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], file: Path
) -> None:
    """Show maps of the same images side by side, coloured by class.

    Args:
        maps: by title, points (N, 2).
        labels: int64 (N,), indices of class_names. Where there are more classes
            than distinct colours, a scale of their numbers stands for the legend.
    """
    few = len(class_names) <= MAX_NAMES
    lines = -(-len(class_names) // LEGEND_COLUMNS) if few else 2
    figure = Figure(figsize=(WIDTH, 2.9 + 0.25 * lines), layout="constrained")
    colors = _class_colors(len(class_names))
    for axes, (title, points) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        shown = []
        for label, color in enumerate(colors):
            dots = points[labels == label]
            shown.append(axes.scatter(dots[:, 0], dots[:, 1], s=5, color=color, linewidth=0))
        axes.set_title(title, color=INK, fontsize="medium")
        axes.set(xticks=[], yticks=[], box_aspect=1)
        axes.spines[:].set_color("#dddddd")
    if few:
        figure.legend(
            shown,  # with their names, since a label of its own may not start with "_"
            [_shortened(name, MAX_LETTERS) for name in drawable(class_names)],
            loc="outside lower center",
            ncols=LEGEND_COLUMNS,
            frameon=False,
            fontsize="small",
            markerscale=2.5,
            handlelength=1,
            handletextpad=0.4,
            columnspacing=1,
        )
    else:
        scale = ScalarMappable(Normalize(0, len(class_names) - 1), MANY_COLORS)
        bar = figure.colorbar(scale, ax=figure.axes, orientation="horizontal", aspect=50, pad=0.03)
        bar.set_label("class number", color=INK, fontsize="small")
        bar.outline.set_visible(False)
    save_figure(figure, file)


def draw_neighbours(
    pixels: Mapping[int, np.ndarray] | np.ndarray,
    features: np.ndarray,
    file: Path,
    queries: Sequence[int],
    names: Sequence[str] | None = None,
) -> None:
    """Show some images, each with those whose features are most similar.

    Args:
        pixels: uint8 (3, S, S) by row; only those that are shown are asked for.
        features: float32 (N, D), N at least 2.
        queries: rows of them.
        names: of the rows' classes, shown below the images.
    """
    names = drawable(names) if names else None
    count = min(NEAREST, len(features) - 1)
    rows, similarity = nearest_neighbours(features, np.asarray(queries), count)
    text = 0.36 if names else 0.22  # inches below each image
    height = (0.7 + text) * len(queries) + 0.3
    figure = Figure(figsize=(0.72 * (count + 1) + 0.4, height))
    widths = [1, 0.4, *[1] * count]
    grid = figure.subplots(len(queries), count + 2, squeeze=False, width_ratios=widths)
    figure.subplots_adjust(0.01, text / height, 0.99, 1 - 0.3 / height, 0.08, text / 0.7)
    for line, query, near, closeness in zip(grid, queries, rows, similarity, strict=True):
        line[1].text(0.5, 0.5, "→", ha="center", va="center", fontsize=14, color=INK)
        line[1].set_axis_off()
        values = ["", *(f"{value:.2f}" for value in closeness)]
        for axes, row, value in zip(np.delete(line, 1), [query, *near], values, strict=True):
            show_image(axes, pixels[row])
            lines = [_shortened(names[row]) if names else "", value]
            axes.set_xlabel("\n".join(filter(None, lines)), fontsize=7, labelpad=2)
    grid[0, 0].set_title("query", fontsize=9, color=INK)
    grid[0, 2].set_title("its nearest, by cosine similarity", fontsize=9, color=INK, loc="left")
    save_figure(figure, file)


def drawable(names: Sequence[str | None]) -> list[str]:
    """Write names of classes with what the font can draw, each on one line.

    Whoever has other letters is shown by its number among the names, in their order.
    """
    known = get_font(findfont(FontProperties())).get_charmap()
    numbers = {name: number for number, name in enumerate(sorted(set(filter(None, names))))}

    def write(name: str) -> str:
        printed = "".join(" " if unicodedata.category(c) in CONTROL else c for c in name).strip()
        drawn = printed and all(ord(letter) in known for letter in printed)
        return printed if drawn else f"class {numbers[name]}"

    return [write(name) if name else "" for name in names]


def _shortened(name: str, length: int = 12) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def show_image(axes: Axes, picture: np.ndarray) -> None:
    """Show an image (3, S, S); one that is enlarged keeps its pixels sharp."""
    interpolation = "nearest" if picture.shape[-1] <= 100 else "antialiased"
    axes.imshow(picture.transpose(1, 2, 0), interpolation=interpolation)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_partitions(counts: np.ndarray, class_names: Sequence[str], file: Path) -> None:
    """Show how many images of each class every partition holds.

    Args:
        counts: int (partitions, classes). Up to 50 partitions are columns of a
            grid; more are summed up in two histograms.
    """
    if len(counts) > MAX_COLUMNS:
        return _draw_spread(counts, file)
    height = 0.24 * min(len(class_names), MAX_NAMES) + 0.9
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(counts.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    if len(class_names) <= MAX_NAMES:
        written = [_shortened(name, MAX_LETTERS) for name in drawable(class_names)]
        axes.set_yticks(range(len(class_names)), written)
    axes.set_ylabel("class")
    if len(counts) <= 10:
        for (partition, label), count in np.ndenumerate(counts):
            color = "white" if count > counts.max() / 2 else INK
            axes.text(partition, label, count, ha="center", va="center", color=color, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("partition")
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, label="images").outline.set_visible(False)
    return save_figure(figure, file)


def _draw_spread(counts: np.ndarray, file: Path) -> None:
    """Sum many partitions up: how large they are, and how many classes they mix."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    sizes = counts.sum(axis=1)
    shares = counts / sizes.clip(min=1)[:, None]
    mixed = np.exp(-(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum(1))
    names = ("images", "classes, those with few images counting less (exp of the entropy)")
    for axes, values, name in zip(figure.subplots(2), (sizes, mixed), names, strict=True):
        axes.hist(values, bins=20, color=BLUE)
        _style(axes, "partitions", name)
    save_figure(figure, file)


def _class_colors(count: int) -> np.ndarray:
    """Pick a colour for each class, RGBA (count, 4)."""
    if count > MAX_NAMES:
        return matplotlib.colormaps[MANY_COLORS](np.linspace(0, 1, count))
    return matplotlib.colormaps["tab10" if count <= 10 else "tab20"](range(count))


def _over_rounds(rounds: Sequence[RoundMetrics], name: str) -> tuple[list[int], list[float]]:
    """List the rounds that have a number, and the number of each."""
    having = [metrics for metrics in rounds if getattr(metrics, name) is not None]
    return [metrics.round for metrics in having], _known(having, name)


def _known(records: Sequence[object], name: str) -> list[float]:
    """List an attribute of each record that has it."""
    return [value for each in records if (value := getattr(each, name)) is not None]


def _style(axes: Axes, what: str, over: str = "round") -> None:
    axes.set_xlabel(over)
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_sites(
    confusion: np.ndarray, names: Sequence[str], by_site: Mapping[str, float], file: Path
) -> None:
    """Show what the classes of test images are taken for, and how often each site is right.

    Args:
        confusion: images by class and by predicted class, (C, C).
        names: of the classes.
        by_site: top-1 of each site, 0 to 1.
    """
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shown = left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=left, format=PercentFormatter(xmax=1), shrink=0.8)
    if len(names) <= MAX_NAMES:
        short = [_shortened(name) for name in drawable(names)]
        left.set_xticks(range(len(names)), short, rotation=45, ha="right")
        left.set_yticks(range(len(names)), short)
    left.set_xlabel("predicted class")
    left.set_ylabel("class")
    right.barh(list(by_site), list(by_site.values()), color=BLUE)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    right.set_xlabel("top-1")
    right.set_ylabel("site")
    save_figure(figure, file)


def save_figure(figure: Figure, file: Path, dpi: int = 185) -> None:
    """Write a picture as a whole; what the font can't draw is a box, without a word about it."""
    image = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(image, dpi=dpi)
    write_atomically(file, image.getvalue())
