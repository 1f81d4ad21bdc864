"""Going on with a run that was interrupted, or with more rounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedssl.config.compose import flatten, flatten_mapping, load_config, quote
from fedssl.errors import WARNING, UserError
from fedssl.files import remove_partial
from fedssl.runs.checkpoints import (
    Checkpoint,
    list_checkpoints,
    list_unfinished,
    load_checkpoint,
    remove_after,
)
from fedssl.runs.directory import LATEST, RunDirectory

# What may differ from the run so far: where and how it runs, not what it learns.
HARMLESS = {
    *("num_rounds", "num_cpus", "num_gpus", "ray_address", "precision", "resume"),
    *("min_nodes", "node_wait_s", "min_results", "round_timeout_s", "max_update_ratio"),
    "max_weight_ratio",
    *("nodes_file", "run"),
    *("keep_checkpoints", "evaluate_every", "output_dir", "run_dir", "cache_dir"),
    *("dataset.path", "quiet"),
}
HARMLESS_GROUPS = ("eval.", "figures.", "head.")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Continuation:
    """A wish to go on with a run.

    Attributes:
        resume: the run's directory, or "latest" below output_dir.
        settings: the whole configuration, as plain Python.
        images: names the content of the images that are there now, if any are.
    """

    resume: str
    output_dir: str
    num_rounds: int
    settings: Mapping[str, Any]
    images: str | None

    def find_run(self) -> RunDirectory:
        """Find the run.

        Raises:
            UserError: no run there.
        """
        latest = Path(self.output_dir, LATEST)
        folder = latest if self.resume == LATEST else Path(self.resume)
        run = RunDirectory(folder.expanduser().resolve())
        if not run.config.is_file():
            raise UserError(
                f"resume={self.resume}: no run at {run.path}; give a run's directory, or latest"
            )
        return run


def with_earlier_overrides(arguments: Sequence[str]) -> list[str]:
    """Put the overrides that a run was started with before those of `resume=`.

    Raises:
        UserError: no such run, or several jobs at once.
    """
    if not any(argument.startswith("resume=") for argument in arguments):
        return list(arguments)
    if {"--multirun", "-m"} & set(arguments):
        raise UserError("resume: goes on with one run; leave --multirun out")
    config = load_config("config", [a for a in arguments if not a.startswith("-")])
    if config.resume is None:
        return list(arguments)
    run = Continuation(config.resume, config.output_dir, 1, {}, None).find_run()
    given = {_key(argument) for argument in arguments}
    kept = [override for override in run.read_overrides() if _key(override) not in given]
    place = [] if "run_dir" in given else [f"run_dir={quote(str(run.path))}"]
    return [*kept, *arguments, *place]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check_continuation(wanted: Continuation) -> Checkpoint | None:
    """Make sure that a run can go on with this configuration and these images.

    Returns:
        The newest checkpoint that is intact; None if no round was finished.

    Raises:
        UserError: the configuration or the images differ in what decides the
            result, there are fewer rounds than are done, or nothing is left.
    """
    run = wanted.find_run()
    check_same(flatten_mapping(wanted.settings), flatten(run.load_config()))
    results = run.read_results()
    checkpoint = newest_intact(run, lambda line: None)
    if checkpoint is None:
        return None
    if checkpoint.round > wanted.num_rounds:
        raise UserError(
            f"num_rounds={wanted.num_rounds}: the run has done {checkpoint.round}; give at least "
            "that, or more to go on"
        )
    row, every = checkpoint.metrics, wanted.settings["evaluate_every"]
    unmeasured = row is not None and row.eval_loss is None and row.knn is None
    if checkpoint.round == wanted.num_rounds and checkpoint.round % every and unmeasured:
        raise UserError(
            f"num_rounds={wanted.num_rounds}: the run has done {checkpoint.round} and did not "
            f"evaluate the last one (evaluate_every={every}); give at least {checkpoint.round + 1}"
        )
    evaluated = any(result.get("round") == checkpoint.round for result in results)
    if checkpoint.round == wanted.num_rounds and evaluated:
        raise UserError(
            f"resume={wanted.resume}: all {wanted.num_rounds} rounds are done and evaluated; give "
            "more num_rounds to go on"
        )
    if checkpoint.images != wanted.images:
        raise UserError(
            f"resume={wanted.resume}: the images differ from those that the run began with; "
            "restore them, or start a new run"
        )
    return checkpoint


def check_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Compare two configurations by their dotted keys.

    Raises:
        UserError: they differ in more than harmless ways.
    """
    odd = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
        and key not in HARMLESS
        and not key.startswith(HARMLESS_GROUPS)
    ]
    if odd:
        raise UserError(
            f"resume: the run was started differently ({'; '.join(odd)}); leave these out to go "
            "on, or start a new run"
        )


def newest_intact(run: RunDirectory, report: Report) -> Checkpoint | None:
    """Read the newest checkpoint that is complete and undamaged; tell of those that are not.

    Raises:
        UserError: there are some, and all of them are damaged.
    """
    for file in list_unfinished(run.checkpoints):
        report(f"{WARNING}{file.name} was not finished and is left out")
    files = list_checkpoints(run.checkpoints)
    for file in reversed(files):
        try:
            return load_checkpoint(file)
        except UserError as error:
            report(f"{WARNING}left out: {error}")
    if files:
        raise UserError(
            f"resume={run.path}: all {len(files)} checkpoints are damaged; start a new run"
        )
    return None


def reopen(
    wanted: Continuation, overrides: Sequence[str], report: Report
) -> tuple[RunDirectory, Checkpoint | None]:
    """Put a run's directory back to the end of its last complete round.

    Args:
        report: told of what was found damaged, and where the run goes on.

    Raises:
        UserError: the run can't go on so, or is still going on.
    """
    run = wanted.find_run()
    run.lock()
    check_continuation(wanted)
    clients = [folder for folder in run.clients.rglob("*") if folder.is_dir()]
    for folder in (run.path, run.checkpoints, *clients):
        for name in remove_partial(folder):
            report(f"{name} was being written when the run ended; its earlier state counts")
    checkpoint = newest_intact(run, report)
    done = checkpoint.round if checkpoint else 0
    for folder in (run.checkpoints, *clients):
        remove_after(folder, done)
    rounds = [metrics for metrics in run.read_metrics() if metrics.round <= done]
    if checkpoint and checkpoint.metrics and not any(m.round == done for m in rounds):
        rounds.append(checkpoint.metrics)
    run.write_metrics(rounds)
    run.write_config(wanted.settings, overrides)
    where = f"after round {done}" if done else "from the start: no round was finished"
    report(f"going on with {run.path} {where}")
    return run, checkpoint
