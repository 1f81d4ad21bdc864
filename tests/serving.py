"""A server's half, reduced to its questions: against clients in this process."""

import copy
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from samples import BACKEND, OPTIMIZER, SETTINGS, VIEWS, make_encoder, make_simclr

from client import ClientConfig, ClientState, make_client_app
from fedssl.federation.aggregation import arrays_for_strategy
from fedssl.federation.guards import validate_replies
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import BUFFERS, pack_tensors, split_state
from fedssl.federation.nodes import Nodes, Patience
from fedssl.methods.base import local_arrays
from fedssl.training.schedule import Schedule
from model import SimCLR

NUM_CLIENTS = 2
PARTITIONS = [np.arange(24), np.arange(24, 48)]


class MovingHead(SimCLR):
    """SimCLR with a slow copy of its projection head, which stays with the client."""

    def __init__(self, encoder):
        super().__init__(encoder, 0.5, 16, 8)
        self.target = copy.deepcopy(self.projection_head).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, progress):
        pairs = zip(self.target.parameters(), self.projection_head.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 0.1)

    def local_names(self):
        return frozenset(f"target.{name}" for name in self.target.state_dict())


def make_moving():
    torch.manual_seed(0)
    return MovingHead(make_encoder(stem="imagenet"))


def make_small():
    """Make SimCLR with the stem that leaves little of digits to compute."""
    return make_simclr(encoder=make_encoder(stem="imagenet"))


def identify(context):
    number = int(context.node_config["partition-id"])
    text = "{secure_aggregation: false, wire: float32}"
    return ClientConfig(text, number, NUM_CLIENTS, standalone=False)


class Server:
    """What of the server asks clients: a global model, its nodes, its requests."""

    def __init__(self, method, pixels, mods=()):
        self.method = method
        self.names = arrays_for_strategy(method, "parameters")
        settings = replace(SETTINGS, batch_size=8, max_steps=2)
        state = ClientState(
            pixels,
            PARTITIONS,
            copy.deepcopy(method),
            BACKEND,
            VIEWS,
            Schedule(4, 8, train_resolutions=[8]),
            replace(settings, optimizer=replace(OPTIMIZER, learning_rate=0.5)),
            seed=0,
            held_out=0.25,
            first_local=local_arrays(method),
        )
        self.state = state
        self.grid = LocalGrid(make_client_app(identify, mods, lambda client: state), NUM_CLIENTS)
        self.nodes = Nodes(self.grid, Patience(NUM_CLIENTS, 0, 60))
        self.nodes.wait_for_clients()

    def ask(self, kind="train", number=1, names=None, **settings):
        """Send the global model to all; give the replies."""
        names = self.names if names is None else names
        arrays, buffers = split_state(self.method.shared_state(), names)
        given = {"server-round": number, BUFFERS: pack_tensors(buffers), **settings}
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(given)})
        nodes = self.nodes.get_node_ids()
        return self.nodes.send_and_receive([Message(content, node, kind) for node in nodes])

    def updates(self, answers, names=None):
        """Give the updates that the guards let through, which are all."""
        names = self.names if names is None else names
        expected = self.method.shared_state()
        updates, failures = validate_replies(answers, self.nodes.partition_of, expected, names)
        assert failures == []
        return updates

    def norm(self, update):
        """Measure how far an update moved what the strategy acts on."""
        start = self.method.state_dict()
        return sum(float((update.state[n] - start[n]).square().sum()) for n in self.names) ** 0.5
