"""Any set of runs as a table and a plot with spread."""

from collections.abc import Container, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedssl.config.compose import flatten
from fedssl.data.sources.base import NAMELESS
from fedssl.errors import UserError
from fedssl.reporting.figures import save_figure
from fedssl.runs.directory import LATEST, RunDirectory
from fedssl.runs.results import TRAINED
from fedssl.runs.resume import HARMLESS, HARMLESS_GROUPS

MAIN_METRIC = "linear head, 10 %"
# Harmless for going on with a run, and still something by which runs are told apart.
TELLING = {"num_rounds", "precision", "max_update_ratio", "max_weight_ratio", "evaluate_every"}
SEED = "seed"
# What goes with a choice says nothing new: it counts only where runs of the same choice differ.
LEADERS = {
    "partition": "partition._target_",
    "strategy": "strategy._target_",
    "model": "model.encoder",
    "dataset": "dataset.name",
    "augment": "dataset.name",
    "train": "dataset.name",
    "optimizer": "dataset.name",
}


def find_runs(places: Sequence[Path]) -> list[RunDirectory]:
    """Find all runs at or below some directories, in the order of their paths.

    Raises:
        UserError: a place without any run.
    """
    found: dict[Path, RunDirectory] = {}
    for place in places:
        configs = sorted(place.rglob("config.yaml"))
        # `latest` is a run once more, under another name.
        within = {c.parent: c.relative_to(place).parts for c in configs}
        runs = [folder for folder, parts in within.items() if LATEST not in parts]
        if not runs:
            raise UserError(f"{place}: no run there or below; give directories of runs of main.py")
        found |= {run.resolve(): RunDirectory(run) for run in runs}
    return list(found.values())


def read_settings(run: RunDirectory) -> dict[str, Any]:
    """Read what a run was configured with, as far as it decides the result.

    A setting without a value is left out: an older run may not have known it. Images are
    named as its evaluation names them: a folder by its own name, too.
    """
    leaves = flatten(run.load_config())
    titles = [r["dataset"] for r in run.read_results() if r.get("own_images") and "dataset" in r]
    leaves["dataset.name"] = titles[-1] if titles else leaves["dataset.name"]
    kept = HARMLESS - TELLING
    return {
        key: str(value) if isinstance(value, list) else value
        for key, value in leaves.items()
        if key not in kept and not key.startswith(HARMLESS_GROUPS) and ".seed" not in key
        if value not in (None, [])
    }


def read_scores(run: RunDirectory, namesakes: Container[str] = ()) -> dict[str, float]:
    """Read every score of a run in percent, the newest of a kind, and its minutes of training.

    A score on other images than those of the training is of a kind of its own, which
    their name tells; where several have that name, a part of their checksum, too.

    Args:
        namesakes: the names that several sets of images have.

    Raises:
        UserError: an evaluation lacks something.
    """
    try:
        return _read_scores(run, namesakes)
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{run.results}: damaged ({reason}); move it away and evaluate again"
        ) from error


def _read_scores(run: RunDirectory, namesakes: Container[str]) -> dict[str, float]:
    scores = {}
    trained_on = run.load_config().dataset.name or NAMELESS
    for result in sorted(run.read_results(), key=lambda result: result.get("round", 0)):
        labels = f"{100 * result['protocol']['label_fraction']:g} %"
        dataset = result.get("dataset", trained_on)
        if not result.get("own_images", dataset == trained_on):
            which = f" {result['images'][:8]}" if dataset in namesakes else ""
            labels = f"{labels} of {dataset}{which}"
        for row in result["rows"]:
            whose = "" if row["encoder"].startswith(TRAINED) else f"{row['encoder']}, "
            scores[f"{whose}{row['method']}, {labels}"] = 100 * row["mean"]
    if scores:
        scores["minutes"] = sum(metrics.seconds or 0 for metrics in run.read_metrics()) / 60
    return scores


def find_namesakes(runs: Sequence[RunDirectory]) -> set[str]:
    """List the names under which runs of one seed were evaluated on different images.

    Another seed may split the same images otherwise.
    """
    contents: dict[tuple[str, int], set[str]] = {}
    for result in (result for run in runs for result in run.read_results()):
        if "images" in result and not result.get("own_images"):
            contents.setdefault((result["dataset"], result["seed"]), set()).add(result["images"])
    return {name for (name, _), known in contents.items() if len(known) > 1}


