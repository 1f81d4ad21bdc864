"""The ServerApp and the ClientApps as `flwr run` and SuperNodes load them.

`server` and `client` take Hydra overrides from the run configuration:

    flwr run . --run-config 'hydra-overrides="num_rounds=3 dataset=cifar10"'

`client1` and `client2` are the two halves of the data, whatever the node's
configuration says.
"""

import environment  # noqa: F401  isort: skip

import shlex
from collections.abc import Callable, Mapping
from functools import lru_cache
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf

from client import Identity, make_client_app
from config import load_config
from figures import draw_loss_graph
from rundir import RunDirectory
from server import Federation
from utils import open_image_set

DEFAULTS = ["num_clients=2"]


@lru_cache(maxsize=1)
def compose_text(overrides: str) -> str:
    """Compose the configuration of a run from its overrides, as YAML."""
    config = load_config("config", [*DEFAULTS, *shlex.split(overrides)])
    return OmegaConf.to_yaml(config, resolve=True)


def config_text(context: Context) -> str:
    """Read the run's configuration out of a context."""
    return compose_text(str(context.run_config.get("hydra-overrides", "")))


def identify(context: Context) -> Identity:
    """Identify a client by its node's configuration."""
    node = context.node_config
    return Identity(config_text(context), int(node["partition-id"]), int(node["num-partitions"]))


def half(partition: int) -> Callable[[Context], Identity]:
    """Identify a client as one of two, without a node configuration."""
    return lambda context: Identity(config_text(context), partition, 2)


def log_round(row: Mapping[str, Any]) -> None:
    """Write a round's losses to the run's log."""
    knn = f", kNN {row['knn']:.1%}" if row["knn"] is not None else ""
    log(
        INFO,
        "round %d: train loss %.3f, eval loss %.3f%s, %.1f s",
        *(row["round"], row["train_loss"], row["eval_loss"], knn, row["seconds"]),
    )


server = ServerApp()
client = make_client_app(identify)
client1 = make_client_app(half(0))
client2 = make_client_app(half(1))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train all rounds and leave the same run directory as main.py."""
    config: DictConfig = OmegaConf.create(config_text(context))
    image_set = open_image_set(config.dataset, config.cache_dir, config.seed)
    run = RunDirectory.create(Path(config.run_dir), config)
    Federation(grid, config, run, image_set, log_round).train()
    draw_loss_graph(run.read_metrics(), run.path / "loss_graph.png", config.dataset.name)
    log(INFO, "everything is in %s", run.path)
