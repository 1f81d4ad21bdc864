"""Federated self-supervised learning in a Flower simulation, then the linear evaluation.

python main.py
python main.py --num_clients=10 --num_rounds 20
python main.py dataset=cifar10 dataset.path=DIR
python main.py resume=latest
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("config", complete=list)  # before the imports below, which take seconds

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from client import make_client_app, simulated
from fedssl.compute import choose_backend
from fedssl.config.command_line import run_entry
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import split_held_out
from fedssl.data.sources.base import absolute
from fedssl.errors import WARNING, name_some
from fedssl.evaluation.base import check_evaluable
from fedssl.federation.keeping import LEFT, check_kept
from fedssl.federation.membership import Membership
from fedssl.federation.resources import ClientResources
from fedssl.federation.simulation import simulate
from fedssl.files import check_writable
from fedssl.reporting.console import (
    RoundProgress,
    Waiting,
    make_report,
    print_ending,
    print_opening,
    print_results,
    show_path,
)
from fedssl.runs.checkpoints import Checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.resume import check_continuation, with_earlier_overrides
from utils import (
    build_method,
    build_privacy,
    build_receiving,
    check_enough,
    continuation_of,
    evaluate_run,
    name_of,
    name_of_images,
    open_images,
    open_partitions,
    open_run,
    plan_simulation,
    report_run,
    run_rounds,
)


def prepare(config: DictConfig) -> tuple[ClientResources, ImageSet]:
    """Check all that can be checked before any work starts.

    Raises:
        UserError: the first thing that is wrong.
    """
    resources = plan_simulation(config)
    build_privacy(config)
    check_writable(Path(config.run_dir))
    image_set = open_images(config, make_report(config.quiet))
    method = build_method(config, torch.device("cpu"))
    receiving = build_receiving(config, method)
    for partition, rows in enumerate(open_partitions(config, image_set)):
        train, _ = split_held_out(rows, config.held_out)
        check_enough(method, len(train), partition)
    if image_set.labelled:
        check_evaluable(image_set, config.eval.label_fraction, config.seed, config.eval.seeds)
    if config.resume is not None:
        wanted = continuation_of(config, image_set)
        checkpoint = check_continuation(wanted)
        if checkpoint and (receiving.remembers or method.local_names()):
            check_kept(wanted.find_run(), checkpoint.round)
        if checkpoint and config.wire != "float32":
            check_kept(wanted.find_run(), checkpoint.round, LEFT)
    return resources, image_set


def train(
    config: DictConfig,
    resources: ClientResources,
    image_set: ImageSet,
    run: RunDirectory,
    checkpoint: Checkpoint | None = None,
    clients: ClientApp | None = None,
) -> str | None:
    """Train all rounds that are left with Ray-backed virtual clients.

    Args:
        checkpoint: where to go on; None for the start.
        clients: instead of the ordinary ones, to see what faulty ones do.

    Returns:
        Why it ended before the last round, if it did.
    """
    done = checkpoint.round if checkpoint else 0
    private, ended = config.privacy.mechanism != "none", []
    with RoundProgress(config.num_rounds, done, config.quiet, private) as progress:

        def serve(grid: Grid, stop: Event, partition_of: Mapping[int, int]) -> None:
            reason = run_rounds(
                config,
                grid,
                run,
                image_set,
                progress.show,
                checkpoint=checkpoint,
                on_progress=progress.follow,
                stop=stop,
                membership=Membership(known=partition_of),
            )
            ended.append(reason)

        clients = clients or make_client_app(simulated(config, run.clients))
        simulate(serve, clients, config.num_clients, resources)
    return ended[0]


def title_of(config: DictConfig) -> str:
    """Name the method, the clients, the rounds and the strategy in a line."""
    clients, rounds = f"{config.num_clients} clients", f"{config.num_rounds} rounds"
    return f"Federated {name_of(config.method)}: {clients}, {rounds} of {name_of(config.strategy)}"


def describe(
    config: DictConfig, resources: ClientResources, image_set: ImageSet, run: RunDirectory
) -> dict[str, str]:
    """Say what is about to run and where: data, model, clients at a time, device, precision."""
    method = build_method(config, torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in method.parameters())
    stem, side = method.encoder.settings.stem, config.dataset.image_size
    count = len(image_set.train.pixels)
    dealt = sum(map(len, open_partitions(config, image_set)))
    images = f"{count:,}" if dealt == count else f"{dealt:,} of {count:,}"
    facts = {
        "data": f"{name_of_images(config.dataset)}, {images} images of {side} x {side} pixels, "
        f"dealt out by {name_of(config.partition)}" + "".join(f",\n{n}" for n in image_set.notes),
        "model": f"{config.model.encoder}, {stem} stem, {weights / 1e6:.1f} M weights",
        "running": f"{resources},\n{choose_backend(config.precision, resources.num_gpus)}",
        "directory": show_path(run.path),
    }
    if privacy := build_privacy(config):
        facts["privacy"] = privacy.describe(config.num_rounds)
    return facts


def run(config: DictConfig, directory: Path, overrides: Sequence[str] = ()) -> RunDirectory:
    """Do the whole job: train, evaluate, report.

    Args:
        directory: of the run, unless it goes on with another.
        overrides: that led to the configuration, which a resumed run starts from.
    """
    resources, image_set = prepare(config)
    report = make_report(config.quiet)
    config.num_cpus, config.num_gpus = resources.num_cpus, resources.num_gpus
    if config.dataset.path:  # the clients' processes may work elsewhere
        config.dataset.path = str(absolute(config.dataset.path))
    its, checkpoint = open_run(config, directory, image_set, overrides, report)
    if image_set.unreadable:
        names = name_some(image_set.unreadable)
        report(f"{WARNING}{len(image_set.unreadable)} unreadable files left out: {names}")
    if not config.quiet:
        print_opening(title_of(config), describe(config, resources, image_set, its))
    go_on = f"go on with: python main.py resume={show_path(its.path)}"
    try:
        ended = train(config, resources, image_set, its, checkpoint)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; {go_on}") from error
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(go_on) from interrupt
    report("")
    if ended:
        report(f"{ended}: the encoder is that of round {its.read_metrics()[-1].round}\n")
    evaluate(config, image_set, its)
    try_report(config, image_set, its)
    if not config.quiet:
        print_ending(its.path, Path(config.output_dir), image_set.labelled)
    return its


def evaluate(config: DictConfig, image_set: ImageSet, run: RunDirectory) -> None:
    """Evaluate the encoder of a run where there are labels."""
    if image_set.labelled:
        with Waiting("linear evaluation", config.quiet):
            result = evaluate_run(run, config, config.eval, image_set, run.last_checkpoint())
        print_results(result.to_json())
    else:
        there_is = "One class alone" if image_set.has_labels else "No labels"
        print(f"{there_is}, so no linear evaluation. With a folder of labelled images:")
        print("  python test.py dataset=imagefolder dataset.path=FOLDER label_fraction=1")


def try_report(config: DictConfig, image_set: ImageSet, run: RunDirectory) -> None:
    """Write the page of a run; whatever goes wrong with it, the run has its results."""
    try:
        with Waiting("report", config.quiet):
            report_run(run, config, config.figures, image_set)
    except Exception as error:
        reason = f"{WARNING}no report ({type(error).__name__}: {error}); "
        make_report(config.quiet)(f"{reason}python -m scripts.report tries again")


def job(config: DictConfig) -> None:
    """Run in the directory that Hydra made."""
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if not o.startswith(("resume=", "run_dir="))]
    run(config, Path(hydra.runtime.output_dir), overrides)


if __name__ == "__main__":
    run_entry("config", prepare, job, with_earlier_overrides)