def gather(runs: Sequence[RunDirectory]) -> tuple[pd.DataFrame, list[str], list[RunDirectory]]:
    """Put the scores of runs beside the settings in which they differ.

    Returns:
        A frame with a row a run; the names of the settings, the seed not among
        them; and the runs left out because nothing was evaluated.
    """
    rows, empty = [], []
    namesakes = find_namesakes(runs)
    for run in runs:
        scores = read_scores(run, namesakes)
        if scores:
            rows.append((read_settings(run), scores))
        else:
            empty.append(run)
    every = pd.DataFrame([settings for settings, _ in rows])
    differing = [key for key in map(str, every) if key != SEED and _tells(key, every)]
    frame = every[[*differing, SEED]] if rows else every
    joined = pd.concat([frame, pd.DataFrame([s for _, s in rows])], axis=1)
    if rows:  # a repeated run tells nothing about the spread over seeds: the last path counts
        joined = joined[~frame.duplicated(keep="last")].reset_index(drop=True)
    return joined, differing, empty


def _tells(key: str, settings: pd.DataFrame) -> bool:
    """Tell whether runs differ in a setting, other than by what a larger choice brings along."""
    leader = LEADERS.get(key.partition(".")[0])
    if leader is None or key == leader:
        return settings[key].nunique(dropna=False) > 1
    return bool((settings.groupby(leader)[key].nunique(dropna=False) > 1).any())


def summarize(frame: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Average over the runs that differ in nothing but the seed.

    Returns:
        A row a setting, with columns (score, "mean"), (score, "std") and
        ("runs", ""); the sample standard deviation is NaN for a single run.
    """
    scores = [column for column in map(str, frame) if column not in (*settings, SEED)]
    keys: Any = list(settings) or [lambda _: "all"]
    groups = frame.groupby(keys, dropna=False, sort=True)
    table = groups[scores].agg(["mean", "std"])
    table.insert(0, ("runs", ""), groups.size())
    return table


def to_markdown(table: pd.DataFrame) -> str:
    """Write a summary as a Markdown table, `mean ± std` in a cell."""
    settings = [str(name) for name in table.index.names if name]
    columns: Any = table.columns  # pairs of a score and what is told of it
    scores = list(dict.fromkeys(name for name, _ in columns if name != "runs"))
    head = [*map(_title, settings), "runs", *scores]
    lines = [_line(head), _line(["---"] * len(head))]
    for index, row in table.iterrows():
        values = (index if isinstance(index, tuple) else (index,)) if settings else ()
        cells = [_mean_and_std(row[name, "mean"], row[name, "std"]) for name in scores]
        lines.append(_line([*(_short(v) for v in values), str(int(row["runs", ""])), *cells]))
    return "\n".join(lines) + "\n"


def _title(setting: str) -> str:
    """Name a setting's column: what it is called at its place, or what it chooses."""
    return setting.removesuffix("._target_").rpartition(".")[2]


def _line(cells: Sequence[str]) -> str:
    plain = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(plain)} |"


def _short(value: Any) -> str:
    """Write a setting's value; a target without its modules."""
    text = "-" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
    is_target = text.startswith("flwr")
    return text.rpartition(".")[2].removesuffix("Partitioner") if is_target else text


def _mean_and_std(mean: Any, std: Any) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def draw_comparison(frame: pd.DataFrame, settings: Sequence[str], metric: str, file: Path) -> None:
    """Plot a score against the first setting, a line for each choice of the others.

    Points are means over runs that differ in the seed, bars their sample
    standard deviation.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    drawn = {}
    for label, x, part in _lines(summarize(frame, settings), settings):
        means, stds = part[metric, "mean"], part[metric, "std"].fillna(0)
        drawn[label] = axes.errorbar(x, means, yerr=stds, marker="o", capsize=4)
    if settings:
        axes.set_xlabel(_title(settings[0]))
    if settings and pd.api.types.is_integer_dtype(frame[settings[0]]):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{metric} (top-1, %)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(settings) > 1:
        title = ", ".join(map(_title, settings[1:]))
        axes.legend(list(drawn.values()), list(drawn), title=title, frameon=False)
    save_figure(figure, file, dpi=150)


def _lines(
    table: pd.DataFrame, settings: Sequence[str]
) -> Iterator[tuple[str, list[Any], pd.DataFrame]]:
    """Split a summary into lines of one choice of all settings but the first."""
    if not settings:
        yield "", ["all runs"], table
        return

    def values(index: Any) -> tuple:
        return index if isinstance(index, tuple) else (index,)

    def others(index: Any) -> list[str]:
        return [_short(value) for value in values(index)[1:]]

    ordered = sorted(table.index, key=others)
    for choice, group in groupby(ordered, key=others):
        part = list(group)
        firsts = [values(index)[0] for index in part]
        numeric = all(isinstance(first, int | float) and first == first for first in firsts)
        yield ", ".join(choice), firsts if numeric else list(map(_short, firsts)), table.loc[part]
