"""Federated SimCLR in a Flower simulation, then the linear evaluation.

python main.py
python main.py --num_clients=10 --num_rounds 20
python main.py dataset=cifar10 dataset.path=DIR
python main.py resume=latest
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("config")  # before the imports below, which take seconds

import logging
from pathlib import Path
from threading import Event

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from client import make_client_app, simulated
from fedssl.compute import choose_device, choose_dtype
from fedssl.config.command_line import run_entry
from fedssl.data.cache import name_some, open_image_set
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import open_partitions, split_held_out
from fedssl.errors import WARNING, UserError
from fedssl.federation.aggregation import make_strategy
from fedssl.federation.nodes import Nodes
from fedssl.federation.resources import (
    ClientResources,
    clients_per_round,
    find_machines,
    plan_resources,
)
from fedssl.federation.rounds import Federation
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
from fedssl.reporting.figures import draw_loss_graph
from fedssl.reporting.page import write_report
from fedssl.runs.checkpoints import Checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.resume import check_continuation, find_run, reopen, with_earlier_overrides
from test import check_evaluable, evaluate_run
from utils import build_model, open_source


def prepare(config: DictConfig) -> tuple[ClientResources, ImageSet]:
    """Check all that can be checked before any work starts.

    Raises:
        UserError: the first thing that is wrong.
    """
    resources = plan_resources(
        clients_per_round(config.num_clients, config.strategy.get("fraction_train", 1.0)),
        config.num_cpus,
        config.num_gpus,
        find_machines(config.ray_address),
    )
    make_strategy(config.strategy)
    if (config.min_nodes or 0) > config.num_clients:
        raise UserError(
            f"min_nodes={config.min_nodes}: there are only num_clients={config.num_clients}"
        )
    if config.min_results > config.num_clients:
        raise UserError(
            f"min_results={config.min_results}: there are only num_clients={config.num_clients}"
        )
    strangers = [number for number in config.participants if number >= config.num_clients]
    if strangers:
        raise UserError(
            f"participants={config.participants}: with num_clients={config.num_clients} the "
            f"partitions are 0 to {config.num_clients - 1}"
        )
    check_writable(Path(config.run_dir))
    report = make_report(config.quiet)
    image_set = open_image_set(
        open_source(config.dataset),
        config.dataset.image_size,
        config.cache_dir,
        config.seed,
        report,
    )
    dealt = (
        config.num_clients,
        OmegaConf.to_container(config.partition, resolve=True),
        config.seed,
    )
    parts = open_partitions(image_set, config.cache_dir, *dealt)
    for rows in parts:
        split_held_out(rows, config.held_out)
    if image_set.labelled:
        check_evaluable(config.eval, image_set, config.seed)
    if config.resume is not None:
        check_continuation(config, find_run(config), image_set)
    return resources, image_set


def simulate(
    config: DictConfig,
    resources: ClientResources,
    image_set: ImageSet,
    run: RunDirectory,
    checkpoint: Checkpoint | None = None,
    client_app: ClientApp | None = None,
) -> None:
    """Train all rounds with Ray-backed virtual clients; the only call of the simulation.

    Args:
        checkpoint: where to go on; None for the start.
        client_app: instead of the ordinary one, to see what a faulty one does.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # failures are shown by the round
    backend = {
        "client_resources": {  # Flower hands them on as the options of Ray's actors
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "max_restarts": -1,  # a process that died comes back for the next client
        },
        "init_args": {  # without effect where a cluster was joined
            "address": "local",  # never join somebody's cluster unasked
            "num_cpus": resources.num_cpus * resources.at_a_time,
            "num_gpus": resources.total_gpus,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        },
    }
    done = checkpoint.round if checkpoint else 0
    stop = Event()
    with RoundProgress(config.num_rounds, done, config.quiet) as progress:
        server_app = ServerApp()

        @server_app.main()
        def serve(grid: Grid, context: Context) -> None:
            nodes = Nodes.of(grid, config, stop=stop)
            shown = (progress.show, checkpoint, progress.follow)
            Federation(nodes, config, run, image_set, *shown).train()

        clients = client_app or make_client_app(simulated(config))
        try:
            run_simulation(server_app, clients, config.num_clients, "ray", backend)
        finally:
            stop.set()  # the server's thread would wait for clients that are gone


