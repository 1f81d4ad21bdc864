"""The ServerApp and the ClientApps for `flwr run`, SuperNodes and the two commands of this project.

`server` and `client` take Hydra overrides from the run configuration:

    flwr run . --run-config 'hydra-overrides="num_rounds=3 dataset=cifar10"'

A SuperNode says in its node configuration which part of the data it holds:
`partition-id=0 num-partitions=2`, or `partition-id=0 data-path="DIR"` for a
folder of its own, and `labels-path="DIR"` for class folders that lie elsewhere. For secure
aggregation `signing-key="FILE"` is the node's private key, and `nodes-file="FILE"` has the
public keys of all nodes.
`client1` and `client2` hold the two halves.
"""

import logging
import os
import shlex
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf

from client import ClientConfig, make_client_app
from fedssl.config.compose import load_config
from fedssl.config.moved import modernize_overrides
from fedssl.data.image_set import ImageSet
from fedssl.errors import SettingError, UserError
from fedssl.federation.secure.client import Signing
from utils import (
    build_privacy,
    evaluate_at_sites,
    open_images,
    open_membership,
    open_run,
    open_source,
    read_config,
    run_rounds,
)

DEFAULTS = ["num_clients=2"]
PRIVATE = 0o077  # the umask: what the server writes is for its own user
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
def compose_text(overrides: tuple[str, ...]) -> str:
    """Compose the configuration of a run from its overrides, as YAML."""
    config = load_config("config", [*DEFAULTS, *overrides], federated=True)
    return OmegaConf.to_yaml(config, resolve=True)


def overrides_of(context: Context) -> list[str]:
    """Read the run's overrides out of a context.

    Raises:
        UserError: a quote is left open.
    """
    given = str(context.run_config.get("hydra-overrides", ""))
    try:
        return shlex.split(given)
    except ValueError as error:
        raise SettingError(f"hydra-overrides={given}: {error}; close the quotes") from error


def config_text(context: Context) -> str:
    """Give the run's configuration, as YAML."""
    return compose_text(tuple(overrides_of(context)))


def identify(context: Context, app: str | None = None) -> ClientConfig:
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
        raise SettingError(
            f"the node configuration has to say what this node holds, as in {wanted!r} or "
            "'partition-id=0 data-path=\"DIR\"', with a partition-id of its own for each node"
        )
    number, count = int(number), int(count or 0)
    if data_path is None and not 0 <= number < count:
        raise SettingError(
            f"partition-id={number}: must be from 0 to {count - 1}, num-partitions - 1"
        )
    labels_path = str(node["labels-path"]) if "labels-path" in node else None
    files = (Path(str(node[key])) if key in node else None for key in ("signing-key", "nodes-file"))
    text, signing = config_text(context), Signing(*files)
    return ClientConfig(text, number, count, data_path, labels_path, signing=signing)


def open_server_images(config: DictConfig) -> ImageSet | None:
    """Open the images for the kNN accuracy; with folders at the nodes only, there are none."""
    return open_images(config) if open_source(config.dataset).is_here else None


server = ServerApp()
client = make_client_app(identify)
client1 = make_client_app(lambda context: identify(context, "client1"))
client2 = make_client_app(lambda context: identify(context, "client2"))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train all rounds and leave the same run directory as main.py."""
    # Imported here: on SuperNodes every message begins with an import of this module.
    from fedssl.pulling import pull_soon
    from fedssl.reporting.log import log_round

    os.umask(PRIVATE)
    pull_soon()
    config = read_config(config_text(context))
    membership = open_membership(config)
    if config.run is not None:
        result = evaluate_at_sites(config, grid, log.info, membership)
        for row in result.rows:
            spread = "" if row.std is None else f" ± {100 * row.std:.1f}"
            log.info("%s, %s: %.1f%s %%", row.encoder, row.method, 100 * row.mean, spread)
        return
    overrides, notices = modernize_overrides(overrides_of(context))
    for notice in notices:
        log.info(notice)
    if privacy := build_privacy(config):
        log.info("privacy: %s", privacy.describe(config.num_rounds).replace("\n", " "))
    image_set = open_server_images(config)
    directory = Path(config.run_dir)
    run, checkpoint = open_run(config, directory, image_set, overrides, log.info)
    log.info("the run's directory is %s", run.path)
    ended = run_rounds(
        config,
        grid,
        run,
        image_set,
        partial(log_round, log),
        checkpoint=checkpoint,
        report=log.info,
        membership=membership,
        noise_key=run.noise_key() if privacy else None,
    )
    if ended:
        log.info(ended)
    log.info("everything is in %s; python test.py evaluates it", run.path)
