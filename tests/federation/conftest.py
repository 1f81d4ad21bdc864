"""The server against real ClientApps, called in this process instead of through Ray."""

import pytest
from conftest import create_run
from federation.shuffled import FAST, ShuffledGrid
from flwr.supercore.task_identity import TaskIdentity

from fedssl.config.compose import load_config
from fedssl.federation.nodes import Nodes, no_op
from utils import build_federation, build_patience

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture
def federate(config, digits, tmp_path):
    """Train with some overrides; return the federation after its rounds."""

    def run(
        *overrides,
        tamper=lambda partition, reply: reply,
        checkpoint=None,
        on_progress=no_op,
        names=(),
    ):
        given = [f"cache_dir={config.cache_dir}", "num_clients=3", "num_rounds=2", "num_cpus=1"]
        given += ["train.max_steps=1", "train.local_epochs=1", "precision=float32", FAST]
        changed = load_config("config", [*given, f"output_dir={tmp_path}", *overrides])
        directory = create_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", changed)
        rounds = []
        grid = ShuffledGrid(changed, tamper)
        nodes = Nodes(grid, build_patience(changed), wire=changed.wire)
        nodes.membership.names.update(names)
        federation = build_federation(changed, nodes, directory, digits, checkpoint)
        federation.train(rounds.append, on_progress)
        assert directory.read_metrics() == rounds
        return federation, rounds, grid

    return run