def describe_opening(
    config: DictConfig, resources: ClientResources, image_set: ImageSet, run: RunDirectory
) -> tuple[str, dict[str, str]]:
    """Say what is about to run and where: data, model, clients at a time, device, precision."""
    device = choose_device(resources.num_gpus)
    dtype = str(choose_dtype(config.precision, device)).removeprefix("torch.")
    share = f" and {resources.num_gpus:g} GPU" if resources.num_gpus else ""
    cores = f"{resources.num_cpus} CPU core{'s' if resources.num_cpus > 1 else ''}"
    model = build_model(config.model, config.dataset, config.seed, torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    strategy = config.strategy._target_.rpartition(".")[2]
    partitioner = config.partition._target_.rpartition(".")[2]
    side, count = config.dataset.image_size, len(image_set.train.pixels)
    clients = f"{resources.at_a_time} client{'s' if resources.at_a_time > 1 else ''}"
    return (
        f"Federated SimCLR: {config.num_clients} clients, {config.num_rounds} rounds of {strategy}",
        {
            "data": f"{config.dataset.name}, {count:,} images of {side} x {side} pixels, "
            f"dealt out by {partitioner}",
            "model": f"{config.model.encoder}, {model.stem} stem, {weights / 1e6:.1f} M weights",
            "running": f"{clients} at a time, each on {cores}{share},\n"
            f"device {device.type}, precision {dtype}",
            "directory": show_path(run.path),
        },
    )


def open_run(config: DictConfig, image_set: ImageSet) -> tuple[RunDirectory, Checkpoint | None]:
    """Start a run's directory, or go back to where `resume` left off."""
    given = HydraConfig.get().overrides.task
    overrides = [o for o in given if not o.startswith(("resume=", "run_dir="))]
    if config.resume is not None:
        return reopen(config, image_set, overrides, make_report(config.quiet))
    return RunDirectory.create(Path(HydraConfig.get().runtime.output_dir), config, overrides), None


def train_and_evaluate(config: DictConfig) -> None:
    """Do the whole job in the run directory that Hydra made."""
    resources, image_set = prepare(config)
    config.num_cpus, config.num_gpus = resources.num_cpus, resources.num_gpus
    if config.dataset.path:  # the clients' processes may work elsewhere
        config.dataset.path = str(Path(config.dataset.path).expanduser().resolve())
    run, checkpoint = open_run(config, image_set)
    if image_set.unreadable:
        names = name_some(image_set.unreadable)
        make_report(config.quiet)(
            f"{WARNING}{len(image_set.unreadable)} unreadable files left out: {names}"
        )
    if not config.quiet:
        print_opening(*describe_opening(config, resources, image_set, run))
    go_on = f"go on with: python main.py resume={show_path(run.path)}"
    try:
        simulate(config, resources, image_set, run, checkpoint)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; {go_on}") from error
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(go_on) from interrupt
    draw_loss_graph(run.read_metrics(), run.path / "loss_graph.png", config.dataset.name)
    labelled = image_set.labelled
    if not config.quiet:
        print()
    if labelled:
        with Waiting("linear evaluation", config.quiet):
            result = evaluate_run(run, config, config.eval, image_set, run.last_checkpoint())
        print_results(result)
    else:
        print("No labels, so no linear evaluation. With a folder of labelled images:")
        print("  python test.py dataset=imagefolder dataset.path=FOLDER label_fraction=1")
    with Waiting("report", config.quiet):
        try_report(run, config, image_set)
    if not config.quiet:
        print_ending(run.path, Path(config.output_dir), labelled)


def try_report(run: RunDirectory, config: DictConfig, image_set: ImageSet) -> None:
    """Write the report; whatever goes wrong with it, the run has its results."""
    try:
        write_report(run, config, config.figures, image_set)
    except Exception as error:
        reason = f"{WARNING}no report ({type(error).__name__}: {error}); "
        make_report(config.quiet)(f"{reason}python -m scripts.report tries again")


if __name__ == "__main__":
    run_entry("config", prepare, train_and_evaluate, with_earlier_overrides)
