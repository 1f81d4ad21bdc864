"""One page that shows a run: its pictures, numbers, settings, and where they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedssl.config.checks import flatten_mapping
from fedssl.errors import WARNING, UserError
from fedssl.files import write_atomically
from fedssl.reporting.console import evaluation_title, top1
from fedssl.reporting.sections import FigureSettings, RunFacts, RunImages, draw_pictures
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import NOT_COVERED, RoundMetrics, Where
from fedssl.runs.provenance import provenance

TEMPLATES = Path(__file__).resolve().parent


def write_report(
    run: RunDirectory, facts: RunFacts, settings: FigureSettings, images: RunImages | None
) -> None:
    """Draw a run's pictures and put them with all else into its report.html.

    Args:
        images: None where only the clients hold images.

    Raises:
        UserError: no finished round, or a damaged file.
        RuntimeError: the run's directory can't be written.
    """
    rounds = read_rounds(run)
    headings, *lines = table_of_rounds(rounds)
    evaluations, sources = describe_results(run)
    overrides = run.read_overrides()
    try:
        pictures = draw_pictures(run, facts, settings, rounds, images)
        page = (
            _environment()
            .get_template("page.html")
            .render(
                run=run.path.name,
                facts=facts,
                clients=max(len(metrics.clients) for metrics in rounds),
                done=rounds[-1].round,
                evaluations=evaluations,
                pictures=pictures,
                privacy=describe_privacy(rounds[-1]),
                troubles=list_troubles(rounds),
                nodes=list_nodes(rounds),
                columns=headings,
                rounds=lines,
                overrides=overrides,
                settings=flatten_mapping(facts.settings),
                sources=sources,
            )
        )
        write_atomically(run.report, page.encode())
    except OSError as error:
        raise RuntimeError(f"can't write to {run.path}: {error.strerror}") from error


def describe_privacy(metrics: RoundMetrics) -> dict[str, Any] | None:
    """Say what the model after a round may tell of a client; None where nothing is promised."""
    if metrics.epsilon is None:
        return None
    promise = (
        f"The model after round {metrics.round} tells of any one client no more than epsilon "
        f"{metrics.epsilon:.2f} at delta {metrics.delta:g} allows."
    )
    return {"promise": promise, "not_covered": NOT_COVERED}


def describe_results(run: RunDirectory) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """List a run's evaluations with their titles, the newest first, and `list_sources` of them.

    Raises:
        UserError: one lacks something.
    """
    results = run.read_results()
    try:
        for row in (row for result in results for row in result["rows"]):
            top1(row)
        titled = [
            {"title": evaluation_title(result), "round": result["round"], "rows": result["rows"]}
            for result in reversed(results)
        ]
        return titled, list_sources(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{run.results}: damaged ({reason}); move it away and evaluate again"
        ) from error


def read_rounds(run: RunDirectory) -> list[RoundMetrics]:
    """Read the numbers of a run's rounds, at least one.

    Raises:
        UserError: no finished round, or lines of something else.
    """
    rounds = run.read_metrics()
    if not rounds:
        raise UserError(f"run={run.path}: no finished round, so there is nothing to show")
    return rounds


def list_troubles(rounds: Sequence[RoundMetrics]) -> list[tuple[int, str]]:
    """List the failures and warnings of all rounds, with their round."""
    found = []
    for metrics in rounds:
        found += [(metrics.round, f"{f.who} failed: {f.reason}") for f in metrics.failures]
        found += [(metrics.round, f"{WARNING}{warning}") for warning in metrics.warnings]
    return found


def list_nodes(rounds: Sequence[RoundMetrics]) -> list[tuple[int, str]]:
    """List which nodes came, went or were refused, with the round before which they did."""
    found = []
    for metrics in rounds:
        here = [event.who for event in metrics.nodes if event.event == "joined"]
        if here:
            found.append((metrics.round, f"joined: {', '.join(here)}"))
        found += [(metrics.round, str(e)) for e in metrics.nodes if e.event != "joined"]
    return found


def table_of_rounds(rounds: Sequence[RoundMetrics]) -> list[list[str]]:
    """Write the numbers of all rounds in columns, below their headings; "–" is none."""
    private = any(metrics.epsilon is not None for metrics in rounds)
    labels = [how.label for _, how in RoundMetrics.numbers(Where.PAGE, seldom=private)]
    lines = []
    for metrics in rounds:
        texts = metrics.texts(Where.PAGE)
        lines.append([str(metrics.round), *(texts[label] or "–" for label in labels)])
    return [["round", *labels], *lines]


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


def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["top1"] = top1
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment
