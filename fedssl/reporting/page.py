"""One page that shows a run: its pictures, numbers, settings, and where they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig

from fedssl.config.compose import flatten
from fedssl.data.image_set import ImageSet
from fedssl.errors import UserError
from fedssl.files import write_atomically
from fedssl.reporting.console import evaluation_title, top1
from fedssl.reporting.sections import Encoders, draw_pictures
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance

TEMPLATES = Path(__file__).resolve().parent
ROUND_KEYS = {"round", "train_loss", "eval_loss", "knn", "seconds", "clients", "failures"}
COLUMNS = {  # of the table of rounds: heading, key, format
    "round": ("round", "d"),
    "train loss": ("train_loss", ".3f"),
    "eval loss": ("eval_loss", ".3f"),
    "kNN": ("knn", ".1%"),
    "rank": ("effective_rank", ".1f"),
    "uniformity": ("uniformity", ".2f"),
    "alignment": ("alignment", ".2f"),
    "seconds": ("seconds", ".1f"),
    "images/s": ("images_per_second", ".0f"),
    "bytes moved": ("bytes_moved", ",d"),
}


def write_report(
    run: RunDirectory,
    config: DictConfig,
    settings: Mapping[str, Any],
    image_set: ImageSet | None,
    encoders: Encoders | None,
) -> None:
    """Draw a run's pictures and put them with all else into its report.html.

    Args:
        config: of the run.
        settings: the `figures` section.
        image_set: None where only the clients hold images.
        encoders: None leaves out what shows features.

    Raises:
        UserError: no finished round, or a damaged file.
        RuntimeError: the run's directory can't be written.
    """
    rows = read_rounds(run)
    results = run.read_results()
    try:
        pictures = draw_pictures(run, config, settings, rows, image_set, encoders)
        page = (
            _environment()
            .get_template("page.html")
            .render(
                run=run.path.name,
                config=config,
                strategy=config.strategy._target_.rpartition(".")[2],
                clients=max(len(row["clients"]) for row in rows),
                done=rows[-1]["round"],
                evaluations=[
                    {"title": evaluation_title(result), **result} for result in reversed(results)
                ],
                pictures=pictures,
                troubles=list_troubles(rows),
                columns=COLUMNS,
                rounds=[[_cell(row.get(k), form) for k, form in COLUMNS.values()] for row in rows],
                overrides=run.read_overrides(),
                settings=flatten(config),
                sources=list_sources(results),
            )
        )
        write_atomically(run.report, page.encode())
    except OSError as error:
        raise RuntimeError(f"can't write to {run.path}: {error.strerror}") from error


def read_rounds(run: RunDirectory) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, at least one.

    Raises:
        UserError: no finished round, or lines of something else.
    """
    rows = run.read_metrics()
    if not rows:
        raise UserError(f"run={run.path}: no finished round, so there is nothing to show")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.keys() >= ROUND_KEYS:
            raise UserError(f"{run.metrics}: line {number} is no round of a run; take the line out")
    return rows


def list_troubles(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """List the failures and warnings of all rounds, with their round."""
    found = []
    for row in rows:
        for failure in row["failures"]:
            text = f"client {failure['partition']} failed: {failure['reason']}"
            found.append((row["round"], text))
        found += [(row["round"], f"warning: {warning}") for warning in row.get("warnings", [])]
    return found


def list_sources(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tell with what the evaluations were measured and this page was made."""
    measured = {
        f"evaluation {number}": result["measured"] for number, result in enumerate(results, start=1)
    }
    return {
        name: {
            "time": facts["time"],
            "commit": facts["commit"] or "unknown",
            **facts["hardware"],
            **facts["versions"],
        }
        for name, facts in (measured | {"this page": provenance()}).items()
    }


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["top1"] = top1
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment
