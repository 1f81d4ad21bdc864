"""The ServerApp and the ClientApps for `flwr run`, SuperNodes and the commands of launch.py.

`server` and `client` take Hydra overrides from the run configuration:

    flwr run . --run-config 'hydra-overrides="num_rounds=3 dataset=cifar10"'

A SuperNode says in its node configuration which part of the data it holds:
`partition-id=0 num-partitions=2`, or `partition-id=0 data-path="DIR"` for a
folder of its own. `client1` and `client2` hold the two halves.
"""

import logging
import shlex
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf

from client import Identity, make_client_app
from fedssl.config.compose import load_config
from fedssl.config.moved import modernize_overrides
from fedssl.data.cache import open_image_set
from fedssl.data.image_set import ImageSet
from fedssl.errors import UserError

DEFAULTS = ["num_clients=2"]
HALVES = {"client1": 0, "client2": 1}
log = logging.getLogger("flwr")


def one_line(record: logging.LogRecord) -> bool:
    """Spare users the traceback of an error that explains itself."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | RuntimeError):
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {error}", (), None
    return True


log.addFilter(one_line)


@lru_cache(maxsize=1)
def compose_text(overrides: str) -> str:
    """Compose the configuration of a run from its overrides, as YAML."""
    config = load_config("config", [*DEFAULTS, *shlex.split(overrides)])
    return OmegaConf.to_yaml(config, resolve=True)


def config_text(context: Context) -> str:
    """Read the run's configuration out of a context."""
    return compose_text(str(context.run_config.get("hydra-overrides", "")))


def identify(context: Context, app: str | None = None) -> Identity:
    """Identify a client by its node's configuration.

    Args:
        app: the name of this ClientApp; by default what `flower-client-app`
            put into the node's configuration.

    Raises:
        UserError: the node's configuration lacks something.
    """
    node = context.node_config
    app = app or str(node.get("client-app", "client"))
    data_path = str(node["data-path"]) if "data-path" in node else None
    number = node.get("partition-id", HALVES.get(app))
    count = node.get("num-partitions", len(HALVES) if app in HALVES else None)
    if number is None or (count is None and data_path is None):
        wanted = "partition-id=0 num-partitions=2"
        raise UserError(
            f"the node configuration has to say what this node holds, as in {wanted!r} or "
            "'partition-id=0 data-path=\"DIR\"', with a partition-id of its own for each node"
        )
    number, count = int(number), int(count or 0)
    if data_path is None and not 0 <= number < count:
        raise UserError(f"partition-id={number}: must be from 0 to {count - 1}, num-partitions - 1")
    return Identity(config_text(context), number, count, data_path)


def open_servers_images(config: DictConfig) -> ImageSet | None:
    """Open the images for the kNN accuracy; with folders at the nodes only, there are none."""
    if config.dataset.source == "imagefolder" and config.dataset.path is None:
        return None
    return open_image_set(config.dataset, config.cache_dir, config.seed)


def log_round(row: Mapping[str, Any]) -> None:
    """Write a round's losses and failures to the run's log."""
    knn = f", kNN {row['knn']:.1%}" if row["knn"] is not None else ""
    losses = f"train loss {row['train_loss']:.3f}"
    if row["eval_loss"] is not None:
        losses += f", eval loss {row['eval_loss']:.3f}"
    log.info("round %d: %s%s, %.1f s", row["round"], losses, knn, row["seconds"])
    for failure in row["failures"]:
        log.warning("  without client %d: %s", failure["partition"], failure["reason"])
    for warning in row["warnings"]:
        log.warning("  %s", warning)


server = ServerApp()
client = make_client_app(identify)
client1 = make_client_app(lambda context: identify(context, "client1"))
client2 = make_client_app(lambda context: identify(context, "client2"))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train all rounds and leave the same run directory as main.py."""
    # Imported here: on SuperNodes every message starts a process that imports this module.
    from fedssl.federation.nodes import Nodes
    from fedssl.federation.rounds import Federation
    from fedssl.reporting.figures import draw_loss_graph
    from fedssl.runs.directory import RunDirectory
    from fedssl.runs.resume import reopen

    config: DictConfig = OmegaConf.create(config_text(context))
    image_set = open_servers_images(config)
    given = shlex.split(str(context.run_config.get("hydra-overrides", "")))
    overrides, notices = modernize_overrides(given)
    for notice in notices:
        log.info(notice)
    checkpoint = None
    if config.resume is None:
        run = RunDirectory.create(Path(config.run_dir), config, overrides)
    else:
        run, checkpoint = reopen(config, image_set, overrides, log.info)
    log.info("the run's directory is %s", run.path)
    nodes = Nodes.of(grid, config, log.info)
    Federation(nodes, config, run, image_set, log_round, checkpoint).train()
    draw_loss_graph(run.read_metrics(), run.path / "loss_graph.png", config.dataset.name)
    log.info("everything is in %s; python test.py evaluates it", run.path)
